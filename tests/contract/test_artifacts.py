"""Content-addressed files as reader and writer promise them: whole, once, and what they say."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from router.artifacts import ArtifactReader
from router.catalog import ARTIFACTS_FOLDER, CatalogReader
from router.errors import CorruptArtifactError, StorageError
from router.loading import SnapshotLoader, read_prompt, read_statistics
from router.tasks import Policy, TaskRecord
from tests.catalogs import (
    artifact_file,
    file_digests,
    flip_byte,
    new_record,
    new_workshop,
    publish,
    served_models,
)
from tests.forks import ForkServer
from tests.mounts import (
    SmallDisk,
    can_mount,
    make_read_only,
    make_writable,
    other_user,
    small_files,
    small_tmpfs,
)
from trainer.artifact_writer import ArtifactWriter, write_durably
from trainer.catalog_writer import CatalogWriter, Publication

CONTENT = b"some bytes that matter"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactWriter:
    return ArtifactWriter(tmp_path / "artifacts")


def visible_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


# Writing


def test_a_file_is_named_by_its_digest_and_read_back(artifacts: ArtifactWriter) -> None:
    assert artifacts.write(CONTENT) == DIGEST
    assert artifacts.read(DIGEST) == CONTENT
    assert artifacts.path(DIGEST).name == DIGEST


@settings(max_examples=30)
@given(st.binary(max_size=300))
def test_any_bytes_come_back(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = ArtifactWriter(Path(folder))
        assert ArtifactReader(Path(folder)).read(writer.write(content)) == content


def test_what_is_stored_is_never_written_again(artifacts: ArtifactWriter) -> None:
    artifacts.write(CONTENT)
    path = artifacts.path(DIGEST)
    before = path.stat()
    assert artifacts.write(CONTENT) == DIGEST
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert visible_files(path.parent) == [path]


def test_a_damaged_file_is_replaced_by_the_whole_one_and_not_written_into(
    artifacts: ArtifactWriter,
) -> None:
    artifacts.write(CONTENT)
    path = artifacts.path(DIGEST)
    flip_byte(path)
    with path.open("rb") as mapped_by_a_server:
        artifacts.write(CONTENT)
        assert mapped_by_a_server.read() != CONTENT
    assert artifacts.read(DIGEST) == CONTENT


def test_every_user_may_read_what_is_written(artifacts: ArtifactWriter) -> None:
    artifacts.write(CONTENT)
    assert artifacts.path(DIGEST).stat().st_mode & 0o777 == 0o644


def test_writers_of_the_same_content_at_once_all_succeed(artifacts: ArtifactWriter) -> None:
    together = threading.Barrier(8)

    def write(number: int) -> list[str]:
        together.wait(20)
        return [artifacts.write(bytes([turn])) for turn in range(10)]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(write, range(8)))
    assert all(digests == found[0] for digests in found)
    assert sorted(path.name for path in visible_files(artifacts.path(DIGEST).parent.parent)) == (
        sorted(found[0])
    )


def test_a_reader_sees_a_file_only_when_it_is_whole(artifacts: ArtifactWriter) -> None:
    content = os.urandom(4 << 20)
    digest = hashlib.sha256(content).hexdigest()
    path = artifacts.path(digest)
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                seen.append(path.stat().st_size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    artifacts.write(content)
    done.set()
    watcher.join()
    assert set(seen) <= {len(content)}
    assert artifacts.read(digest) == content


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_durably(target, "not bytes")  # type: ignore[arg-type]
    assert visible_files(tmp_path) == [target]
    assert target.read_bytes() == b"old"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "artifacts"
    blocked.write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=r"artifact folder .*nothing was published"):
        ArtifactWriter(blocked).write(CONTENT)


# Reading what is not as it should be


def test_a_missing_file_is_named_by_its_digest(artifacts: ArtifactWriter) -> None:
    with pytest.raises(
        CorruptArtifactError, match=f"artifact {DIGEST[:12]}: No such file.*restore the file"
    ):
        artifacts.read(DIGEST)


def test_a_file_with_a_flipped_byte_is_refused_wherever_it_flipped(
    artifacts: ArtifactWriter,
) -> None:
    for position in range(len(CONTENT)):
        artifacts.write(CONTENT)
        flip_byte(artifacts.path(DIGEST), position)
        with pytest.raises(CorruptArtifactError, match="has digest"):
            artifacts.read(DIGEST)


@pytest.mark.parametrize("size", [0, 1, len(CONTENT) - 1])
def test_a_truncated_file_is_refused(artifacts: ArtifactWriter, size: int) -> None:
    artifacts.write(CONTENT)
    artifacts.path(DIGEST).write_bytes(CONTENT[:size])
    with pytest.raises(CorruptArtifactError, match="has digest"):
        artifacts.read(DIGEST)


def test_a_file_with_more_behind_it_is_refused(artifacts: ArtifactWriter) -> None:
    artifacts.write(CONTENT)
    artifacts.path(DIGEST).write_bytes(CONTENT + b"\0")
    with pytest.raises(CorruptArtifactError, match="has digest"):
        artifacts.read(DIGEST)


def test_a_file_too_large_for_any_artifact_is_not_even_read(artifacts: ArtifactWriter) -> None:
    artifacts.write(CONTENT)
    with artifacts.path(DIGEST).open("r+b") as file:
        file.truncate((1 << 30) + 1)  # sparse: it takes no space
    with pytest.raises(CorruptArtifactError, match="larger than 1 GiB"):
        artifacts.read(DIGEST)


def test_a_folder_in_the_place_of_a_file_is_refused(artifacts: ArtifactWriter) -> None:
    artifacts.path(DIGEST).mkdir(parents=True)
    with pytest.raises(CorruptArtifactError, match="Is a directory"):
        artifacts.read(DIGEST)


def test_a_matrix_comes_back_as_it_was_written(artifacts: ArtifactWriter) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    digest = artifacts.write_tensors({"values": values.T.copy().T, "other": values[:0]})
    read = artifacts.read_tensor(digest, "values", np.float32, width=4)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values)
    assert artifacts.read_tensor(digest, "other", np.float32).shape == (0, 4)


MATRIX = np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (save({"values": MATRIX})[:-1], "not a safetensors file"),
        (save({"values": MATRIX})[:30], "not a safetensors file"),
        (save({"values": MATRIX}) + b"more", "not a safetensors file"),
        (save({"other": MATRIX}), "no matrix 'values'"),
        (save({}), "no matrix 'values'"),
        (save({"values": MATRIX.astype(np.float64)}), "no matrix 'values'"),
        (save({"values": MATRIX.astype(np.int32)}), "no matrix 'values'"),
        (save({"values": MATRIX[0]}), "no matrix 'values'"),
        (save({"values": MATRIX[None]}), "no matrix 'values'"),
        (save({"values": np.zeros((), np.float32)}), "no matrix 'values'"),
        (save({"values": MATRIX[:, :3].copy()}), "3 columns, not 4"),
        (save({"values": MATRIX * np.nan}), "values not finite"),
        (save({"values": MATRIX * np.inf}), "values not finite"),
        (save_torch({"values": torch.ones(3, 4, dtype=torch.bfloat16)}), "not a safetensors file"),
        (save_torch({"values": torch.ones(3, 4).to(torch.float8_e5m2)}), "not a safetensors file"),
    ],
)
def test_a_file_that_is_not_the_matrix_asked_for_is_refused(
    artifacts: ArtifactWriter, content: bytes, problem: str
) -> None:
    digest = artifacts.write(content)
    with pytest.raises(CorruptArtifactError, match=problem):
        artifacts.read_tensor(digest, "values", np.float32, width=4)


@pytest.mark.parametrize(
    "tensors",
    [
        {"embeddings": np.ones((3, 4), np.int16)},
        {"clusters": np.zeros((3, 1), np.int16)},
        {"embeddings": np.ones((3, 4), np.int16), "clusters": np.zeros((2, 1), np.int16)},
        {"embeddings": np.ones((3, 4), np.int16), "clusters": np.zeros((3, 2), np.int16)},
        {"embeddings": np.ones((3, 4), np.int16), "clusters": np.full((3, 1), -1, np.int16)},
        {"embeddings": np.ones((0, 4), np.int16), "clusters": np.zeros((0, 1), np.int16)},
        {"embeddings": np.ones((3, 4), np.float32), "clusters": np.zeros((3, 1), np.int16)},
    ],
)
def test_rows_that_do_not_fit_together_are_refused_with_the_name_of_the_task(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        digest = workshop.artifacts.write_tensors(tensors)
        record = new_record(workshop, "weather")
        damaged = type(record).from_json(record.to_json().replace(record.embeddings_sha256, digest))
        with pytest.raises(CorruptArtifactError, match="routing rows of weather@1"):
            read_statistics(workshop.artifacts, damaged)


def test_a_prompt_of_another_shape_than_its_record_says_is_refused(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        record = new_record(workshop, "weather", with_prompt=True)
        assert read_prompt(workshop.artifacts, record).shape == (4, 8)
        for said in ('"tokens":5', '"hidden_size":9'):
            name = said.split(":")[0]
            number = 4 if "tokens" in name else 8
            other = type(record).from_json(record.to_json().replace(f"{name}:{number}", said))
            with pytest.raises(CorruptArtifactError):
                read_prompt(workshop.artifacts, other)


def test_a_prompt_is_not_read_as_a_prefix_nor_as_what_is_not_known(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        record = new_record(workshop, "weather", with_prompt=True)
        assert record.prompt is not None
        # The same matrix, were it read as keys and values of two layers.
        prefix = replace(record.prompt, method="prefix", layers=2, hidden_size=2)
        with pytest.raises(CorruptArtifactError, match="prefix_keys_and_values"):
            read_prompt(workshop.artifacts, replace(record, prompt=prefix))
        later = type(record).from_json(
            replace(record, prompt=prefix).to_json().replace('"prefix"', '"suffix"')
        )
        with pytest.raises(CorruptArtifactError, match="upgrade promptyard"):
            read_prompt(workshop.artifacts, later)


# Other users, full disks


def test_another_user_reads_the_files_and_cannot_add_any(
    public_folder: Path, forks: ForkServer
) -> None:
    home = public_folder / "home"
    with new_workshop(home) as workshop:
        publish(workshop, "weather", with_prompt=True)
    if other_user() is None:
        make_read_only(home)
    [seen] = forks.call("read_everything", str(home), user=other_user())
    make_writable(home)
    assert (seen["tasks"], seen["problems"]) == (["weather"], [])


def test_a_file_over_the_limit_of_the_system_fails_cleanly(
    tmp_path: Path, forks: ForkServer
) -> None:
    folder = tmp_path / "artifacts"
    [[kind, message]] = forks.call("write_beyond_the_file_size_limit", str(folder), 4096, 10_000)
    assert kind == "StorageError"
    assert "File too large; free disk space" in message
    assert visible_files(folder) == []


DISKS = {"file size limit": small_files, **({"tmpfs": small_tmpfs} if can_mount() else {})}


@pytest.fixture(params=DISKS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    with DISKS[request.param](tmp_path / "disk") as disk:
        yield disk


def test_a_full_disk_fails_cleanly_and_leaves_nothing_half_written(disk: SmallDisk) -> None:
    artifacts = ArtifactWriter(disk.folder / "artifacts")
    kept = artifacts.write(CONTENT)
    disk.fill()
    for _ in range(3):
        with pytest.raises(StorageError, match=r"free disk space.*nothing was published"):
            artifacts.write(os.urandom(20_000))
    disk.free()
    assert [path.name for path in visible_files(disk.folder)] == [kept]
    assert artifacts.read(artifacts.write(b"x" * 20_000)) == b"x" * 20_000


def test_a_registration_on_a_full_disk_changes_nothing_and_works_when_there_is_space(
    disk: SmallDisk,
) -> None:
    home = disk.folder / "home"
    with new_workshop(home) as workshop:
        publish(workshop, "weather")
        before = file_digests(home)
        disk.fill()
        with pytest.raises(StorageError):
            publish(workshop, "sport", texts=[f"sport {n} {'x' * n}" for n in range(400)])
        disk.free()
        assert file_digests(home) == before
        check_that_it_is_served(home, ["weather"])
        assert publish(workshop, "sport").revision == 2
    check_that_it_is_served(home, ["sport", "weather"])


def test_a_disk_that_is_full_at_the_last_step_changes_nothing_that_is_visible(
    disk: SmallDisk,
) -> None:
    home = disk.folder / "home"
    with new_workshop(home) as workshop:
        publish(workshop, "weather")
        record = new_record(workshop, "sport", description="x" * 100_000)
        catalog = CatalogWriter(home)
        disk.fill()
        with pytest.raises(StorageError, match="nothing was published"):
            workshop.publish("register", records=(record,), live={"sport": 1})
        assert catalog.newest_revision() == 1
        catalog.close()
        disk.free()
        check_that_it_is_served(home, ["weather"])
        # Other rows under the same key: nothing of the failed attempt may be left in memory.
        assert publish(workshop, "sport", texts=["elsewhere 1", "elsewhere 2"]).revision == 2
    with CatalogReader(home) as reader:
        fresh = SnapshotLoader(home, served_models()).load(reader, 2, None)
        for path in (home / "heads").rglob("*"):
            if path.is_file():
                path.unlink()
        compiled = SnapshotLoader(home, served_models()).load(reader, 2, None)
    assert fresh.head.to_bytes() == compiled.head.to_bytes()


@pytest.mark.parametrize("cache_pages", [2, 2000])
def test_a_catalog_that_cannot_grow_says_that_the_disk_is_full(
    disk: SmallDisk, cache_pages: int
) -> None:
    home = disk.folder / "home"
    with new_workshop(home) as workshop:
        publish(workshop, "weather")
        record = new_record(workshop, "sport", description="x" * 300_000)
        workshop.catalog._connection.execute(f"PRAGMA cache_size = {cache_pages}")
        disk.fill()
        with pytest.raises(StorageError, match=r"catalog .*free disk space"):
            append_only(workshop.catalog, record)
        disk.free()
        assert workshop.catalog.newest_revision() == 1
        assert publish(workshop, "sport").revision == 2


def append_only(catalog: CatalogWriter, record: TaskRecord) -> None:
    with catalog.appending():
        catalog.append(
            Publication("register", (record,), {"sport": 1}, "f" * 64, "places:1", Policy(), {})
        )


def check_that_it_is_served(home: Path, names: list[str]) -> None:
    with CatalogReader(home) as reader:
        newest = reader.newest_revision()
        snapshot = SnapshotLoader(home, served_models()).load(reader, newest, None)
        assert sorted(snapshot.tasks) == names
        for key in reader.live(newest):
            record = reader.record(key)
            assert artifact_file(home, record.embeddings_sha256).exists()
            assert len(read_statistics(ArtifactReader(home / ARTIFACTS_FOLDER), record).embeddings)
