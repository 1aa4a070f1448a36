"""kill -9 of a registering process, and a model of what must be there afterwards.

The history of what was acknowledged is the model: what it holds must be in the catalog, at the
revision and with the digest that were acknowledged, and nothing else but what was in doubt when a
process was killed. (After etcd's robustness tests: an operation in doubt was done, or was not.)
"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from router.artifacts import ArtifactReader
from router.catalog import ARTIFACTS_FOLDER, CATALOG_FILE, CatalogReader
from router.errors import CatalogError
from router.loading import SnapshotLoader, read_statistics
from router.tasks import TaskKey
from tests.catalogs import (
    PlaceEncoder,
    file_digests,
    new_workshop,
    publish,
    served_models,
    texts_of,
)
from tests.forks import ForkServer

# Where a process kills itself while it registers its second task, and how often it passes there.
POINTS = [
    *(("before os: fsync", passage) for passage in range(1, 5)),
    *(("before os: replace", passage) for passage in (1, 2)),
    *(("before os: chmod", passage) for passage in (1, 2)),
    ("before: publish", 1),
    ("before: _task_statistics", 1),
    ("before: _read_head_if_whole", 1),
    ("before: _prune_heads", 1),
    ("before statement: BEGIN", 1),
    ("before statement: SELECT", 4),
    ("before statement: INSERT INTO task_records", 1),
    ("before statement: INSERT INTO catalog_revisions", 1),
    ("before statement: INSERT INTO task_events", 1),
    ("before statement: COMMIT", 1),
    ("half-written catalog: INSERT INTO task_events", 1),
    ("half-written catalog: COMMIT", 1),
]

# A home with many tasks makes every check slower, not better.
_KILLS_OF_A_HOME = 20


@dataclass(slots=True)
class History:
    """Registrations in the order in which they were acknowledged: (name, sha256, revision)."""

    acknowledged: list[tuple[str, str, int]] = field(default_factory=list)
    in_doubt_and_done: int = 0

    def acknowledge(self, name: str, sha256: str, revision: int) -> None:
        """Note what a registering process was told."""
        self.acknowledged.append((name, sha256, revision))

    def check(self, home: Path, *, in_doubt: int = 0) -> int:
        """Everything acknowledged is there and whole, and nothing else but what was in doubt.

        Up to `in_doubt` registrations more may have been published. They stay, and are noted as if
        they had been acknowledged. Returns the newest revision.
        """
        artifacts = ArtifactReader(home / ARTIFACTS_FOLDER)
        with CatalogReader(home) as catalog:
            newest = catalog.newest_revision()
            live = catalog.live(newest)
            for name, sha256, revision in self.acknowledged:
                key = TaskKey(name, 1)
                assert key in live, f"{name} was acknowledged and is lost"
                assert catalog.record(key).sha256 == sha256, f"{name} is not what was acknowledged"
                assert catalog.history(name) == [(revision, 1)], f"{name} is at another revision"
            # Every revision added exactly its task, and every record that is named can be read.
            assert sorted(catalog.task_names()) == [key.name for key in live]
            assert len(live) == newest
            for revision in range(1, newest + 1):
                about = catalog.revision(revision)
                assert catalog.history(about.tasks[0]) == [(revision, 1)]
            for key in live:
                assert len(read_statistics(artifacts, catalog.record(key)).embeddings) == 8
            more = newest - len(self.acknowledged)
            assert 0 <= more <= in_doubt, f"{more} were published that nobody waited for"
            self.in_doubt_and_done += more
            for revision in range(newest - more + 1, newest + 1):
                [name] = catalog.revision(revision).tasks
                self.acknowledge(name, catalog.record(TaskKey(name, 1)).sha256, revision)
            snapshot = SnapshotLoader(home, served_models()).load(catalog, newest, None)
        assert [key.name for key in snapshot.head.tasks] == [key.name for key in live]
        for key in live[-1:]:
            [decision] = snapshot.decide(PlaceEncoder().encode(texts_of(key.name, 1)))
            assert decision.task == key
        return newest


def kill_at_point(folder: Path, forks: ForkServer, point: str, passage: int) -> None:
    """Register a first task, kill the process that registers a second one, check, and go on."""
    home, history = folder / "home", History()
    with new_workshop(home) as workshop:
        old = publish(workshop, "old", texts=texts_of("old", 8))
        history.acknowledge("old", workshop.catalog.record(TaskKey("old", 1)).sha256, old.revision)
    before = file_digests(home)
    fork = forks.start("register_tasks", str(home), "new", 1, point, passage)
    reports = list(fork.reports())
    assert fork.was_killed, f"the process never came to {point}"
    assert reports == []
    newest = history.check(home, in_doubt=1)
    assert newest == 1
    for name, digest in before.items():
        if not name.startswith(CATALOG_FILE):
            assert file_digests(home)[name] == digest
    if newest == 1:
        with CatalogReader(home) as catalog:
            assert catalog.revision(1).head_sha256 in {Path(name).name for name in before}
            assert old.revision == catalog.newest_revision()
    # The next registration works; the very same one too, where it was not published.
    again = "new" if newest == 1 else "newer"
    [report] = forks.call("register_tasks", str(home), again, 1)
    assert report[2] == newest + 1
    history.acknowledge(*report)
    history.check(home)


def kill_at_random(home: Path, forks: ForkServer, kills: int, seed: int) -> History:
    """Kill registering processes at random moments, and check after each; `home` must be empty.

    Returns the history of all homes together.
    """
    rng = random.Random(seed)
    whole, history = History(), History()
    _, elapsed = register_until_killed(forks, home, "measured", History(), None)
    shutil.rmtree(home)
    for number in range(kills):
        if number % _KILLS_OF_A_HOME == _KILLS_OF_A_HOME - 1:
            shutil.rmtree(home)
            _add(whole, history)
            history = History()
        killed, _ = register_until_killed(
            forks, home, f"kill-{number}", history, rng.uniform(0, 2 * elapsed)
        )
        assert killed
        if history.acknowledged or is_made(home):
            history.check(home, in_doubt=1)
    [report] = forks.call("register_tasks", str(home), "last", 1)
    history.acknowledge(*report)
    history.check(home)
    _add(whole, history)
    return whole


def is_made(home: Path) -> bool:
    """Whether the first registration came far enough to make the catalog."""
    with contextlib.suppress(CatalogError):
        CatalogReader(home).close()
        return True
    return False


def register_until_killed(
    forks: ForkServer, home: Path, prefix: str, history: History, moment: float | None
) -> tuple[bool, float]:
    """Register tasks without end and kill the process after `moment` seconds (None: let it be).

    Returns whether it was killed and how long one registration took.
    """
    began = time.monotonic()
    count = 2 if moment is None else 1000
    fork = forks.start("register_tasks", str(home), prefix, count)
    if moment is not None:
        time.sleep(moment)
        fork.kill()
    for report in fork.reports():
        history.acknowledge(*report)
    return fork.was_killed, (time.monotonic() - began) / 2


def _add(whole: History, history: History) -> None:
    whole.acknowledged += history.acknowledged
    whole.in_doubt_and_done += history.in_doubt_and_done
