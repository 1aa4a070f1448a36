"""Large heads of nearest means are written in blocks, which they share; here any head is large."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from router.catalog import HEADS_FOLDER, CatalogReader
from router.errors import CorruptArtifactError, StorageError
from router.head import Head
from router.head_files import HeadReader
from router.loading import SnapshotLoader
from router.tasks import TaskKey
from tests.catalogs import (
    SAMPLED_ROWS,
    artifact_file,
    file_digests,
    flip_byte,
    head_file,
    new_workshop,
    pretend_that_catalogs_are_large,
    publish,
    publish_few_rows,
    served_models,
)
from trainer import head_writer
from trainer import workshop as workshop_module
from trainer.artifact_writer import ArtifactWriter
from trainer.workshop import Workshop

NAMES = [f"task-{number}" for number in range(20)]


@pytest.fixture(autouse=True)
def _every_catalog_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_that_catalogs_are_large(monkeypatch)


@pytest.fixture
def workshop(home: Path) -> Iterator[Workshop]:
    with new_workshop(home) as workshop:
        publish_means(workshop, *NAMES)
        yield workshop


publish_means = partial(publish_few_rows, head="nearest-mean")


def heads(home: Path) -> dict[str, str]:
    return dict(file_digests(home / HEADS_FOLDER))


def loaded(home: Path, revision: int) -> Head:
    with CatalogReader(home) as catalog:
        return SnapshotLoader(home, served_models()).load(catalog, revision, None).head


def compiled_anew(home: Path, revision: int, elsewhere: Path) -> bytes:
    """The head of a revision as it is made where no file of any head is left."""
    (home / HEADS_FOLDER).rename(elsewhere)
    head = loaded(home, revision).to_bytes()
    elsewhere.rename(home / HEADS_FOLDER)
    return head


def test_a_head_in_blocks_is_the_head_that_was_compiled(workshop: Workshop, tmp_path: Path) -> None:
    published = publish_means(workshop, "another")
    assert len(heads(workshop.home)) > 6
    assert loaded(workshop.home, 2).to_bytes() == published.head.to_bytes()
    assert compiled_anew(workshop.home, 2, tmp_path / "away") == published.head.to_bytes()


def test_one_more_task_writes_its_own_block_and_the_head_without_rows(workshop: Workshop) -> None:
    for number in range(5):
        before = heads(workshop.home)
        published = publish_means(workshop, f"another-{number}")
        written = [
            workshop.home / HEADS_FOLDER / name
            for name in heads(workshop.home).keys() - before.keys()
        ]
        # A block may have been cut in two.
        assert 2 <= len(written) <= 3
        assert published.head_bytes > sum(path.stat().st_size for path in written)
        assert sum(path.stat().st_size for path in written) < len(published.head.to_bytes())


def test_the_same_tasks_make_the_same_files_in_any_order_of_arrival(tmp_path: Path) -> None:
    found = []
    for seed in range(3):
        home, order = tmp_path / f"home-{seed}", list(NAMES)
        random.Random(seed).shuffle(order)
        with new_workshop(home) as workshop:
            publish_means(workshop, *order[:12])
            for name in order[12:]:
                last = publish_means(workshop, name)
            files = workshop.catalog.head_digests(last.revision, last.revision)
        found.append((files, last.head.to_bytes()))
    assert found[0] == found[1] == found[2]


def test_retiring_a_task_gives_the_files_of_before(workshop: Workshop) -> None:
    before = heads(workshop.home)
    publish_means(workshop, "another")
    published = workshop.publish("retire", live={"another": None})
    assert workshop.catalog.head_digests(3, 3) == workshop.catalog.head_digests(1, 1)
    for name, digest in before.items():
        assert heads(workshop.home)[name] == digest
    assert loaded(workshop.home, 3).to_bytes() == published.head.to_bytes()


def test_a_new_process_publishes_the_same_head_as_one_that_knows_all_tasks(home: Path) -> None:
    found = []
    for fresh in (False, True):
        folder = home / str(fresh)
        workshop = new_workshop(folder)
        publish_means(workshop, *NAMES)
        for name in ("another", "and-another"):
            if fresh:
                workshop.close()
                workshop = new_workshop(folder)
            published = publish_means(workshop, name)
        workshop.close()
        found.append((published.head.to_bytes(), published.report, published.changed_decisions))
        assert loaded(folder, 3).to_bytes() == published.head.to_bytes()
    assert found[0] == found[1]


def test_a_new_process_reads_the_rows_of_the_sample_and_no_others(home: Path) -> None:
    with new_workshop(home) as workshop:
        publish_means(workshop, *NAMES)
    with new_workshop(home) as workshop:
        read: list[str] = []
        workshop.artifacts.read = lambda sha256: read.append(sha256) or b""  # type: ignore
        with pytest.raises(CorruptArtifactError):  # the first one of the sample
            publish_means(workshop, "another")
        assert len(read) == 1
    with new_workshop(home) as workshop:
        whole = workshop.artifacts.read
        workshop.artifacts.read = lambda sha256: (read.append(sha256), whole(sha256))[1]  # type: ignore
        read.clear()
        publish_means(workshop, "another")
        assert SAMPLED_ROWS <= len(read) <= SAMPLED_ROWS + 1


def test_damaged_rows_of_a_task_that_is_not_looked_at_do_not_hinder_a_publish(
    workshop: Workshop,
) -> None:
    home = workshop.home
    workshop.close()
    refused = {}
    for name in NAMES:
        with new_workshop(home) as other:
            rows = artifact_file(home, other.catalog.record(TaskKey(name, 1)).embeddings_sha256)
            whole = rows.read_bytes()
            flip_byte(rows)
            try:
                published = publish_means(other, f"beside-{name}")
            except CorruptArtifactError as error:
                refused[name] = str(error)
                # It can be retired all the same.
                other.publish("retire", live={name: None})
            else:
                assert TaskKey(name, 1) in published.head.tasks
            rows.write_bytes(whole)
    assert 0 < len(refused) < len(NAMES)
    assert all(f"routing rows of {name}@1" in said for name, said in refused.items())


def block_files(home: Path, revision: int) -> list[Path]:
    with CatalogReader(home) as catalog:
        heads_of_old = {
            head_file(home, digest)
            for number in range(1, catalog.newest_revision() + 1)
            for digest in catalog.head_digests(number, number)
        }
    return [
        path
        for path in sorted((home / HEADS_FOLDER).rglob("*"))
        if path.is_file() and path not in heads_of_old
    ]


@pytest.mark.parametrize("damage", [flip_byte, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_head_with_a_damaged_block_is_compiled_anew_and_written_whole_by_the_next_publish(
    workshop: Workshop, damage: object
) -> None:
    expected = workshop.newest_head().to_bytes()
    workshop.close()
    for path in block_files(workshop.home, 1):
        damage(path)  # type: ignore[operator]
    [digest] = CatalogReader(workshop.home).head_digests(1, 1)
    with pytest.raises(CorruptArtifactError):
        HeadReader(workshop.home / HEADS_FOLDER).read(digest)
    assert loaded(workshop.home, 1).to_bytes() == expected
    with new_workshop(workshop.home) as other:
        published = publish_means(other, "another")
        [digest] = other.catalog.head_digests(2, 2)
    read = HeadReader(workshop.home / HEADS_FOLDER).read(digest)
    assert read.to_bytes() == published.head.to_bytes()


def test_a_block_that_is_gone_is_written_again_by_a_process_that_knows_it(
    workshop: Workshop,
) -> None:
    for path in block_files(workshop.home, 1):
        path.unlink()
    published = publish_means(workshop, "another")
    [digest] = workshop.catalog.head_digests(2, 2)
    read = HeadReader(workshop.home / HEADS_FOLDER).read(digest)
    assert read.to_bytes() == published.head.to_bytes()


def test_a_large_head_that_was_written_as_one_file_is_read_and_followed_by_one_in_blocks(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_workshop(home) as workshop:
        with monkeypatch.context() as patch:
            patch.setattr(head_writer, "LEAST_TASKS", 1000)
            published = publish_means(workshop, *NAMES)
            assert len(heads(home)) == 1
        assert loaded(home, 1).to_bytes() == published.head.to_bytes()
        publish_means(workshop, "another")
        assert len(heads(home)) > 4


def test_blocks_go_with_the_last_head_that_has_them(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workshop_module, "_KEPT_HEADS", 3)
    found = {1: workshop.newest_head().to_bytes()}
    for number in range(8):
        published = publish_means(workshop, f"another-{number}")
        found[published.revision] = published.head.to_bytes()
    newest = workshop.catalog.newest_revision()
    reader = HeadReader(workshop.home / HEADS_FOLDER)
    needed = set()
    for revision in range(newest - 2, newest + 1):
        [digest] = workshop.catalog.head_digests(revision, revision)
        assert reader.read(digest).to_bytes() == found[revision]
        needed |= {digest, *workshop._heads._blocks(digest)}
    assert {Path(name).name for name in heads(workshop.home)} == needed
    for revision, expected in found.items():
        assert loaded(workshop.home, revision).to_bytes() == expected


def test_other_heads_are_one_file_however_large(home: Path) -> None:
    with new_workshop(home) as workshop:
        publish(workshop, *NAMES)
        assert len(heads(home)) == 1


def test_blocks_of_different_widths_make_no_head(tmp_path: Path, workshop: Workshop) -> None:
    files = ArtifactWriter(tmp_path / "heads")
    head = workshop.newest_head()
    odd = [files.write_tensors({"rows": np.zeros((1, width), np.float32)}) for width in (3, 4)]
    digest = files.write(*head.to_file(odd))
    with pytest.raises(CorruptArtifactError, match="compiled head"):
        HeadReader(tmp_path / "heads").read(digest)


@pytest.mark.parametrize("passage", range(4))
def test_a_publish_that_fails_at_any_of_its_files_leaves_the_head_of_before(
    workshop: Workshop, passage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = workshop.newest_head().to_bytes()
    replace, passed = os.replace, 0

    def failing(source: str, target: Path) -> None:
        nonlocal passed
        passed += 1
        if passed == passage + 1:
            raise OSError(errno.ENOSPC, "no space left")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        # The rows, a block or two, the head.
        with pytest.raises(StorageError) if passage < 3 else contextlib.nullcontext():
            publish_means(workshop, "another")
    newest = workshop.catalog.newest_revision()
    if newest == 1:
        assert loaded(workshop.home, 1).to_bytes() == before
        published = publish_means(workshop, "another")
        assert loaded(workshop.home, 2).to_bytes() == published.head.to_bytes()
    with new_workshop(workshop.home) as other:
        again = publish_means(other, "and-another")
        assert loaded(other.home, again.revision).to_bytes() == again.head.to_bytes()
