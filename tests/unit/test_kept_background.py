"""The embeddings of text in general that a home keeps for the next process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router.background import general_texts, measure_background
from router.fitting import Background
from tests.fakes import FakeEncoder
from trainer.kept_background import FOLDER, kept_background


class OtherEncoder(FakeEncoder):
    """Of another fingerprint."""

    fingerprint = "fake-encoder:2"


def _assert_same(one: Background, other: Background) -> None:
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.covariance, other.covariance)


def _files(home: Path) -> list[Path]:
    return sorted(path for path in (home / FOLDER).rglob("*") if path.is_file())


def test_what_is_kept_is_what_was_measured_and_is_measured_once(tmp_path: Path) -> None:
    encoder = FakeEncoder()

    first, second = (kept_background(tmp_path, encoder) for _ in range(2))

    assert encoder.batches == [general_texts()]
    _assert_same(first, measure_background(FakeEncoder()))
    _assert_same(second, first)


def test_another_encoder_gets_a_background_of_its_own(tmp_path: Path) -> None:
    kept_background(tmp_path, FakeEncoder())
    encoder = OtherEncoder()

    kept_background(tmp_path, encoder)

    assert len(encoder.batches) == 1


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"0" * 64, b"../../catalog.sqlite3"])
def test_a_file_that_is_damaged_is_made_anew(tmp_path: Path, content: bytes) -> None:
    kept_background(tmp_path, FakeEncoder())
    for damaged in _files(tmp_path):
        before = {path: path.read_bytes() for path in _files(tmp_path)}
        damaged.write_bytes(content)
        encoder = FakeEncoder()

        found = kept_background(tmp_path, encoder)

        assert len(encoder.batches) == 1
        _assert_same(found, measure_background(FakeEncoder()))
        assert {path: path.read_bytes() for path in _files(tmp_path)} == before


def test_a_home_that_cannot_keep_it_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    encoder = FakeEncoder()

    for _ in range(2):
        _assert_same(kept_background(tmp_path, encoder), measure_background(FakeEncoder()))

    assert len(encoder.batches) == 2
