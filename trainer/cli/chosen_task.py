"""The task revision that a command is about."""

from __future__ import annotations

from pathlib import Path

from router.catalog import CatalogReader
from router.errors import NoPromptError, TaskNotFoundError
from router.tasks import PromptSummary, TaskKey, TaskRecord


def chosen_record(catalog: CatalogReader, name: str, revision: int | None) -> TaskRecord:
    """The record of a task: at `revision`, or else the live one, or else the newest.

    Raises:
        TaskNotFoundError: there is none.
    """
    history = catalog.history(name)
    if not history:
        raise TaskNotFoundError("task", name, "list the tasks with `promptyard list`")
    return catalog.record(TaskKey(name, revision or history[-1][1] or catalog.newest_record(name)))


def prompted_record(
    home: Path, name: str, revision: int | None
) -> tuple[TaskRecord, PromptSummary]:
    """The same, of a task that has a prompt, and its prompt.

    Raises:
        TaskNotFoundError: there is none.
        NoPromptError: it has no prompt.
    """
    with CatalogReader(home) as catalog:
        record = chosen_record(catalog, name, revision)
    if record.prompt is None:
        raise NoPromptError(
            "task", record.key, "it is only routed to; register it with --revise for a prompt"
        )
    return record, record.prompt
