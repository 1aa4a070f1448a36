"""Rows that come and go in kept memory are those that inserting and deleting copies would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import ordered_rows
from router.ordered_rows import OrderedRows


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), piece=st.integers(1, 5))
def test_rows_are_where_copies_would_have_them(seed: int, piece: int) -> None:
    rng = np.random.default_rng(seed)
    found, expected = OrderedRows(2), np.zeros((0, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordered_rows, "_PIECE_ROWS", piece)
        for _ in range(6):
            count = len(expected)
            if rng.random() < 0.5:
                places = np.sort(rng.integers(0, count + 1, size=rng.integers(0, 9)))
                rows = rng.normal(size=(len(places), 2))
                found.insert(places.tolist(), rows)
                expected = np.insert(expected, places, rows, axis=0)
            else:
                places = np.flatnonzero(rng.random(count) < rng.random())
                found.remove(places.tolist())
                expected = np.delete(expected, places, axis=0)
            np.testing.assert_array_equal(found.rows, expected)


def test_rows_cannot_be_written_to() -> None:
    rows = OrderedRows(1)
    rows.insert([0], np.ones((1, 1)))
    with pytest.raises(ValueError, match="read-only"):
        rows.rows[0] = 2
