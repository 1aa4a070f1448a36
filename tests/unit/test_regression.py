"""A regression tells close tasks apart, and is the same function of the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from router.examples import MAX_EXAMPLES
from router.fitting import step_metric
from router.pooled_moments import PooledMoments
from router.regression import PENALTY, fit_regression, regression_rows_per_task
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import TaskKey

DIMENSION = 16


def drawn(tasks: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings `[N, D]` of tasks of unequal spread, for which a shared covariance is wrong."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(1).normal(size=(tasks, DIMENSION))
    spread = np.random.default_rng(2).uniform(0.3, 1.5, size=(tasks, DIMENSION))
    task = np.repeat(np.arange(tasks), rows)
    vectors = centers[task] + spread[task] * rng.normal(size=(len(task), DIMENSION))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), task


def fitted(vectors: np.ndarray, task: np.ndarray, tasks: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a regression, and where it is centred."""
    pool = PooledMoments(DIMENSION)
    pool.update(
        TaskStatistics(
            TaskKey(f"task-{number:03}", 1),
            to_fixed_point(vectors[task == number]),
            np.zeros((task == number).sum(), np.int16),
        )
        for number in range(tasks)
    )
    metric = step_metric(pool.total(), PENALTY)
    center = vectors.mean(0)
    return fit_regression(vectors - center, task, tasks, metric), center


def by_the_book(
    centered: np.ndarray, task: np.ndarray, tasks: int, metric: np.ndarray
) -> tuple[np.ndarray, int]:
    """The rows in float64, of steps that make every product; and how many were taken back."""
    design = np.column_stack([centered, np.ones(len(task))]).astype(np.float64)
    own = np.eye(tasks)[task]
    penalty = PENALTY * np.square(centered).mean()
    rows = ahead = np.zeros((tasks, design.shape[1]))
    momentum, step, last_loss, taken_back = 1.0, 4.0, np.inf, 0
    for _ in range(8):
        likely = np.exp(design @ ahead.T)
        likely /= likely.sum(1, keepdims=True)
        loss = -np.log(likely[own > 0]).mean() + penalty / 2 * np.square(ahead[:, :-1]).sum()
        if loss > last_loss + 1e-6 and step > 1:
            ahead, momentum, step, last_loss = rows, 1.0, step / 2, np.inf
            taken_back += 1
            continue
        gradient = (likely - own).T @ design / len(task)
        gradient[:, :-1] += penalty * ahead[:, :-1]
        gradient[:, :-1] = gradient[:, :-1] @ metric
        gradient[:, -1] *= 2
        moved, following = ahead - step * gradient, (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = moved + (momentum - 1) / following * (moved - rows)
        rows, momentum, last_loss = moved, following, loss
    return rows, taken_back


@pytest.mark.parametrize(("shortened", "taken_back"), [(1.0, 0), (0.3, 1)])
def test_products_that_are_known_without_making_them_are_what_they_would_be(
    shortened: float, taken_back: int
) -> None:
    vectors, task = drawn(6, 40, seed=3)
    vectors, task = vectors[task != 4], task[task != 4]  # a task may be without rows
    # Centred where all rows are, of which these are some.
    centered = vectors - vectors[:150].mean(0)
    bound = np.cov(centered.T) / 2 + PENALTY * np.square(centered).mean() * np.eye(DIMENSION)
    metric = np.linalg.inv(shortened * bound)
    expected, times = by_the_book(centered, task, 6, metric)
    found = fit_regression(centered, task, 6, metric.astype(np.float32))
    assert times == taken_back
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def log_loss(rows: np.ndarray, centered: np.ndarray, task: np.ndarray) -> float:
    scores = centered @ rows[:, :-1].T + rows[:, -1]
    scores = scores - scores.max(1, keepdims=True)
    return float(
        (np.log(np.exp(scores).sum(1)) - np.take_along_axis(scores, task[:, None], 1)[:, 0]).mean()
    )


@pytest.mark.parametrize("tasks", [2, 3, 20])
def test_it_tells_fresh_rows_apart_far_better_than_chance(tasks: int) -> None:
    rows, center = fitted(*drawn(tasks, 60, seed=3), tasks)
    fresh, task = drawn(tasks, 60, seed=4)
    right = ((fresh - center) @ rows[:, :-1].T + rows[:, -1]).argmax(1) == task
    assert right.mean() > 0.8
    assert log_loss(rows, fresh - center, task) < 0.6 * np.log(tasks)


@pytest.mark.parametrize("tasks", [2, 20])
def test_steps_that_are_too_long_are_taken_back(tasks: int) -> None:
    vectors, task = drawn(tasks, 60, seed=3)
    center = vectors.mean(0)
    rows, _ = fitted(vectors, task, tasks)
    # Along directions that the covariance knows nothing of, every step would be too long.
    far = fit_regression(vectors - center, task, tasks, 50 * np.eye(DIMENSION, dtype=np.float32))
    assert np.isfinite(far).all()
    assert log_loss(far, vectors - center, task) < np.log(tasks)
    assert log_loss(rows, vectors - center, task) < np.log(tasks)


def test_the_same_rows_give_the_same_bytes() -> None:
    vectors, task = drawn(5, 30, seed=7)
    assert fitted(vectors, task, 5)[0].tobytes() == fitted(vectors, task, 5)[0].tobytes()


def test_rows_times_tasks_are_bounded_and_one_task_has_nothing_to_be_told_from() -> None:
    assert regression_rows_per_task(0) == regression_rows_per_task(1) == 0
    assert regression_rows_per_task(2) == 256
    for tasks in range(2, 1000):
        rows = regression_rows_per_task(tasks)
        assert rows == 0 or rows >= 4
        assert rows * tasks <= MAX_EXAMPLES
        assert rows * tasks**2 <= 1 << 19
    assert regression_rows_per_task(360) == 4
    assert regression_rows_per_task(370) == 0
