"""Begin, promote and end the challenge of a task: revisions of the catalog, nothing is deleted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.challengers import Challenge
from router.errors import TaskNotFoundError
from trainer.challenge_rules import challenge_of
from trainer.gate import DEFAULT_GATE_LIMIT

if TYPE_CHECKING:
    from trainer.workshop import Published, Workshop


def start_challenge(
    workshop: Workshop,
    name: str,
    share: float | None,
    revision: int | None = None,
    gate_limit: float = DEFAULT_GATE_LIMIT,
    force: str = "",
) -> Published:
    """Try a stored revision of a task beside the live one, or change the share of its challenger.

    `revision` is by default the one that is tried already, or else the newest one.

    Raises:
        InterferenceError: in the place of the live revision it would take more than `gate_limit` of
            another task, and `force` gives no reason to let it.
        TaskNotFoundError: there is no such live task, or no such revision of it.
        InvalidInputError: it is the live one, another one is tried, or too many tasks are tried.
    """
    newest = workshop.catalog.newest_record(name)
    if revision is None:
        found = challenge_of(workshop.catalog, name)
        revision = newest if found is None else found.revision
    if newest and not 1 <= revision <= newest:
        raise TaskNotFoundError("--revision", f"{name}@{revision}", f"give 1 to {newest}")
    return workshop.publish(
        "challenge",
        live={},
        gate_limit=gate_limit,
        force=force,
        challenge=Challenge(name, revision, share),
    )


def promote_challenger(
    workshop: Workshop,
    name: str,
    gate_limit: float = DEFAULT_GATE_LIMIT,
    force: str = "",
) -> Published:
    """Make the challenger of a task its live revision. It passes the gate as a new task does.

    Raises:
        InterferenceError: it takes more than `gate_limit` of another task, and `force` gives no
            reason to let it.
        TaskNotFoundError: the task has no challenger.
    """
    challenge = _challenge(workshop, name)
    return workshop.publish(
        "promote", live={name: challenge.revision}, gate_limit=gate_limit, force=force
    )


def end_challenge(workshop: Workshop, name: str) -> Published:
    """Try the challenger of a task no more. Its record and files stay.

    Raises:
        TaskNotFoundError: the task has no challenger.
    """
    _challenge(workshop, name)
    return workshop.publish("end-challenge", live={}, ended=name)


def _challenge(workshop: Workshop, name: str) -> Challenge:
    found = challenge_of(workshop.catalog, name)
    if found is None:
        raise TaskNotFoundError("challenger of", name, "see `promptyard challenger list`")
    return found
