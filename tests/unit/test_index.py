"""The index against brute force."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.index import CentroidIndex

WIDTH = 7
# From some queries on faiss computes in blocks, from 100 results on it keeps them in another way.
BATCHES = [1, 3, 19, 20, 64]


def brute_force(
    rows: np.ndarray, row_task: np.ndarray, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    tasks = np.unique(row_task)
    best = np.stack([scores[:, row_task == task].max(1) for task in tasks], axis=1)
    order = np.lexsort((np.broadcast_to(tasks, best.shape), -best))[:, :k]
    return np.take_along_axis(best, order, 1), tasks[order]


def random_rows(
    rng: np.random.Generator, counts: list[int], *, integers: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    row_task = np.repeat(np.arange(len(counts)), counts)
    shape = (len(row_task), WIDTH)
    # Small integers are exact in float32, and equal scores are common.
    rows = rng.integers(-2, 3, shape) if integers else rng.normal(size=shape)
    return rows.astype(np.float32), row_task


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    batch=st.sampled_from(BATCHES),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_the_best_tasks_are_those_of_brute_force(
    counts: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    rows, row_task = random_rows(rng, counts)
    queries = rng.normal(size=(batch, WIDTH)).astype(np.float32)
    k = data.draw(st.integers(1, len(counts)))
    scores, tasks = CentroidIndex(rows, row_task).search(queries, k)
    expected, expected_tasks = brute_force(rows, row_task, queries, k)
    assert scores.shape == tasks.shape == (batch, k)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    # Of scores that differ by rounding alone either may come first.
    gaps = np.abs(np.diff(expected, axis=1, append=-np.inf))
    clear = (gaps > 1e-4) & (np.roll(gaps, 1, axis=1) > 1e-4)
    np.testing.assert_array_equal(
        tasks[:, :-1][clear[:, :-1]], expected_tasks[:, :-1][clear[:, :-1]]
    )


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    batch=st.sampled_from(BATCHES),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_equal_scores_are_ordered_by_task_number(
    counts: list[int], batch: int, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    rows, row_task = random_rows(rng, counts, integers=True)
    queries = rng.integers(-2, 3, (batch, WIDTH)).astype(np.float32)
    k = data.draw(st.integers(1, len(counts)))
    scores, tasks = CentroidIndex(rows, row_task).search(queries, k)
    expected, expected_tasks = brute_force(rows, row_task, queries, k)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(tasks, expected_tasks)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("rows_per_task", [1, 3, 5])  # the last: enough rows to be kept in bytes
@pytest.mark.parametrize("k", [1, 2, 99, 100, 101, 149, 150])
def test_many_tasks_and_many_candidates_agree_with_brute_force(
    batch: int, rows_per_task: int, k: int
) -> None:
    rng = np.random.default_rng(k)
    rows, row_task = random_rows(rng, [rows_per_task] * 150, integers=True)
    queries = rng.integers(-2, 3, (batch, WIDTH)).astype(np.float32)
    scores, tasks = CentroidIndex(rows, row_task).search(queries, k)
    expected, expected_tasks = brute_force(rows, row_task, queries, k)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(tasks, expected_tasks)


def test_a_task_whose_rows_crowd_out_the_others_counts_once() -> None:
    rows = np.array([[10], [9], [8], [7], [1], [0]], np.float32)
    row_task = np.array([0, 0, 0, 0, 1, 2])
    scores, tasks = CentroidIndex(rows, row_task).search(np.ones((1, 1), np.float32), 3)
    assert tasks.tolist() == [[0, 1, 2]]
    assert scores.tolist() == [[10, 1, 0]]


def test_one_task_with_one_row_is_found() -> None:
    index = CentroidIndex(np.ones((1, WIDTH), np.float32), np.zeros(1, np.int64))
    scores, tasks = index.search(np.ones((2, WIDTH), np.float32), 1)
    assert tasks.tolist() == [[0], [0]]
    assert scores.tolist() == [[WIDTH], [WIDTH]]


def test_an_index_without_rows_can_be_built() -> None:
    CentroidIndex(np.zeros((0, WIDTH), np.float32), np.zeros(0, np.int64))


def test_searches_at_once_give_what_they_give_alone() -> None:
    rng = np.random.default_rng(0)
    rows, row_task = random_rows(rng, [2] * 50)
    index = CentroidIndex(rows, row_task)
    queries = [rng.normal(size=(3, WIDTH)).astype(np.float32) for _ in range(64)]
    alone = [index.search(query, 5) for query in queries]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda query: index.search(query, 5), queries))
    for (scores, tasks), (expected, expected_tasks) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(scores, expected)
        np.testing.assert_array_equal(tasks, expected_tasks)


def test_the_rows_it_was_built_from_are_not_changed() -> None:
    rng = np.random.default_rng(0)
    rows, row_task = random_rows(rng, [2] * 5)
    before = rows.tobytes()
    index = CentroidIndex(rows, row_task)
    index.search(rows, 5)
    assert rows.tobytes() == before


@pytest.mark.parametrize("clusters", [2, 20])
def test_tasks_of_few_and_of_many_clusters_score_as_their_best_row(clusters: int) -> None:
    """However many hits must be looked at for the best tasks to be among them."""
    rng = np.random.default_rng(clusters)
    tasks, k = 12, 5
    rows = rng.standard_normal((tasks * clusters, 8)).astype(np.float32)
    row_task = np.repeat(np.arange(tasks), clusters)
    queries = rng.standard_normal((7, 8)).astype(np.float32)
    best = (queries @ rows.T).reshape(len(queries), tasks, clusters).max(2)

    index = CentroidIndex(rows, row_task)
    scores, found = index.search(queries, k)
    none, of_none = index.search(queries[:0], k)

    np.testing.assert_array_equal(found, np.argsort(-best, axis=1)[:, :k])
    np.testing.assert_allclose(scores, -np.sort(-best, axis=1)[:, :k], rtol=1e-5)
    assert none.shape == of_none.shape == (0, k)
