"""Retire, restore and roll back a task: events in the catalog, nothing is deleted.

A task that comes back passes the same gate as a new one: others may have been registered since.
"""

from __future__ import annotations

from router.errors import InvalidInputError, TaskNotFoundError
from trainer.gate import DEFAULT_GATE_LIMIT
from trainer.workshop import Published, Workshop


def retire(workshop: Workshop, name: str) -> Published:
    """Take a task out of routing. Its records and files stay.

    Raises:
        TaskNotFoundError: there is no such live task.
    """
    if live_revision(workshop, name) is None:
        raise TaskNotFoundError("task", name, "it is not live; see `promptyard list --all`")
    return workshop.publish("retire", live={name: None})


def restore(
    workshop: Workshop,
    name: str,
    gate_limit: float = DEFAULT_GATE_LIMIT,
    force: str = "",
) -> Published:
    """Bring a retired task back, at the revision that was live last.

    Raises:
        InterferenceError: it takes more than `gate_limit` of another task, and `force` gives no
            reason to let it.
        TaskNotFoundError: there never was such a task.
        InvalidInputError: it is live already.
    """
    history = _history(workshop, name)
    if history[-1] is not None:
        raise InvalidInputError("task", name, "it is live already")
    revision = next(live for live in reversed(history) if live is not None)
    return workshop.publish("restore", live={name: revision}, gate_limit=gate_limit, force=force)


def rollback(
    workshop: Workshop,
    name: str,
    to: int | None = None,
    gate_limit: float = DEFAULT_GATE_LIMIT,
    force: str = "",
) -> Published:
    """Make an older revision of a task live again: `to`, or the one that was live before.

    Raises:
        InterferenceError: it takes more than `gate_limit` of another task, and `force` gives no
            reason to let it.
        TaskNotFoundError: there is no such task, or no such revision of it.
        InvalidInputError: there is nothing to go back to.
    """
    history = _history(workshop, name)
    current = history[-1]
    if to is None:
        earlier = [live for live in history if live is not None and live != current]
        if not earlier:
            raise InvalidInputError("task", name, "it has no other revision to go back to")
        to = earlier[-1]
    if to == current:
        raise InvalidInputError("--to", to, "that revision is live already")
    if not 1 <= to <= workshop.catalog.newest_record(name):
        raise TaskNotFoundError(
            "--to", f"{name}@{to}", f"give 1 to {workshop.catalog.newest_record(name)}"
        )
    return workshop.publish("rollback", live={name: to}, gate_limit=gate_limit, force=force)


def live_revision(workshop: Workshop, name: str) -> int | None:
    """The live revision of a task, None where it is retired or was never registered."""
    history = workshop.catalog.history(name)
    return history[-1][1] if history else None


def _history(workshop: Workshop, name: str) -> list[int | None]:
    history = [live for _, live in workshop.catalog.history(name)]
    if not history:
        raise TaskNotFoundError("task", name, "list the tasks with `promptyard list --all`")
    return history
