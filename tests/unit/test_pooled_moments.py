"""Exact sums: whatever comes, in whatever order, the same bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from router import pooled_moments
from router.pooled_moments import PooledMoments
from router.statistics import FIXED_POINT, FOLDS, Moments, TaskStatistics, to_fixed_point
from router.tasks import TaskKey

DIMENSION = 3
LARGEST = np.iinfo(np.int16).max

Rows = arrays(
    np.int16,
    st.tuples(st.integers(1, 23), st.just(DIMENSION)),
    elements=st.integers(-LARGEST, LARGEST),
)


@st.composite
def task_sets(draw: st.DrawFn) -> list[TaskStatistics]:
    """Up to five tasks, each with rows in up to three clusters."""
    tasks = []
    for number in range(draw(st.integers(1, 5))):
        rows = draw(Rows)
        wanted = draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows)))
        clusters = np.unique(wanted, return_inverse=True)[1].astype(np.int16)
        tasks.append(TaskStatistics(TaskKey(f"task-{number}", 1), rows, clusters))
    return tasks


def pooled(tasks: Sequence[TaskStatistics]) -> PooledMoments:
    pool = PooledMoments(DIMENSION)
    pool.update(tasks)
    return pool


def bits(pool: PooledMoments) -> list[bytes]:
    return [
        np.ascontiguousarray(part).tobytes()
        for moments in (*pool.by_fold(), pool.total())
        for part in (moments.counts, moments.sums, moments.task_of, moments.gram)
    ]


def naive(tasks: Sequence[TaskStatistics], fold: int | None = None) -> Moments:
    """The sums in Python's integers."""
    counts, sums, task_of = [], [], []
    gram = [[0] * DIMENSION for _ in range(DIMENSION)]
    for number, task in enumerate(tasks):
        for cluster in range(int(task.clusters.max()) + 1):
            rows = [
                [int(value) for value in row]
                for place, row in enumerate(task.embeddings)
                if task.clusters[place] == cluster and fold in (None, place % FOLDS)
            ]
            counts.append(len(rows))
            sums.append([sum(row[i] for row in rows) for i in range(DIMENSION)])
            task_of.append(number)
            for row in rows:
                for i in range(DIMENSION):
                    for j in range(DIMENSION):
                        gram[i][j] += row[i] * row[j]
    return Moments(
        np.array(counts, float), np.array(sums, float), np.array(task_of), np.array(gram, float)
    )


def assert_equal(found: Moments, expected: Moments) -> None:
    np.testing.assert_array_equal(found.counts, expected.counts)
    np.testing.assert_array_equal(found.sums, expected.sums)
    np.testing.assert_array_equal(found.task_of, expected.task_of)
    np.testing.assert_array_equal(found.gram, expected.gram)


@settings(max_examples=30)
@given(arrays(np.float32, (4, 5), elements=st.floats(-1, 1, width=32)))
def test_fixed_point_loses_at_most_half_a_step(vectors: np.ndarray) -> None:
    fixed = to_fixed_point(vectors)
    assert fixed.dtype == np.int16
    error = np.abs(fixed / FIXED_POINT - vectors)
    # A whole step only at 1.0 itself, which int16 does not reach.
    assert (error <= np.where(np.abs(vectors) > 0.9999, 1.0, 0.5) / FIXED_POINT).all()


def test_vectors_are_the_embeddings_in_float32() -> None:
    rows = np.array([[0, 1, -LARGEST]], np.int16)
    task = TaskStatistics(TaskKey("a", 1), rows, np.zeros(1, np.int16))
    assert task.vectors.dtype == np.float32
    np.testing.assert_array_equal(task.vectors, rows / np.float32(FIXED_POINT))


def test_rows_go_to_the_folds_in_turn() -> None:
    count = FOLDS + 2
    rows = np.zeros((count, DIMENSION), np.int16)
    task = TaskStatistics(TaskKey("a", 1), rows, np.zeros(count, np.int16))
    assert task.folds.tolist() == [*range(FOLDS), 0, 1]


@settings(max_examples=30)
@given(task_sets())
def test_sums_are_exact(tasks: list[TaskStatistics]) -> None:
    pool = pooled(tasks)
    assert_equal(pool.total(), naive(tasks))
    for fold, moments in enumerate(pool.by_fold()):
        assert_equal(moments, naive(tasks, fold))


@settings(max_examples=30)
@given(task_sets())
def test_the_whole_without_a_fold_is_the_sum_of_the_other_folds(
    tasks: list[TaskStatistics],
) -> None:
    pool = pooled(tasks)
    folds = pool.by_fold()
    for left_out in range(FOLDS):
        rest = pool.total().without(folds[left_out])
        others = [fold for number, fold in enumerate(folds) if number != left_out]
        counts = np.sum([fold.counts for fold in others], axis=0)
        kept = counts > 0
        np.testing.assert_array_equal(rest.counts, counts[kept])
        np.testing.assert_array_equal(
            rest.sums, np.sum([fold.sums for fold in others], axis=0)[kept]
        )
        np.testing.assert_array_equal(rest.task_of, others[0].task_of[kept])
        np.testing.assert_array_equal(rest.gram, np.sum([f.gram for f in others], axis=0))


@settings(max_examples=30)
@given(task_sets(), st.data())
def test_tasks_that_come_and_go_in_any_order_leave_the_bits_of_those_that_stayed(
    tasks: list[TaskStatistics], data: st.DataObject
) -> None:
    pool = PooledMoments(DIMENSION)
    for _ in range(data.draw(st.integers(1, 6))):
        pool.update(data.draw(st.permutations(tasks))[: data.draw(st.integers(0, len(tasks)))])
    stayed = data.draw(st.permutations(tasks))[: data.draw(st.integers(1, len(tasks)))]
    pool.update(stayed)
    assert pool.tasks == sorted(stayed, key=lambda task: task.key)
    assert bits(pool) == bits(pooled(stayed))


@settings(max_examples=30)
@given(task_sets())
def test_a_pool_that_lost_every_task_is_as_new(tasks: list[TaskStatistics]) -> None:
    pool = pooled(tasks)
    pool.update([])
    assert pool.tasks == []
    pool.update(tasks[:1])
    assert bits(pool) == bits(pooled(tasks[:1]))


@pytest.mark.parametrize("rows", [8192, 8193])
def test_sums_stay_exact_for_many_rows_at_the_largest_values(rows: int) -> None:
    embeddings = np.full((rows, DIMENSION), LARGEST, np.int16)
    embeddings[::2, 1] = -LARGEST
    embeddings[:, 2] = np.arange(rows) % 101
    tasks = [
        TaskStatistics(TaskKey(f"task-{number}", 1), embeddings, np.zeros(rows, np.int16))
        for number in range(4)
    ]
    exact = 4 * embeddings.astype(np.int64).T @ embeddings.astype(np.int64)
    total = pooled(tasks).total()
    assert exact.max() > 2**44
    np.testing.assert_array_equal(total.gram.astype(np.int64), exact)
    np.testing.assert_array_equal(total.sums.astype(np.int64)[0], embeddings.sum(0, np.int64))


def test_second_moments_are_summed_when_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    summed: list[int] = []

    def counting(rows: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        summed.append(len(rows))
        return in_chunks(rows)

    in_chunks = pooled_moments._in_chunks
    monkeypatch.setattr(pooled_moments, "_in_chunks", counting)
    rng = np.random.default_rng(3)
    first, second, third = (
        TaskStatistics(TaskKey(name, 1), rows_of(rng, 7), np.zeros(7, np.int16)) for name in "abc"
    )
    pool = pooled([first, second])
    pool.update([second, third])
    found = pool.first_moments()
    assert sum(summed) == found.gram.size == 0
    assert_equal(pool.total(), naive([second, third]))
    np.testing.assert_array_equal(found.sums, pool.total().sums)
    assert sum(summed) == 2 * FOLDS


def rows_of(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(-99, 99, size=(count, DIMENSION)).astype(np.int16)


def test_a_revision_of_a_task_is_another_task() -> None:
    old = TaskStatistics(
        TaskKey("a", 1), np.full((3, DIMENSION), 5, np.int16), np.zeros(3, np.int16)
    )
    new = TaskStatistics(
        TaskKey("a", 2), np.full((2, DIMENSION), 7, np.int16), np.zeros(2, np.int16)
    )
    pool = pooled([old])
    pool.update([new])
    assert bits(pool) == bits(pooled([new]))


def test_a_key_that_went_and_comes_with_other_rows_has_the_sums_of_those() -> None:
    key, clusters = TaskKey("a", 1), np.zeros(6, np.int16)
    first = TaskStatistics(key, np.full((6, DIMENSION), 5, np.int16), clusters)
    second = TaskStatistics(key, np.full((6, DIMENSION), 9, np.int16), clusters)
    pool = pooled([first])
    bits(pool)
    pool.update([])
    pool.update([second])
    assert bits(pool) == bits(pooled([second]))
