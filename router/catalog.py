"""The catalog: an append-only record of tasks in SQLite. This side only reads.

Five tables, all append-only (triggers refuse UPDATE and DELETE):

    task_records       one immutable record per task revision
    catalog_revisions  one row per publish: what was done, and the compiled head
    task_events        which revision of a task is live from a catalog revision on (NULL: retired)
    challengers        the challengers of a catalog revision, each with its compiled head
    fast_heads         the head of a catalog revision by the fast encoder, where the policy has one

What is live at catalog revision R is each task's latest event up to R, so a revision costs one row
per task that changed, not one per task. Challengers are few, and listed anew for every revision,
as each of their heads belongs to one. The journal mode is DELETE: a reader then needs no write
permission, unlike in WAL mode, so that a catalog on a read-only mount can be served.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from router.challengers import Challenge
from router.errors import CatalogError, CorruptArtifactError, TaskNotFoundError
from router.tasks import Policy, TaskKey, TaskRecord

CATALOG_FILE = "catalog.sqlite3"
ARTIFACTS_FOLDER = "artifacts"
HEADS_FOLDER = "heads"
# A catalog that lacks the tables of a later version is read as one that has nothing in them.
_WITH_CHALLENGERS = 2
_WITH_FAST_HEADS = 3
SCHEMA_VERSION = 3

_BUSY_SECONDS = 10.0

_LIVE = """
    SELECT task, task_revision FROM task_events AS event
    WHERE catalog_revision = (
        SELECT max(catalog_revision) FROM task_events
        WHERE task = event.task AND catalog_revision <= :revision
    ) AND task_revision IS NOT NULL
    ORDER BY task
"""


@dataclass(frozen=True, slots=True)
class CatalogRevision:
    """One publish: what was done, the compiled head and what it was made with, and the report."""

    revision: int
    created_at: str
    action: str
    tasks: tuple[str, ...]
    head_sha256: str
    encoder: str
    policy: Policy
    report: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class StoredChallenger:
    """A challenger, and the digest of the head in which it stands in for the current revision."""

    challenge: Challenge
    head_sha256: str


class CatalogReader:
    """Reads a catalog. Safe to use from several threads.

    Raises (on opening, and from every method):
        CatalogError: there is no catalog, it cannot be read, or it is of a newer version.
    """

    _mode = "ro"

    def __init__(self, home: Path) -> None:
        self.home = home
        self._file = home / CATALOG_FILE
        self._lock = threading.Lock()
        self._connection = self._open()

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> CatalogReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def newest_revision(self) -> int:
        """The newest catalog revision; 0 for an empty catalog."""
        with self._reading() as connection:
            row = connection.execute("SELECT max(revision) FROM catalog_revisions").fetchone()
        return int(row[0] or 0)

    def revision(self, revision: int) -> CatalogRevision:
        """The publish that made `revision`."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT revision, created_at, action, tasks, head_sha256, encoder, policy, report"
                " FROM catalog_revisions WHERE revision = ?",
                (revision,),
            ).fetchone()
        if row is None:
            raise CatalogError(
                "catalog revision", revision, f"the newest one is {self.newest_revision()}"
            )
        number, created_at, action, tasks, head, encoder, policy, report = row
        try:
            return CatalogRevision(
                number,
                created_at,
                action,
                tuple(json.loads(tasks)),
                head,
                encoder,
                Policy(**json.loads(policy)),
                json.loads(report),
            )
        except (ValueError, TypeError) as error:
            raise CatalogError(
                f"catalog {self._file}",
                f"revision {revision} is damaged",
                "restore the catalog from a backup",
            ) from error

    def live(self, revision: int) -> list[TaskKey]:
        """The tasks that are live at `revision`, by name."""
        with self._reading() as connection:
            rows = connection.execute(_LIVE, {"revision": revision}).fetchall()
        return [TaskKey(*row) for row in rows]

    def challengers(self, revision: int) -> list[StoredChallenger]:
        """The challengers at `revision`, by task."""
        with self._reading() as connection:
            # Asked every time: a writer may bring the catalog up to date while it is being read.
            if schema_version(connection) < _WITH_CHALLENGERS:
                return []
            rows = connection.execute(
                "SELECT task, task_revision, share, head_sha256 FROM challengers"
                " WHERE catalog_revision = ? ORDER BY task",
                (revision,),
            ).fetchall()
        return [StoredChallenger(Challenge(*about), head) for *about, head in rows]

    def fast_head(self, revision: int) -> str | None:
        """The digest of the head of `revision` by the fast encoder; None where it has none."""
        with self._reading() as connection:
            if schema_version(connection) < _WITH_FAST_HEADS:
                return None
            row = connection.execute(
                "SELECT head_sha256 FROM fast_heads WHERE catalog_revision = ?", (revision,)
            ).fetchone()
        return None if row is None else str(row[0])

    def head_digests(self, first: int, last: int) -> set[str]:
        """The digests of all heads of the revisions from `first` to `last`."""
        tables = [("catalog_revisions", "revision")]
        with self._reading() as connection:
            version = schema_version(connection)
            tables += [("challengers", "catalog_revision")] * (version >= _WITH_CHALLENGERS)
            tables += [("fast_heads", "catalog_revision")] * (version >= _WITH_FAST_HEADS)
            return {
                str(digest)
                for table, column in tables
                for (digest,) in connection.execute(
                    f"SELECT head_sha256 FROM {table}"  # noqa: S608 - our own names
                    f" WHERE {column} BETWEEN ? AND ?",
                    (first, last),
                )
            }

    def record(self, key: TaskKey) -> TaskRecord:
        """The record of a task at one of its revisions.

        Raises:
            TaskNotFoundError: there is none.
            CorruptArtifactError: the row is damaged.
        """
        with self._reading() as connection:
            row = connection.execute(
                "SELECT record, sha256 FROM task_records WHERE task = ? AND revision = ?",
                (key.name, key.revision),
            ).fetchone()
        if row is None:
            raise TaskNotFoundError("task", key, "list the tasks with `promptyard list`")
        # The stored text is canonical: to make it of the record again takes most of the time.
        if hashlib.sha256(row[0].encode()).hexdigest() != row[1]:
            raise CorruptArtifactError(
                f"record of {key}", "does not have its digest", "restore the catalog"
            )
        return TaskRecord.from_json(row[0])

    def newest_record(self, task: str) -> int:
        """The newest revision of a task, live or not; 0 where there is none."""
        with self._reading() as connection:
            row = connection.execute(
                "SELECT max(revision) FROM task_records WHERE task = ?", (task,)
            ).fetchone()
        return int(row[0] or 0)

    def history(self, task: str) -> list[tuple[int, int | None]]:
        """(catalog revision, live task revision or None if retired) of a task, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT catalog_revision, task_revision FROM task_events WHERE task = ?"
                " ORDER BY catalog_revision",
                (task,),
            ).fetchall()
        return [(int(at), live) for at, live in rows]

    def task_names(self) -> list[str]:
        """Every task that was ever registered, by name."""
        with self._reading() as connection:
            rows = connection.execute("SELECT DISTINCT task FROM task_records ORDER BY task")
            return [row[0] for row in rows]

    def _open(self) -> sqlite3.Connection:
        none = CatalogError(
            "home", self.home, "holds no catalog; register a task first, or give --home"
        )
        if not has_catalog(self.home):
            raise none
        with contextlib.ExitStack() as failing:
            try:
                connection = self._connect(self._mode)
                failing.callback(connection.close)
                version = self._version(connection)
            except sqlite3.Error as error:
                raise self._unreadable(error) from error
            if not version:
                raise none
            if version > SCHEMA_VERSION:
                raise CatalogError(
                    "catalog version",
                    version,
                    f"upgrade promptyard: it reads up to {SCHEMA_VERSION}",
                )
            failing.pop_all()
        return connection

    def _version(self, connection: sqlite3.Connection) -> int:
        try:
            return schema_version(connection)
        except sqlite3.Error as error:
            if not self._undo_killed_write(error):
                raise
            return schema_version(connection)

    def _undo_killed_write(self, error: sqlite3.Error) -> bool:
        """Let SQLite put back what a writer that was killed in its commit left half written.

        A connection that only reads may not, and cannot read before it is done. Returns whether
        `error` said so and it is done: the user who serves may not be one who may write.
        """
        if not _is_of_killed_write(error):
            return False
        try:
            with contextlib.closing(self._connect("rw")) as connection:
                schema_version(connection)
        except sqlite3.Error:
            return False
        return True

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self._file.resolve().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                self._undo_killed_write(error)
                raise self._unreadable(error) from error

    def _unreadable(self, error: sqlite3.Error) -> CatalogError:
        if _is_of_killed_write(error):
            remedy = "a writer was killed: run `promptyard list` as a user who may write to it"
        else:
            remedy = "check the file and its permissions, or restore it"
        return CatalogError(f"catalog {self._file}", error, remedy)


def has_catalog(home: Path) -> bool:
    """Whether `home` holds a catalog, one that may be read or not."""
    try:
        # Empty: another process is just making it.
        return (home / CATALOG_FILE).stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def schema_version(connection: sqlite3.Connection) -> int:
    """The version that the catalog's file says it has; 0 for a new file."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _is_of_killed_write(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK
