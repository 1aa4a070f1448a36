"""The central claim: whatever is done to a catalog, nothing that was stored before changes."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from router.catalog import CATALOG_FILE
from router.loading import SnapshotLoader, read_prompt
from router.tasks import TaskKey
from tests.catalogs import (
    file_digests,
    new_workshop,
    publish,
    served_models,
    texts_of,
    write_rows,
)
from trainer.commands import PolicyChange, RegisterTask
from trainer.lifecycle import restore, retire, rollback
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

Step = Callable[[Workshop, Path], object]


def _register(workshop: Workshop, folder: Path) -> object:
    data = write_rows(folder / "money.jsonl", texts_of("money", 30))
    request = RegisterTask("money", data, with_prompt=False)
    return register(workshop, [request], None, TuningSettings())


def _revise(workshop: Workshop, folder: Path) -> object:
    data = write_rows(folder / "more.jsonl", texts_of("weather", 30, start=70))
    request = RegisterTask("weather", data, with_prompt=False, revise=True)
    return register(workshop, [request], None, TuningSettings())


def _fail(workshop: Workshop, folder: Path) -> object:
    request = RegisterTask("weather", folder / "none.jsonl", with_prompt=False)
    return register(workshop, [request], None, TuningSettings())


def _change_policy(workshop: Workshop, folder: Path) -> object:
    return workshop.publish("policy", live={}, change=PolicyChange(head="nearest-mean"))


STEPS: dict[str, Step] = {
    "a registration": _register,
    "a registration with a prompt": lambda workshop, _: publish(
        workshop, "travel", with_prompt=True
    ),
    "a revision": _revise,
    "a failed registration": _fail,
    "another policy": _change_policy,
    "a retirement": lambda workshop, _: retire(workshop, "sport"),
    "a restoration": lambda workshop, _: restore(workshop, "retired"),
    "a rollback": lambda workshop, _: rollback(workshop, "weather", to=1),
}


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    """Three live tasks with prompts, one of them at its second revision, and a retired one."""
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, "weather", "sport", "retired", with_prompt=True)
        publish(
            workshop,
            "weather",
            revision=2,
            with_prompt=True,
            texts=texts_of("weather", 15, start=40),
        )
        retire(workshop, "retired")
        yield workshop


def stored_files(home: Path) -> Mapping[str, str]:
    """The digest of every file but the database, whose rows are compared one by one."""
    files = file_digests(home)
    return {name: digest for name, digest in files.items() if not name.startswith(CATALOG_FILE)}


def stored_rows(home: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(home / CATALOG_FILE)) as connection:
        names = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        return {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in names}


def assert_only_added(home: Path, files: Mapping[str, str], rows: Mapping[str, list]) -> None:
    files_now, rows_now = stored_files(home), stored_rows(home)
    assert {name: files_now.get(name) for name in files} == dict(files)
    assert rows_now.keys() == rows.keys()
    for table, before in rows.items():
        assert [row for row in rows_now[table] if row in before] == before
        assert len(rows_now[table]) >= len(before)


@pytest.mark.parametrize("name", STEPS)
def test_old_artifacts_and_records_are_byte_identical_after(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    files, rows = stored_files(workshop.home), stored_rows(workshop.home)
    STEPS[name](workshop, tmp_path)
    assert_only_added(workshop.home, files, rows)
    if name != "a failed registration":
        assert workshop.catalog.newest_revision() == 4


def test_old_artifacts_and_records_are_byte_identical_after_everything_together(
    workshop: Workshop, tmp_path: Path
) -> None:
    files, rows = stored_files(workshop.home), stored_rows(workshop.home)
    for step in STEPS.values():
        step(workshop, tmp_path)
        assert_only_added(workshop.home, files, rows)
    assert workshop.catalog.newest_revision() == 2 + len(STEPS)


def test_old_records_and_prompts_are_read_as_they_were_written(
    workshop: Workshop, tmp_path: Path
) -> None:
    keys = [TaskKey(name, 1) for name in ("weather", "sport", "retired")] + [TaskKey("weather", 2)]

    def seen() -> list[tuple[str, bytes]]:
        records = [workshop.catalog.record(key) for key in keys]
        return [
            (record.sha256, read_prompt(workshop.artifacts, record).tobytes()) for record in records
        ]

    before = seen()
    for step in STEPS.values():
        step(workshop, tmp_path)
        assert seen() == before


def test_old_revisions_can_be_served_as_they_were(workshop: Workshop, tmp_path: Path) -> None:
    loader = SnapshotLoader(workshop.home, served_models())

    def heads() -> list[bytes]:
        return [
            loader.load(workshop.catalog, revision, None).head.to_bytes() for revision in (1, 2, 3)
        ]

    before = heads()
    for step in STEPS.values():
        step(workshop, tmp_path)
    assert heads() == before
    for path in (workshop.home / "heads").rglob("*"):
        if path.is_file():
            path.unlink()
    assert heads() == before


def test_only_heads_are_ever_removed(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.workshop._KEPT_HEADS", 1)
    files, rows = stored_files(workshop.home), stored_rows(workshop.home)
    for step in STEPS.values():
        step(workshop, tmp_path)
    now = stored_files(workshop.home)
    removed = files.keys() - now.keys()
    assert removed
    assert all(name.startswith("heads/") for name in removed)
    kept = {name: digest for name, digest in files.items() if name not in removed}
    assert_only_added(workshop.home, kept, rows)
