"""What becomes of requests to register, and what is refused before any model is loaded."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from router.catalog import CatalogReader, has_catalog
from router.errors import PromptyardError, StorageError, TaskExistsError, TaskNotFoundError
from router.tasks import TaskRecord, check_task_name
from trainer.challenge_rules import requested_challenge
from trainer.commands import RegisterTask
from trainer.data import read_rows

if TYPE_CHECKING:
    from trainer.workshop import Published

# A task of a few hundred rows takes about half of it.
LEAST_FREE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class SuspectInput:
    """An input, shortened, that its own task does not win: mislabelled, or an outlier.

    `decided` is the task that wins it by a head that was fitted without it; None for nobody. About
    as many as the catalog's false-reject rate are nobody's without anything being wrong.
    """

    task: str
    input: str
    decided: str | None


@dataclass(frozen=True, slots=True)
class Registered:
    """What became of a registration. Suspects that another task wins come first."""

    records: tuple[TaskRecord, ...]
    failures: Mapping[str, PromptyardError]
    published: Published | None
    suspects: tuple[SuspectInput, ...] = ()


def refused_at_once(home: Path, requests: Sequence[RegisterTask]) -> dict[str, PromptyardError]:
    """What can be refused before any model is loaded: names, and files that cannot be opened."""
    failures: dict[str, PromptyardError] = {}
    catalog = CatalogReader(home) if has_catalog(home) else None
    with contextlib.closing(catalog) if catalog else contextlib.nullcontext():
        for request in requests:
            try:
                check_task_name(request.name)
                newest = catalog.newest_record(request.name) if catalog else 0
                requested_challenge(catalog, request, next_revision(newest, request))
                with contextlib.closing(read_rows(request.data)) as rows:
                    next(rows, None)
            except PromptyardError as error:
                failures[request.name] = error
    return failures


def check_writable(home: Path, least_free_bytes: int = LEAST_FREE_BYTES) -> None:
    """Refuse a home that nothing could be stored in, before minutes are spent on tuning.

    Raises:
        StorageError: it may not be written, or its disk is full.
    """
    place = next(
        folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists()
    )
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(
            f"home {home}", "may not be written", "give a folder of yours that is not read-only"
        )
    free = shutil.disk_usage(place).free
    if free < least_free_bytes:
        raise StorageError(
            f"home {home}",
            f"{free} bytes free",
            f"free disk space: at least {least_free_bytes} bytes",
        )


def next_revision(newest: int, request: RegisterTask) -> int:
    """The revision that the request makes, where `newest` is the task's newest; 0 for none.

    Raises:
        TaskExistsError: there is one, and `revise` is not set.
        TaskNotFoundError: there is none, and `revise` is set.
    """
    if newest and not request.revise:
        raise TaskExistsError(
            "task name", request.name, "choose another name, or add --revise for its next revision"
        )
    if request.revise and not newest:
        raise TaskNotFoundError("task name", request.name, "register it first, without --revise")
    return newest + 1
