"""The catalog as its reader and its writer promise it: real SQLite files, real processes."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from router.catalog import (
    CATALOG_FILE,
    SCHEMA_VERSION,
    CatalogReader,
    StoredChallenger,
    schema_version,
)
from router.challengers import Challenge
from router.errors import (
    CatalogBusyError,
    CatalogError,
    CorruptArtifactError,
    StorageError,
    TaskExistsError,
    TaskNotFoundError,
)
from router.loading import SnapshotLoader
from router.tasks import DataSummary, Policy, TaskKey, TaskRecord
from tests.catalogs import (
    file_digests,
    new_record,
    new_workshop,
    publish,
    served_models,
)
from tests.forks import ForkServer
from tests.mounts import (
    can_mount,
    make_read_only,
    make_writable,
    other_user,
    read_only_mount,
)
from trainer import catalog_writer
from trainer.catalog_writer import CatalogWriter, Publication
from trainer.challenges import start_challenge

TABLES = ("task_records", "catalog_revisions", "task_events", "challengers", "fast_heads")


def record(name: str, revision: int = 1, description: str = "") -> TaskRecord:
    return TaskRecord(
        name,
        revision,
        "2026-11-24T01:02:03.456+00:00",
        description,
        "",
        ("no", "yes"),
        DataSummary("d" * 64, 20, 16, 4),
        "places:1",
        "e" * 64,
    )


def publication(*records: TaskRecord, **live: int | None) -> Publication:
    return Publication(
        "register",
        records,
        {**{record.name: record.revision for record in records}, **live},
        "f" * 64,
        "places:1",
        Policy(),
        {"held_out_accuracy": 0.75},
    )


def append(writer: CatalogWriter, *records: TaskRecord, **live: int | None) -> int:
    with writer.appending():
        return writer.append(publication(*records, **live))


def append_all_kinds(writer: CatalogWriter) -> None:
    """Append to every table."""
    append(writer, record("weather"))
    challengers = (StoredChallenger(Challenge("weather", 2, 0.25), "a" * 64),)
    with writer.appending():
        writer.append(
            replace(
                publication(record("weather", 2)),
                live={},
                challengers=challengers,
                fast_head_sha256="b" * 64,
            )
        )


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CatalogWriter]:
    with CatalogWriter(tmp_path / "home") as writer:
        yield writer  # type: ignore[misc]


def rows(home: Path) -> dict[str, list[tuple[object, ...]]]:
    with contextlib.closing(sqlite3.connect(home / CATALOG_FILE)) as connection:
        return {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES}


def raw_edit(home: Path, *statements: str) -> None:
    """Change the rows behind the catalog's back."""
    with contextlib.closing(sqlite3.connect(home / CATALOG_FILE)) as connection:
        for (trigger,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall():
            connection.execute(f"DROP TRIGGER {trigger}")
        for statement in statements:
            connection.execute(statement)
        connection.commit()


# What a catalog says


def test_a_new_catalog_is_empty(writer: CatalogWriter) -> None:
    assert writer.newest_revision() == 0
    assert writer.task_names() == []
    assert writer.live(0) == []
    assert writer.newest_record("weather") == 0
    assert writer.history("weather") == []


def test_a_record_comes_back_as_it_was_written(writer: CatalogWriter) -> None:
    written = record("weather", description='Wetter, 天気, "quoted"\n🙂')
    append(writer, written)
    assert writer.record(TaskKey("weather", 1)) == written
    assert writer.record(TaskKey("weather", 1)).sha256 == written.sha256


def test_a_record_with_a_prompt_comes_back_as_it_was_written(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        written = new_record(workshop, "weather", with_prompt=True, outputs=None)
        append(workshop.catalog, written)
        assert workshop.catalog.record(written.key) == written


def test_a_record_of_before_there_were_prefixes_keeps_its_digest() -> None:
    text = (
        '{"created_at":"2026-11-24T01:02:03.456+00:00","data":{"duplicates_dropped":0,"rows":20,'
        '"sha256":"dddd","train_rows":16,"validation_rows":4},"description":"d",'
        '"embeddings_sha256":"aaaa","encoder":"e","forced_reason":"","format":1,"instruction":"i",'
        '"name":"weather","outputs":["no","yes"],"prompt":{"base_model":"b","base_model_name":'
        '"small","hidden_size":8,"metric":"accuracy","scores":{"prompt":0.75},"seconds":1.5,'
        '"settings":{"steps":10},"sha256":"ffff","steps":10,"tokens":4},"revision":1}'
    )
    old = TaskRecord.from_json(text)
    assert old.to_json() == text
    assert old.sha256 == "3de0b3cad60b4161548888d62fb5a4263d9a89b0b25bf6d84288598f815c262a"
    assert old.prompt is not None
    assert (old.prompt.method, old.prompt.width) == ("prompt", 8)


def test_every_publish_is_one_revision_more_and_says_what_was_done(writer: CatalogWriter) -> None:
    assert append(writer, record("weather"), record("sport")) == 1
    assert append(writer, weather=None) == 2
    assert writer.newest_revision() == 2
    about = writer.revision(1)
    assert (about.revision, about.action, about.tasks) == (1, "register", ("sport", "weather"))
    assert (about.head_sha256, about.encoder, about.policy) == ("f" * 64, "places:1", Policy())
    assert about.report == {"held_out_accuracy": 0.75}


def test_what_was_live_at_an_older_revision_can_still_be_asked(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    append(writer, record("sport"))
    append(writer, record("weather", 2))
    append(writer, sport=None)
    append(writer, weather=1)
    append(writer, sport=1)
    weather, sport = TaskKey("weather", 1), TaskKey("sport", 1)
    assert writer.live(1) == [weather]
    assert writer.live(2) == [sport, weather]
    assert writer.live(3) == [sport, TaskKey("weather", 2)]
    assert writer.live(4) == [TaskKey("weather", 2)]
    assert writer.live(5) == [weather]
    assert writer.live(6) == [sport, weather]
    assert writer.history("sport") == [(2, 1), (4, None), (6, 1)]
    assert writer.newest_record("weather") == 2
    assert writer.task_names() == ["sport", "weather"]


def test_a_revision_that_does_not_exist_is_named_with_the_newest_one(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    with pytest.raises(CatalogError, match="catalog revision: 7; the newest one is 1"):
        writer.revision(7)


def test_a_record_that_does_not_exist_is_not_found(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    with pytest.raises(TaskNotFoundError, match="task: weather@2"):
        writer.record(TaskKey("weather", 2))


# Appending


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("change", ["UPDATE {} SET {} = 'x'", "DELETE FROM {}"])
def test_the_file_itself_refuses_to_change_or_delete_rows(
    writer: CatalogWriter, table: str, change: str
) -> None:
    append_all_kinds(writer)
    column = {
        "task_records": "record",
        "catalog_revisions": "report",
        "fast_heads": "head_sha256",
    }.get(table, "task")
    with (
        contextlib.closing(sqlite3.connect(writer.home / CATALOG_FILE)) as connection,
        pytest.raises(sqlite3.IntegrityError, match=f"{table} is append-only"),
    ):
        connection.execute(change.format(table, column))


@pytest.mark.parametrize("verb", ["INSERT OR REPLACE", "REPLACE", "INSERT"])
@pytest.mark.parametrize("table", TABLES)
def test_the_file_itself_refuses_to_replace_rows(
    writer: CatalogWriter, table: str, verb: str
) -> None:
    append_all_kinds(writer)
    before = rows(writer.home)
    with contextlib.closing(sqlite3.connect(writer.home / CATALOG_FILE)) as connection:
        row = before[table][0]
        with pytest.raises(sqlite3.IntegrityError, match=f"{table} is append-only"):
            connection.execute(f"{verb} INTO {table} VALUES ({','.join('?' * len(row))})", row)
    assert rows(writer.home) == before


def test_a_reader_has_no_way_to_write(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    before = file_digests(writer.home)
    with (
        CatalogReader(writer.home) as reader,
        pytest.raises(sqlite3.OperationalError, match="attempt to write a readonly database"),
    ):
        reader._connection.execute("INSERT INTO task_events VALUES ('weather', 1, NULL)")
    assert not {name for name in dir(CatalogReader) if name.startswith(("append", "publish"))}
    assert file_digests(writer.home) == before


def test_an_event_needs_a_record_that_exists(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    with pytest.raises(CatalogError, match="FOREIGN KEY"):
        append(writer, weather=2)
    assert writer.newest_revision() == 1


def test_appending_needs_an_open_transaction(writer: CatalogWriter) -> None:
    with pytest.raises(CatalogError, match="call it inside appending"):
        writer.append(publication(record("weather")))


def test_an_error_on_the_way_leaves_no_trace(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    before = rows(writer.home)

    def fails() -> None:
        with writer.appending():
            writer.append(publication(record("sport")))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert rows(writer.home) == before
    assert append(writer, record("sport")) == 2


def test_a_revision_of_a_task_that_was_taken_meanwhile_is_refused(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    with pytest.raises(TaskExistsError, match=r"weather@1.*finished first"):
        writer.refuse_existing(record("weather"))
    writer.refuse_existing(record("weather", 2))


def test_a_reader_goes_on_while_a_writer_holds_the_catalog(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    with CatalogReader(writer.home) as reader:
        with writer.appending():
            writer.append(publication(record("sport")))
            assert reader.newest_revision() == 1
            assert reader.live(2) == [TaskKey("weather", 1)]
            with CatalogReader(writer.home) as late:
                assert late.task_names() == ["weather"]
        assert reader.newest_revision() == 2


def test_one_reader_serves_many_threads(writer: CatalogWriter) -> None:
    append(writer, *(record(f"task-{number}") for number in range(20)))
    with CatalogReader(writer.home) as reader, ThreadPoolExecutor(8) as threads:
        keys = [TaskKey(f"task-{number % 20}", 1) for number in range(200)]
        found = list(threads.map(reader.record, keys))
    assert [record.key for record in found] == keys


def test_a_second_writer_that_waits_too_long_is_told_that_the_catalog_is_busy(
    writer: CatalogWriter,
) -> None:
    with CatalogWriter(writer.home) as second:
        second._connection.execute("PRAGMA busy_timeout = 20")  # type: ignore[attr-defined]
        with (
            writer.appending(),
            pytest.raises(CatalogBusyError, match="another registration is running"),
        ):
            append(second, record("weather"))  # type: ignore[arg-type]


def test_registrations_at_once_in_threads_all_succeed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    together = threading.Barrier(4)

    def work(number: int) -> list[int]:
        together.wait(20)
        with new_workshop(home) as workshop:
            return [publish(workshop, f"task-{number}-{turn}").revision for turn in range(3)]

    with ThreadPoolExecutor(4) as threads:
        revisions = [revision for made in threads.map(work, range(4)) for revision in made]
    assert sorted(revisions) == list(range(1, 13))
    check_that_everything_is_served(
        home, [f"task-{n}-{turn}" for n in range(4) for turn in (0, 1, 2)]
    )


def test_registrations_at_once_in_processes_all_succeed(tmp_path: Path, forks: ForkServer) -> None:
    home = tmp_path / "home"
    revisions = forks.call("publish_in_two_processes", str(home), 6)
    assert sorted(revisions) == list(range(1, 13))
    check_that_everything_is_served(
        home, [f"{prefix}-{n}" for prefix in ("first", "second") for n in range(6)]
    )


def test_one_of_two_registrations_of_one_name_at_once_fails_cleanly(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as first, new_workshop(tmp_path / "home") as second:
        late = new_record(second, "weather")
        publish(first, "weather")
        with pytest.raises(TaskExistsError, match="run it again with --revise"):
            second.publish("register", records=(late,), live={"weather": 1})
        assert second.catalog.newest_revision() == 1


def check_that_everything_is_served(home: Path, names: list[str]) -> None:
    with CatalogReader(home) as catalog:
        newest = catalog.newest_revision()
        snapshot = SnapshotLoader(home, served_models()).load(catalog, newest, None)
        assert sorted(snapshot.tasks) == sorted(names)
        assert [key.name for key in snapshot.head.tasks] == sorted(names)
        assert [len(catalog.live(revision)) for revision in range(newest + 1)] == list(
            range(newest + 1)
        )


# Files that cannot be used


def test_a_folder_without_a_catalog_is_named_with_the_remedy(tmp_path: Path) -> None:
    for home in (tmp_path, tmp_path / "none"):
        with pytest.raises(CatalogError, match="holds no catalog; register a task first"):
            CatalogReader(home)


def test_a_catalog_that_is_just_being_made_is_none_yet(tmp_path: Path) -> None:
    (tmp_path / CATALOG_FILE).touch()
    with pytest.raises(CatalogError, match="holds no catalog"):
        CatalogReader(tmp_path)
    with CatalogWriter(tmp_path) as writer:
        assert writer.newest_revision() == 0


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("not a folder")
    with pytest.raises(CatalogError, match="holds no catalog"):
        CatalogReader(home)
    with pytest.raises(StorageError, match="give a writable folder with --home"):
        CatalogWriter(home)


def test_a_catalog_of_a_newer_version_is_refused_and_left_alone(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    newer = SCHEMA_VERSION + 1
    raw_edit(writer.home, f"PRAGMA user_version = {newer}")
    before = file_digests(writer.home)
    for kind in (CatalogReader, CatalogWriter):
        with pytest.raises(CatalogError, match=f"catalog version: {newer}; upgrade promptyard"):
            kind(writer.home)
    assert file_digests(writer.home) == before


@pytest.mark.parametrize("kind", [CatalogReader, CatalogWriter])
def test_a_file_that_is_no_database_is_refused_and_left_alone(
    tmp_path: Path, kind: type[CatalogReader]
) -> None:
    (tmp_path / CATALOG_FILE).write_bytes(b"these are not the rows that you are looking for" * 90)
    before = file_digests(tmp_path)
    with pytest.raises(CatalogError, match="file is not a database; check the file"):
        kind(tmp_path)
    assert file_digests(tmp_path) == before


def test_a_damaged_file_gives_a_clear_error_wherever_it_is_damaged(
    writer: CatalogWriter, tmp_path: Path
) -> None:
    for number in range(6):
        append(writer, record(f"task-{number}", description="text " * 400))
    healthy = (writer.home / CATALOG_FILE).read_bytes()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    refused = 0
    for start in range(0, len(healthy), 2048):
        broken = healthy[:start] + b"\xa5" * 512 + healthy[start + 512 :]
        (damaged / CATALOG_FILE).write_bytes(broken)
        refused += not _can_be_read(damaged)
    for size in range(1, len(healthy), 4096):
        (damaged / CATALOG_FILE).write_bytes(healthy[:size])
        refused += not _can_be_read(damaged)
    assert refused > 10


def _can_be_read(home: Path) -> bool:
    """Read everything; only the errors that are promised may come."""
    try:
        with CatalogReader(home) as catalog:
            newest = catalog.newest_revision()
            for revision in range(1, newest + 1):
                catalog.revision(revision)
                for key in catalog.live(revision):
                    catalog.record(key)
                    catalog.history(key.name)
            return newest == 6 and len(catalog.task_names()) == 6
    except (CatalogError, CorruptArtifactError, TaskNotFoundError):
        return False


def test_a_record_that_is_not_what_its_digest_says_is_refused(writer: CatalogWriter) -> None:
    append(writer, record("weather", description="about the weather"))
    raw_edit(
        writer.home, "UPDATE task_records SET record = replace(record, 'the weather', 'money')"
    )
    with pytest.raises(CorruptArtifactError, match="record of weather@1: does not have its digest"):
        writer.record(TaskKey("weather", 1))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"format": 1}', '{"format": 99}', '{"format": []}']
)
def test_a_record_that_is_no_record_is_refused(writer: CatalogWriter, text: str) -> None:
    append(writer, record("weather"))
    raw_edit(writer.home, f"UPDATE task_records SET record = '{text}'")
    with pytest.raises(CorruptArtifactError):
        writer.record(TaskKey("weather", 1))


@pytest.mark.parametrize(
    "change",
    [
        "tasks = '['",
        "policy = '{\"heads\": 3}'",
        "policy = '[]'",
        "report = ''",
        "report = x'ff'",
        "tasks = '7'",
        "head_sha256 = cast(x'ff' AS TEXT)",
    ],
)
def test_a_damaged_revision_is_refused(writer: CatalogWriter, change: str) -> None:
    append(writer, record("weather"))
    raw_edit(writer.home, f"UPDATE catalog_revisions SET {change}")
    with pytest.raises(CatalogError):
        writer.revision(1)


# Killed writers, readers without permissions


@pytest.fixture
def killed(tmp_path: Path, public_folder: Path) -> Path:
    """A home whose writer was killed while pages of its commit were in the file already."""
    home = public_folder / "home"
    with CatalogWriter(tmp_path / "alive") as writer:
        append(writer, record("weather"))  # type: ignore[arg-type]
        writer._connection.execute("PRAGMA cache_size = 2")  # type: ignore[attr-defined]
        with writer.appending():  # type: ignore[attr-defined]
            writer.append(publication(record("sport", description="x" * 200_000)))  # type: ignore[attr-defined]
            # A copy has the same bytes and no living writer.
            shutil.copytree(writer.home, home)
    journal = home / f"{CATALOG_FILE}-journal"
    assert journal.stat().st_size > 512
    assert b"x" * 1000 in (home / CATALOG_FILE).read_bytes()
    return home


def test_a_reader_undoes_what_a_killed_writer_left_half_written(killed: Path) -> None:
    with CatalogReader(killed) as reader:
        assert reader.newest_revision() == 1
        assert reader.live(2) == [TaskKey("weather", 1)]
    assert sorted(path.name for path in killed.iterdir()) == [CATALOG_FILE]


def test_a_reader_that_was_there_before_the_writer_was_killed_recovers(
    killed: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with contextlib.closing(sqlite3.connect(home / CATALOG_FILE)) as connection:
        shutil.copy(killed / CATALOG_FILE, tmp_path / "half")
        shutil.copy(killed / f"{CATALOG_FILE}-journal", tmp_path / "journal")
        with CatalogReader(killed) as reader:
            reader.newest_revision()
        with contextlib.closing(sqlite3.connect(killed / CATALOG_FILE)) as healthy:
            healthy.backup(connection)
    with CatalogReader(home) as reader:
        assert reader.newest_revision() == 1
        with (home / CATALOG_FILE).open("r+b") as file:
            file.write((tmp_path / "half").read_bytes())
        shutil.copy(tmp_path / "journal", home / f"{CATALOG_FILE}-journal")
        with contextlib.suppress(CatalogError):
            reader.newest_revision()
        assert reader.newest_revision() == 1


def test_the_next_writer_undoes_what_a_killed_one_left_half_written(killed: Path) -> None:
    with CatalogWriter(killed) as writer:
        assert append(writer, record("sport")) == 2  # type: ignore[arg-type]
        assert writer.live(2) == [TaskKey("sport", 1), TaskKey("weather", 1)]


def test_a_reader_who_may_not_undo_it_is_told_who_can(killed: Path, forks: ForkServer) -> None:
    make_read_only(killed)
    [[kind, message]] = forks.call("open_catalog", str(killed), user=other_user())
    make_writable(killed)
    assert kind == "CatalogError"
    assert "a writer was killed: run `promptyard list` as a user who may write to it" in message
    with CatalogReader(killed) as reader:
        assert reader.newest_revision() == 1


def test_a_catalog_of_another_user_can_be_served_but_not_written(
    public_folder: Path, forks: ForkServer
) -> None:
    home = public_folder / "home"
    with new_workshop(home) as workshop:
        publish(workshop, "weather", "sport", with_prompt=True)
    if other_user() is None:
        make_read_only(home)
    [seen] = forks.call("read_everything", str(home), user=other_user())
    assert seen["tasks"] == ["sport", "weather"]
    assert seen["problems"] == []
    assert seen["decisions"] == ["weather@1"] * 3
    [[kind, message]] = forks.call("try_to_write", str(home), user=other_user())
    make_writable(home)
    assert kind in ("CatalogError", "StorageError")
    assert "permissions" in message


def test_a_folder_that_may_not_be_entered_gives_a_clear_error(
    public_folder: Path, forks: ForkServer
) -> None:
    home = public_folder / "home"
    with new_workshop(home) as workshop:
        publish(workshop, "weather")
    home.chmod(0o000)
    [[kind, message]] = forks.call("open_catalog", str(home), user=other_user())
    home.chmod(0o755)
    assert kind == "CatalogError"
    assert "unable to open database file; check the file and its permissions" in message


# Where this user may not mount, taking the permissions away is as near as one gets.
READ_ONLY = ["permissions", "mount"] if can_mount() else ["permissions"]


@pytest.mark.parametrize("way", READ_ONLY)
def test_a_catalog_in_a_read_only_place_can_be_served_and_followed(
    public_folder: Path, forks: ForkServer, way: str
) -> None:
    home = public_folder / "home"
    with new_workshop(home) as workshop, contextlib.ExitStack() as closing:
        publish(workshop, "weather", with_prompt=True)
        if way == "mount":
            place = closing.enter_context(read_only_mount(home, public_folder / "mounted"))
            with pytest.raises(OSError, match="Read-only file system"):
                (place / "new").touch()
        else:
            place = home
            make_read_only(home)
        user = other_user() if way == "permissions" else None
        [seen] = forks.call("read_everything", str(place), user=user)
        assert seen["tasks"] == ["weather"]
        assert seen["problems"] == []
        make_writable(home)
        publish(workshop, "sport")
        [seen] = forks.call("read_everything", str(place), user=user)
        assert seen["tasks"] == ["sport", "weather"]


def test_the_schema_is_the_same_whoever_makes_the_catalog_first(tmp_path: Path) -> None:
    together = threading.Barrier(4)

    def make(number: int) -> int:
        together.wait(20)
        with CatalogWriter(tmp_path / "home") as writer:
            return append(writer, record(f"task-{number}"))  # type: ignore[arg-type]

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(make, range(4))) == [1, 2, 3, 4]


def test_what_was_acknowledged_is_on_disk_and_the_journal_is_gone(writer: CatalogWriter) -> None:
    append(writer, record("weather"))
    level = writer._connection.execute("PRAGMA synchronous").fetchone()[0]
    extra = 3
    assert level == extra
    assert writer._connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    assert sorted(path.name for path in writer.home.iterdir()) == [CATALOG_FILE]


def test_waiting_for_another_registration_is_counted_in_minutes() -> None:
    assert catalog_writer._WAIT_SECONDS >= 60


# Catalogs of before there were challengers

OLD_HOME = Path(__file__).parents[1] / "data" / "home-of-schema-1.tar.gz"


@pytest.fixture
def old_home(tmp_path: Path) -> Path:
    """A home that was written when catalogs had version 1: weather, and sport at its revision 2."""
    with tarfile.open(OLD_HOME) as archive:
        archive.extractall(tmp_path, filter="data")
    with contextlib.closing(sqlite3.connect(tmp_path / "home" / CATALOG_FILE)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    return tmp_path / "home"


def test_an_old_catalog_is_read_as_it_is(old_home: Path) -> None:
    before = file_digests(old_home)
    with CatalogReader(old_home) as reader:
        assert reader.live(2) == [TaskKey("sport", 2), TaskKey("weather", 1)]
        assert reader.challengers(2) == []
        assert reader.fast_head(2) is None
        snapshot = SnapshotLoader(old_home, served_models()).load(reader, 2, None)
    assert not any(task.problem for task in snapshot.tasks.values())
    assert file_digests(old_home) == before


def test_a_writer_brings_an_old_catalog_up_to_date_and_keeps_every_row(old_home: Path) -> None:
    old = TABLES[:3]
    with contextlib.closing(sqlite3.connect(old_home / CATALOG_FILE)) as connection:
        before = {t: connection.execute(f"SELECT * FROM {t}").fetchall() for t in old}
    # A server that reads meanwhile goes on, and sees the challengers that come.
    with CatalogReader(old_home) as reader:
        assert reader.challengers(2) == []
        with new_workshop(old_home) as workshop:
            assert schema_version(workshop.catalog._connection) == SCHEMA_VERSION == 3
            assert {t: rows(old_home)[t] for t in old} == before
            start_challenge(workshop, "sport", 0.5, revision=1)
        assert [each.challenge for each in reader.challengers(3)] == [Challenge("sport", 1, 0.5)]
        assert reader.fast_head(3) is None
        assert reader.live(3) == reader.live(2)


def test_an_old_catalog_is_brought_up_to_date_once_by_many_at_a_time(old_home: Path) -> None:
    together = threading.Barrier(4)

    def open_it(_: int) -> int:
        together.wait(20)
        with CatalogWriter(old_home) as writer:
            return schema_version(writer._connection)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(open_it, range(4))) == [SCHEMA_VERSION] * 4


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, "half"])
def test_the_file_itself_refuses_a_share_that_is_none(writer: CatalogWriter, share: object) -> None:
    append_all_kinds(writer)
    with (
        contextlib.closing(sqlite3.connect(writer.home / CATALOG_FILE)) as connection,
        pytest.raises(sqlite3.IntegrityError, match="CHECK constraint failed"),
    ):
        connection.execute("INSERT INTO challengers VALUES ('weather', 1, 2, ?, 'ffff')", (share,))
