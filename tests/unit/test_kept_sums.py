"""A new process takes over the sums of a large catalog; here catalogs of any size are large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from router.catalog import HEADS_FOLDER, CatalogReader
from router.loading import SnapshotLoader
from tests.catalogs import (
    SAMPLED_ROWS,
    file_digests,
    flip_byte,
    new_record,
    new_workshop,
    pretend_that_catalogs_are_large,
    publish_few_rows,
    served_models,
    texts_of,
)
from trainer.commands import PolicyChange
from trainer.kept_sums import FOLDER
from trainer.register import store_rows
from trainer.workshop import Workshop

NAMES = [f"task-{number}" for number in range(20)]


@pytest.fixture(autouse=True)
def _every_catalog_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_that_catalogs_are_large(monkeypatch)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    home = tmp_path / "home"
    with new_workshop(home) as workshop:
        publish_lda(workshop, *NAMES)
    yield home
    check_that_the_newest_head_is_that_of_the_records(home)


publish_lda = partial(publish_few_rows, head="lda")


def check_that_the_newest_head_is_that_of_the_records(home: Path) -> None:
    with CatalogReader(home) as catalog:
        loader, newest = SnapshotLoader(home, served_models()), catalog.newest_revision()
        published = loader.load(catalog, newest, None).head.to_bytes()
        (home / HEADS_FOLDER).rename(home / "away")
        assert loader.load(catalog, newest, None).head.to_bytes() == published
        (home / "away").rename(home / HEADS_FOLDER)


def files_read(workshop: Workshop) -> list[str]:
    """The digests of the artifacts that the workshop reads from now on."""
    read: list[str] = []
    whole = workshop.artifacts.read

    def reading(sha256: str) -> bytes:
        read.append(sha256)
        return whole(sha256)

    workshop.artifacts.read = reading  # type: ignore[method-assign]
    return read


def test_a_new_process_reads_the_rows_of_the_sample_and_of_its_own_task_alone(home: Path) -> None:
    for number in range(3):
        with new_workshop(home) as workshop:
            read = files_read(workshop)
            publish_lda(workshop, f"another-{number}")
            assert SAMPLED_ROWS <= len(read) <= SAMPLED_ROWS + 1


def test_a_process_that_knows_all_tasks_keeps_the_same_sums(home: Path, tmp_path: Path) -> None:
    with new_workshop(home) as workshop:
        publish_lda(workshop, "another")
    with new_workshop(tmp_path / "other") as workshop:
        publish_lda(workshop, *NAMES)
        publish_lda(workshop, "another")
    assert file_digests(home / FOLDER) == file_digests(tmp_path / "other" / FOLDER)


def test_one_more_task_writes_its_own_block_the_second_moments_and_the_index(home: Path) -> None:
    with new_workshop(home) as workshop:
        publish_lda(workshop, "one-more")
        for number in range(4):
            before = file_digests(home / FOLDER)
            publish_lda(workshop, f"another-{number}")
            written = file_digests(home / FOLDER).keys() - before.keys()
            assert 3 <= len(written) <= 4


def test_a_task_that_goes_is_taken_out_of_the_sums(home: Path) -> None:
    before = file_digests(home / FOLDER)
    with new_workshop(home) as workshop:
        publish_lda(workshop, "another")
    with new_workshop(home) as workshop:
        workshop.publish("retire", live={"another": None})
    assert file_digests(home / FOLDER) == before


@pytest.mark.parametrize("damage", [flip_byte, Path.unlink, lambda path: path.write_bytes(b"")])
def test_whatever_is_damaged_the_rows_are_read_instead(home: Path, damage: object) -> None:
    kept = sorted(file_digests(home / FOLDER))
    for number, name in enumerate(kept):
        if not (home / FOLDER / name).exists():
            continue  # the newest sums have other blocks
        damage(home / FOLDER / name)  # type: ignore[operator]
        with new_workshop(home) as workshop:
            read = files_read(workshop)
            publish_lda(workshop, f"another-{number}")
            assert len(read) >= len(NAMES)
        check_that_the_newest_head_is_that_of_the_records(home)
        with new_workshop(home) as workshop:
            read = files_read(workshop)
            publish_lda(workshop, f"and-another-{number}")
            assert len(read) <= SAMPLED_ROWS + 1


def test_sums_of_other_rows_under_the_same_key_are_not_used(home: Path, tmp_path: Path) -> None:
    with new_workshop(tmp_path / "other") as workshop:
        records = [new_record(workshop, name, texts=texts_of(f"else-{name}", 6)) for name in NAMES]
        workshop.publish(
            "register",
            records=tuple(records),
            live=dict.fromkeys(NAMES, 1),
            change=PolicyChange(head="lda"),
        )
    (home / FOLDER).rename(tmp_path / "away")
    (tmp_path / "other" / FOLDER).rename(home / FOLDER)
    with new_workshop(home) as workshop:
        read = files_read(workshop)
        publish_lda(workshop, "another")
        assert len(read) >= len(NAMES)


def test_sums_that_cannot_be_kept_do_not_make_a_publish_fail(home: Path) -> None:
    newest = home / FOLDER / "newest"
    newest.unlink()
    newest.mkdir()
    with new_workshop(home) as workshop:
        assert publish_lda(workshop, "another").revision == 2


def test_a_task_that_keeps_statistics_only_is_in_no_kept_sums(home: Path) -> None:
    before = file_digests(home / FOLDER)
    with new_workshop(home) as workshop:
        texts = texts_of("sums", 6)
        record = replace(
            new_record(workshop, "sums", texts=texts),
            embeddings_sha256=store_rows(
                workshop, workshop.encoder.encode(texts).vectors, statistics_only=True
            ),
            statistics_only=True,
        )
        workshop.publish("register", records=(record,), live={"sums": 1})
    assert file_digests(home / FOLDER) == before
    with new_workshop(home) as workshop:
        publish_lda(workshop, "another")
