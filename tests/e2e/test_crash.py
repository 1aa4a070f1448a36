"""kill -9 of a registering process, at every step and at random moments: nothing is lost.

PROMPTYARD_KILLS sets how many random moments there are, for a longer run.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from pathlib import Path

import pytest

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

RANDOM_KILLS = int(os.environ.get("PROMPTYARD_KILLS", "16"))

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

Acknowledged = dict[str, str]


def check_home(home: Path, acknowledged: Acknowledged) -> int:
    """Everything that was acknowledged is there and whole, and nothing is half there."""
    artifacts = ArtifactReader(home / ARTIFACTS_FOLDER)
    with CatalogReader(home) as catalog:
        newest = catalog.newest_revision()
        live = catalog.live(newest)
        for name, sha256 in acknowledged.items():
            assert TaskKey(name, 1) in live, f"{name} was acknowledged and is lost"
            assert catalog.record(TaskKey(name, 1)).sha256 == sha256
        # Every revision added exactly its tasks, and every record that is named can be read.
        assert sorted(catalog.task_names()) == [key.name for key in live]
        assert len(live) == newest
        for revision in range(1, newest + 1):
            about = catalog.revision(revision)
            assert catalog.history(about.tasks[0]) == [(revision, 1)]
        for key in live:
            assert len(read_statistics(artifacts, catalog.record(key)).embeddings) == 8
        snapshot = SnapshotLoader(home, served_models()).load(catalog, newest, None)
    assert [key.name for key in snapshot.head.tasks] == [key.name for key in live]
    for key in live[-1:]:
        [decision] = snapshot.decide(PlaceEncoder().encode(texts_of(key.name, 1)))
        assert decision.task == key
    return newest


@pytest.mark.parametrize(("point", "passage"), POINTS)
def test_a_registration_that_is_killed_at_this_point_is_there_or_not_but_never_half(
    tmp_path: Path, forks: ForkServer, point: str, passage: int
) -> None:
    home = tmp_path / "home"
    with new_workshop(home) as workshop:
        old = publish(workshop, "old", texts=texts_of("old", 8))
        acknowledged = {"old": workshop.catalog.record(TaskKey("old", 1)).sha256}
    before = file_digests(home)
    fork = forks.start("register_tasks", str(home), "new", 1, point, passage)
    reports = list(fork.reports())
    assert fork.was_killed, f"the process never came to {point}"
    assert reports == []
    newest = check_home(home, acknowledged)
    assert newest == (2 if "_prune_heads" in point else 1)
    for name, digest in before.items():
        if not name.startswith(CATALOG_FILE):
            assert file_digests(home)[name] == digest
    if newest == 1:
        with CatalogReader(home) as catalog:
            assert catalog.revision(1).head_sha256 in {Path(name).name for name in before}
            assert old.revision == catalog.newest_revision()
    # The next registration works; the very same one too, where it was not published.
    again = "new" if newest == 1 else "newer"
    [[name, sha256, revision]] = forks.call("register_tasks", str(home), again, 1)
    assert revision == newest + 1
    check_home(home, {**acknowledged, name: sha256})


def test_registrations_that_are_killed_at_random_moments_lose_nothing(
    tmp_path: Path, forks: ForkServer
) -> None:
    rng = random.Random(RANDOM_KILLS)
    home, acknowledged = tmp_path / "home", {}
    _, elapsed = register_until_killed(forks, home, "measured", {}, None)
    shutil.rmtree(home)
    for number in range(RANDOM_KILLS):
        if number % 20 == 19:  # a home with many tasks makes every check slower, not better
            shutil.rmtree(home)
            acknowledged = {}
        killed, _ = register_until_killed(
            forks, home, f"kill-{number}", acknowledged, rng.uniform(0, 2 * elapsed)
        )
        assert killed
        if not acknowledged and not is_made(home):
            continue
        # One may have been published and not yet acknowledged. It stays, like the others.
        assert check_home(home, acknowledged) - len(acknowledged) in (0, 1)
        with CatalogReader(home) as catalog:
            for key in catalog.live(catalog.newest_revision()):
                acknowledged[key.name] = catalog.record(key).sha256
    [[name, sha256, _]] = forks.call("register_tasks", str(home), "last", 1)
    check_home(home, {**acknowledged, name: sha256})


def is_made(home: Path) -> bool:
    """Whether the first registration came far enough to make the catalog."""
    with contextlib.suppress(CatalogError):
        CatalogReader(home).close()
        return True
    return False


def register_until_killed(
    forks: ForkServer,
    home: Path,
    prefix: str,
    acknowledged: Acknowledged,
    moment: float | None,
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
    for name, sha256, _ in fork.reports():
        acknowledged[name] = sha256
    return fork.was_killed, (time.monotonic() - began) / 2
