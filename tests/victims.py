"""What the forked processes of `tests.forks` do: register until they are killed, read as others."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trainer.artifact_writer
import trainer.workshop
from router.catalog import CatalogReader
from router.errors import PromptyardError
from router.loading import SnapshotLoader
from tests.catalogs import (
    PlaceEncoder,
    file_digests,
    new_workshop,
    publish,
    served_models,
    texts_of,
    write_rows,
)
from tests.forks import report
from trainer.commands import RegisterTask
from trainer.data import read_labelled
from trainer.register import register
from trainer.tuning_settings import TuningSettings


def register_tasks(home: str, prefix: str, count: int, point: str = "", passage: int = 1) -> None:
    """Register tasks one after the other; report each one that was acknowledged.

    At the given passage of the named point the process kills itself.
    """
    folder = Path(home)
    data = folder.parent / f"{prefix}.jsonl"
    with new_workshop(folder) as workshop:
        if point:
            _arm(workshop, point, passage)
        for number in range(count):
            name = f"{prefix}-{number}"
            write_rows(data, texts_of(name, 8))
            request = RegisterTask(name, data, description="long " * 4000, with_prompt=False)
            result = register(workshop, [request], None, TuningSettings())
            assert result.published is not None, result.failures
            report([name, result.records[0].sha256, result.published.revision])


def publish_in_two_processes(home: str, count: int) -> None:
    """Publish tasks one after the other, in two processes at once."""
    other = os.fork()
    with new_workshop(Path(home)) as workshop:
        for number in range(count):
            name = f"{'first' if other else 'second'}-{number}"
            report(publish(workshop, name).revision)
    if not other:
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0


def read_everything(home: str) -> None:
    """Open the catalog, load what it serves, and report the tasks with the digests of prompts."""
    with CatalogReader(Path(home)) as catalog:
        revision = catalog.newest_revision()
        snapshot = SnapshotLoader(Path(home), served_models()).load(catalog, revision, None)
    decisions = snapshot.decide(PlaceEncoder().encode(texts_of("weather", 3)))
    report(
        {
            "user": os.geteuid(),
            "tasks": sorted(snapshot.tasks),
            "problems": [task.problem for task in snapshot.tasks.values() if task.problem],
            "decisions": [str(decision.task) for decision in decisions],
        }
    )


def try_to_write(home: str) -> None:
    """Report why nothing can be published here."""
    before = file_digests(Path(home))
    try:
        with new_workshop(Path(home)) as workshop:
            publish(workshop, "intruder")
    except PromptyardError as error:
        report([type(error).__name__, str(error)])
    assert file_digests(Path(home)) == before


def open_catalog(home: str) -> None:
    """Report the newest revision, or why it cannot be read."""
    try:
        with CatalogReader(Path(home)) as catalog:
            report(catalog.newest_revision())
    except PromptyardError as error:
        report([type(error).__name__, str(error)])


def read_data_file(path: str) -> None:
    """Report why a file of examples cannot be read."""
    try:
        read_labelled(Path(path))
    except PromptyardError as error:
        report(str(error))


def write_beyond_the_file_size_limit(folder: str, limit: int, size: int) -> None:
    """Try to store an artifact that is larger than any file may be."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        trainer.artifact_writer.ArtifactWriter(Path(folder)).write(b"x" * size)
    except PromptyardError as error:
        report([type(error).__name__, str(error)])


def _arm(workshop: trainer.workshop.Workshop, point: str, passage: int) -> None:
    """Let the process kill itself when it passes `point` for the given time."""
    left = [passage]

    def passed() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            passed()
            return original(*arguments, **options)

        setattr(module, name, wrapped)

    connection: sqlite3.Connection = workshop.catalog._connection
    kind, _, what = point.partition(": ")
    if kind == "before os":
        before(os, what)
    elif kind == "before":
        before(trainer.workshop.Workshop, what)
    elif kind == "half-written catalog":
        # So little memory that pages go to the file before the commit.
        connection.execute("PRAGMA cache_size = 2")
        connection.set_trace_callback(lambda sql: passed() if sql.startswith(what) else None)
    else:
        assert kind == "before statement", point
        connection.set_trace_callback(lambda sql: passed() if sql.startswith(what) else None)
