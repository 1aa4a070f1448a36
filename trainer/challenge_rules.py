"""What may challenge what: checked before anything is computed, and again at the publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.catalog import CatalogReader
from router.challengers import MAX_CHALLENGERS, Challenge, parse_share
from router.errors import InvalidInputError, TaskNotFoundError
from router.tasks import TaskKey
from trainer.commands import RegisterTask


def requested_challenge(
    catalog: CatalogReader | None, request: RegisterTask, revision: int
) -> Challenge | None:
    """The challenge that a request to register `revision` of a task begins; None for none.

    Raises:
        TaskNotFoundError: the task is not live.
        InvalidInputError: no share, no `revise`, or the task cannot be challenged at the moment.
    """
    if not request.challenger:
        return None
    challenge = Challenge(request.name, revision, parse_share(request.challenger))
    if not request.revise or catalog is None:
        raise InvalidInputError(
            "challenger", request.challenger, "only a next revision challenges: add --revise"
        )
    newest = catalog.newest_revision()
    live = {key.name: key for key in catalog.live(newest)}
    stood = [stored.challenge for stored in catalog.challengers(newest)]
    standing_challenges(stood, live, challenge)
    return challenge


def challenge_of(catalog: CatalogReader, name: str) -> Challenge | None:
    """The challenge of a task at the newest revision."""
    stood = catalog.challengers(catalog.newest_revision())
    return next((each.challenge for each in stood if each.challenge.task == name), None)


def standing_challenges(
    stood: Sequence[Challenge],
    live: Mapping[str, TaskKey],
    begun: Challenge | None = None,
    ended: str = "",
) -> tuple[Challenge, ...]:
    """The challenges of a catalog revision, by task, where `stood` are those of the one before.

    A challenge ends by itself when its task is retired, or its challenger becomes live.

    Raises:
        TaskNotFoundError: `begun` is of a task that is not live.
        InvalidInputError: `begun` challenges itself, or a task that another revision challenges
            already, or is one too many.
    """
    stand = {each.task: each for each in stood if each.task != ended and _can_stand(each, live)}
    if begun is not None:
        before = stand.get(begun.task)
        if begun.task not in live:
            raise TaskNotFoundError(
                "task", begun.task, "a challenger needs a live task to challenge"
            )
        if not _can_stand(begun, live):
            raise InvalidInputError(
                "challenger", begun.key, "it is live: name another revision, or add one (--revise)"
            )
        if before is not None and before.revision != begun.revision:
            raise InvalidInputError(
                "challenger",
                begun.key,
                f"{before.key} is tried already: `promptyard challenger end` or promote it first",
            )
        stand[begun.task] = begun
        if len(stand) > MAX_CHALLENGERS:
            raise InvalidInputError(
                "challenger",
                f"{begun.key}, the {len(stand)}th",
                f"end another one first: at most {MAX_CHALLENGERS} tasks are challenged at a time",
            )
    return tuple(stand[task] for task in sorted(stand))


def _can_stand(challenge: Challenge, live: Mapping[str, TaskKey]) -> bool:
    return live.get(challenge.task) not in (None, challenge.key)
