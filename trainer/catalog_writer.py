"""The write side of the catalog: it can append, and nothing else."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from router.catalog import SCHEMA_VERSION, CatalogReader, StoredChallenger, schema_version
from router.errors import CatalogBusyError, CatalogError, StorageError, TaskExistsError
from router.tasks import Policy, TaskRecord
from trainer.artifact_writer import sync_folder

_WAIT_SECONDS = 120.0

_TABLES = """
    CREATE TABLE task_records (
        task TEXT NOT NULL,
        revision INTEGER NOT NULL CHECK (revision > 0),
        record TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        PRIMARY KEY (task, revision)
    ) WITHOUT ROWID;
    CREATE TABLE catalog_revisions (
        revision INTEGER PRIMARY KEY CHECK (revision > 0),
        created_at TEXT NOT NULL,
        action TEXT NOT NULL,
        tasks TEXT NOT NULL,
        head_sha256 TEXT NOT NULL,
        encoder TEXT NOT NULL,
        policy TEXT NOT NULL,
        report TEXT NOT NULL
    );
    CREATE TABLE task_events (
        task TEXT NOT NULL,
        catalog_revision INTEGER NOT NULL REFERENCES catalog_revisions (revision),
        task_revision INTEGER,
        PRIMARY KEY (task, catalog_revision),
        FOREIGN KEY (task, task_revision) REFERENCES task_records (task, revision)
    ) WITHOUT ROWID;
"""
_CHALLENGERS = """
    CREATE TABLE challengers (
        task TEXT NOT NULL,
        catalog_revision INTEGER NOT NULL REFERENCES catalog_revisions (revision),
        task_revision INTEGER NOT NULL,
        share REAL CHECK (share IS NULL OR (share > 0 AND share <= 1)),
        head_sha256 TEXT NOT NULL,
        PRIMARY KEY (task, catalog_revision),
        FOREIGN KEY (task, task_revision) REFERENCES task_records (task, revision)
    ) WITHOUT ROWID;
"""

_FAST_HEADS = """
    CREATE TABLE fast_heads (
        catalog_revision INTEGER PRIMARY KEY REFERENCES catalog_revisions (revision),
        head_sha256 TEXT NOT NULL
    );
"""


def _append_only(table: str, *key: str) -> str:
    """The triggers that refuse everything but appending to `table`, whose primary key is `key`."""
    refusal = f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END;"
    # INSERT OR REPLACE deletes a row without asking the triggers for DELETE.
    new = ", ".join(f"NEW.{column}" for column in key)
    replaced = f"({new}) IN (SELECT {', '.join(key)} FROM {table})"  # noqa: S608 - our own names
    return (
        f"CREATE TRIGGER {table}_refuses_update BEFORE UPDATE ON {table} {refusal}"
        f"CREATE TRIGGER {table}_refuses_delete BEFORE DELETE ON {table} {refusal}"
        f"CREATE TRIGGER {table}_refuses_replace BEFORE INSERT ON {table} WHEN {replaced} {refusal}"
    )


# What brings a catalog from each version to the next one, from version 0: an empty file.
_STEPS = (
    _TABLES
    + _append_only("task_records", "task", "revision")
    + _append_only("catalog_revisions", "revision")
    + _append_only("task_events", "task", "catalog_revision"),
    _CHALLENGERS + _append_only("challengers", "task", "catalog_revision"),
    _FAST_HEADS + _append_only("fast_heads", "catalog_revision"),
)


@dataclass(frozen=True, slots=True)
class Publication:
    """One append: new records, and which task revisions are live from now on (None: retired).

    `challengers` are all of those that there are from now on. `fast_head_sha256` is the head by the
    fast encoder, where the policy has one.
    """

    action: str
    records: tuple[TaskRecord, ...]
    live: Mapping[str, int | None]
    head_sha256: str
    encoder: str
    policy: Policy
    report: Mapping[str, object]
    challengers: tuple[StoredChallenger, ...] = ()
    fast_head_sha256: str | None = None


class CatalogWriter(CatalogReader):
    """A `CatalogReader` that can also append. Creates the catalog where there is none."""

    _mode = "rwc"

    @contextlib.contextmanager
    def appending(self) -> Iterator[None]:
        """Hold the catalog against other writers; readers go on. Committed on leaving.

        What is read inside is what the append is based on: compile the head in here, and two
        registrations at once cannot miss each other.

        Raises:
            CatalogBusyError: another writer holds it for more than two minutes.
            StorageError: the disk is full, or the file cannot be written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                # On some errors, such as a full disk, SQLite has rolled back already.
                if self._connection.in_transaction:
                    with contextlib.suppress(sqlite3.Error):
                        self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise self._unwritable(error) from error

    def append(self, publication: Publication) -> int:
        """Append inside `appending()`; returns the new catalog revision.

        Raises:
            CatalogError: called outside of `appending()`.
        """
        if not self._connection.in_transaction:
            raise CatalogError("append", "no transaction", "call it inside appending()")
        execute = self._connection.execute
        for record in publication.records:
            execute(
                "INSERT INTO task_records VALUES (?, ?, ?, ?)",
                (record.name, record.revision, record.to_json(), record.sha256),
            )
        revision = self.newest_revision() + 1
        execute(
            "INSERT INTO catalog_revisions VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                revision,
                now(),
                publication.action,
                json.dumps(sorted(publication.live)),
                publication.head_sha256,
                publication.encoder,
                json.dumps(asdict(publication.policy), sort_keys=True),
                json.dumps(publication.report, sort_keys=True),
            ),
        )
        for task, live in publication.live.items():
            execute("INSERT INTO task_events VALUES (?, ?, ?)", (task, revision, live))
        for stored in publication.challengers:
            about = stored.challenge
            execute(
                "INSERT INTO challengers VALUES (?, ?, ?, ?, ?)",
                (about.task, revision, about.revision, about.share, stored.head_sha256),
            )
        if publication.fast_head_sha256 is not None:
            execute(
                "INSERT INTO fast_heads VALUES (?, ?)", (revision, publication.fast_head_sha256)
            )
        return revision

    def refuse_existing(self, record: TaskRecord) -> None:
        """Refuse a record whose revision was taken while it was being made.

        Raises:
            TaskExistsError: another registration of this name was faster.
        """
        if self.newest_record(record.name) >= record.revision:
            raise TaskExistsError(
                "task name",
                record.key,
                "another registration of this name finished first; run it again with --revise",
            )

    def _open(self) -> sqlite3.Connection:
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            is_new = not self._file.exists()
            with contextlib.closing(self._connect(self._mode)) as connection:
                _set_up(connection)
                _migrate(connection)
            if is_new:
                sync_folder(self.home)
        except sqlite3.Error as error:
            raise self._unwritable(error) from error
        except OSError as error:
            raise StorageError(
                f"home {self.home}", error.strerror or error, "give a writable folder with --home"
            ) from error
        connection = super()._open()
        _set_up(connection)
        return connection

    def _unwritable(self, error: sqlite3.Error) -> CatalogError | StorageError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return CatalogBusyError(
                f"catalog {self._file}", "locked", "another registration is running; try again"
            )
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY):
            return StorageError(
                f"catalog {self._file}",
                error,
                "free disk space or fix the permissions; nothing was published",
            )
        return self._unreadable(error)


def now() -> str:
    """The time in UTC, to the millisecond, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _set_up(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA busy_timeout = {int(_WAIT_SECONDS * 1000)}")
    # EXTRA: the journal's removal, which is the commit, is on disk too before it is acknowledged.
    connection.execute("PRAGMA synchronous = EXTRA")
    connection.execute("PRAGMA foreign_keys = ON")


def _migrate(connection: sqlite3.Connection) -> None:
    """Numbered steps from `PRAGMA user_version` to SCHEMA_VERSION, each in its own transaction."""
    if schema_version(connection) >= SCHEMA_VERSION:
        return
    connection.execute("PRAGMA journal_mode = DELETE")
    for version, step in enumerate(_STEPS, start=1):
        connection.execute("BEGIN IMMEDIATE")
        # Another process may have made the step while we waited for the lock.
        if schema_version(connection) < version:
            for statement in _statements(step):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {version}")
        connection.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script. (`executescript` would commit the open transaction.)"""
    statement = ""
    for piece in script.split(";"):
        statement += piece + ";"
        if sqlite3.complete_statement(statement) and statement.strip(" \n;"):
            yield statement
            statement = ""
