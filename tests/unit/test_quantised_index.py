"""Rows in bytes against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.index import CentroidIndex
from router.quantised_index import LEAST_ROWS, MOST_QUERIES, QuantisedIndex


def rows_of(rng: np.random.Generator, count: int, width: int, spread: float) -> np.ndarray:
    """Rows whose columns are of very different sizes, biases of the largest."""
    rows = rng.standard_normal((count, width)) * spread ** rng.uniform(-1, 1, width)
    rows[:, -1] *= spread
    return rows.astype(np.float32)


def queries_of(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    queries = rng.standard_normal((count, width)).astype(np.float32)
    queries[:, -1] = 1
    return queries


@settings(max_examples=60)
@given(
    count=st.integers(1, 700),
    width=st.sampled_from([2, 7, 16, 31, 96]),
    queries=st.integers(1, MOST_QUERIES),
    wanted=st.integers(1, 8),
    spread=st.sampled_from([1.0, 10.0, 1000.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_best_rows_are_found_with_their_exact_scores(
    count: int, width: int, queries: int, wanted: int, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, asked = rows_of(rng, count, width, spread), queries_of(rng, queries, width)
    wanted = min(wanted, count)
    found = QuantisedIndex(rows).best(asked, wanted)
    if found is None:
        return
    exact = asked.astype(np.float64) @ rows.astype(np.float64).T
    size = np.abs(exact).max() + 1e-6
    for scores, numbers, expected in zip(*found, exact, strict=True):
        np.testing.assert_allclose(scores, expected[numbers], atol=1e-5 * size, rtol=1e-4)
        best = np.sort(expected)[::-1][:wanted]
        np.testing.assert_allclose(np.sort(expected[numbers])[::-1][:wanted], best)


@pytest.mark.parametrize("width", [33, 385])
def test_few_rows_need_be_scored_where_tasks_lie_apart(width: int) -> None:
    """Else all of this were slower than to look at everything."""
    rng = np.random.default_rng(width)
    rows = rows_of(rng, 2000, width, 3.0)
    rows[:, -1] = -np.vecdot(rows[:, :-1], rows[:, :-1]) / 2  # the best row is the nearest
    index = QuantisedIndex(rows)
    for row in rng.integers(len(rows), size=50).tolist():
        query = rows[row : row + 1] + 0.1 * rows_of(rng, 1, width, 3.0)
        query[:, -1] = 1
        found = index.best(query, 2)
        assert found is not None
        assert found[1].shape[1] < 30
        assert row in found[1][0]


def test_more_equals_than_are_looked_at_are_left_to_another_search() -> None:
    rows = np.ones((LEAST_ROWS, 16), np.float32)
    assert QuantisedIndex(rows).best(np.ones((1, 16), np.float32), 1) is None
    scores, tasks = CentroidIndex(rows, np.arange(len(rows))).search(
        np.ones((1, 16), np.float32), 3
    )
    assert tasks.tolist() == [[0, 1, 2]]
    assert scores.tolist() == [[16, 16, 16]]


def test_many_queries_and_many_wanted_rows_are_left_to_another_search() -> None:
    rows = rows_of(np.random.default_rng(0), 600, 16, 1.0)
    index = QuantisedIndex(rows)
    assert index.best(np.ones((MOST_QUERIES + 1, 16), np.float32), 2) is None
    assert index.best(np.ones((1, 16), np.float32), 500) is None


def test_rows_of_zeros_can_be_indexed() -> None:
    found = QuantisedIndex(np.zeros((20, 5), np.float32)).best(np.ones((1, 5), np.float32), 2)
    assert found is not None
    assert found[0].tolist() == [[0.0] * 20]
