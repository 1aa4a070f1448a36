"""The fits against plain float64 formulas over the rows themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fitting import (
    _PRIOR_ROWS,
    Background,
    Fit,
    Term,
    combine,
    fit_nearest_mean,
    lda_fitter,
    offset_scores,
    row_scores,
)
from router.pooled_moments import PooledMoments
from router.statistics import FIXED_POINT, Moments, TaskStatistics
from router.tasks import TaskKey
from tests.catalogs import random_task

DIMENSION = 6


def moments_of(tasks: Sequence[TaskStatistics]) -> Moments:
    pool = PooledMoments(DIMENSION)
    pool.update(tasks)
    return pool.total()


def a_background(rng: np.random.Generator) -> Background:
    sample = rng.normal(size=(40, DIMENSION)) / 4
    return Background(sample.mean(0), np.cov(sample.T))


def vectors_of(task: TaskStatistics) -> np.ndarray:
    return task.embeddings.astype(np.float64) / FIXED_POINT


def scores_of_term(term: Term, fit: Fit, points: np.ndarray) -> np.ndarray:
    """`[B, M]`, as the docstring of `Term` says, in float64."""
    centered = points - fit.center
    scores = centered @ term.rows[:, :-1].T + term.rows[:, -1]
    if term.offset is not None:
        scores = scores - np.einsum("bd,de,be->b", centered, term.offset, centered)[:, None]
    return np.asarray(scores)


def naive_lda(
    tasks: Sequence[TaskStatistics], background: Background, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both likelihood ratios and the cosine of every cluster, `[B, M]` each, from the rows."""
    rows = np.concatenate([vectors_of(task) for task in tasks])
    count, mean = len(rows), rows.mean(0)
    task_means = [vectors_of(task).mean(0) for task in tasks]
    around = np.concatenate(
        [vectors_of(task) - center for task, center in zip(tasks, task_means, strict=True)]
    )
    within = around.T @ around / max(count - len(tasks), 1)
    general = (rows - mean).T @ (rows - mean) / count
    gap = background.mean - mean
    general = general / 2 + (background.covariance + np.outer(gap, gap)) / 2

    def shrunk(covariance: np.ndarray) -> np.ndarray:
        share = DIMENSION / (DIMENSION + count)
        level = max(np.trace(covariance) / DIMENSION, 1e-9)
        return (1 - share) * covariance + share * level * np.eye(DIMENSION)

    within, general = shrunk(within), shrunk(general)
    ratio, contrast, cosine = [], [], []
    for task, center in zip(tasks, task_means, strict=True):
        for cluster in range(int(task.clusters.max()) + 1):
            members = vectors_of(task)[task.clusters == cluster]
            centroid = (members.sum(0) + _PRIOR_ROWS * center) / (len(members) + _PRIOR_ROWS)
            ratio.append(
                [
                    (x - mean) @ np.linalg.solve(general, x - mean)
                    - (x - centroid) @ np.linalg.solve(within, x - centroid)
                    for x in points
                ]
            )
            contrast.append(
                [
                    (x - background.mean) @ np.linalg.solve(within, x - background.mean)
                    - (x - centroid) @ np.linalg.solve(within, x - centroid)
                    for x in points
                ]
            )
            cosine.append(points @ centroid / np.linalg.norm(centroid))
    return np.array(ratio).T, np.array(contrast).T, np.array(cosine).T


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    clusters=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_lda_scores_are_relative_mahalanobis_distances_and_cosines(
    counts: list[int], clusters: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tasks = [
        random_task(f"task-{n}", rng, rows=rows, dimension=DIMENSION, clusters=clusters)
        for n, rows in enumerate(counts)
    ]
    background = a_background(rng)
    fit = lda_fitter(background)(moments_of(tasks))
    points = rng.normal(size=(9, DIMENSION))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    ratio, contrast, cosine = naive_lda(tasks, background, points)
    for term, naive in zip(fit.terms, (ratio, contrast, cosine), strict=True):
        found = scores_of_term(term, fit, points)
        np.testing.assert_allclose(found, naive, rtol=1e-6, atol=1e-6 * np.abs(naive).max())
    assert fit.row_task.tolist() == [
        number for number, task in enumerate(tasks) for _ in range(int(task.clusters.max()) + 1)
    ]


def test_without_the_cosine_the_other_terms_are_the_same() -> None:
    rng = np.random.default_rng(3)
    moments = moments_of([random_task(name, rng, rows=9, dimension=DIMENSION) for name in "ab"])
    background = a_background(rng)
    ratio, contrast, _ = lda_fitter(background)(moments).terms
    for found, expected in zip(
        lda_fitter(background, with_cosine=False)(moments).terms, (ratio, contrast), strict=True
    ):
        np.testing.assert_array_equal(found.rows, expected.rows)


def test_the_nearest_mean_is_the_normalised_mean_of_each_task_without_an_offset() -> None:
    rng = np.random.default_rng(0)
    tasks = [
        random_task(name, rng, rows=rows, dimension=DIMENSION, clusters=clusters)
        for name, rows, clusters in (("a", 7, 1), ("b", 1, 1), ("c", 30, 3))
    ]
    fit = fit_nearest_mean(moments_of(tasks))
    means = np.array([vectors_of(task).mean(0) for task in tasks])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    [term] = fit.terms
    np.testing.assert_allclose(term.rows[:, :-1], means, atol=1e-12)
    assert not term.rows[:, -1].any()
    assert term.offset is None
    assert not fit.center.any()
    assert fit.row_task.tolist() == [0, 1, 2]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), others=st.integers(0, 4))
def test_a_nearest_mean_row_depends_on_its_own_task_alone(seed: int, others: int) -> None:
    rng = np.random.default_rng(seed)
    mine = random_task("task-2", rng, rows=9, dimension=DIMENSION)
    alone = fit_nearest_mean(moments_of([mine])).terms[0].rows[0]
    rest = [random_task(f"task-{n}x", rng, rows=5, dimension=DIMENSION) for n in range(others)]
    beside = fit_nearest_mean(moments_of([mine, *rest]))
    place = sorted([mine, *rest], key=lambda task: task.key).index(mine)
    assert beside.terms[0].rows[place].tobytes() == alone.tobytes()


def test_terms_are_added_up_each_times_its_weight() -> None:
    rng = np.random.default_rng(0)
    tasks = [random_task(name, rng, dimension=DIMENSION) for name in "ab"]
    fit = lda_fitter(a_background(rng))(moments_of(tasks))
    points = rng.normal(size=(5, DIMENSION))
    together = scores_of_term(combine(fit, (2.0, 0.5, 4.0)), fit, points)
    first, second, third = (scores_of_term(term, fit, points) for term in fit.terms)
    np.testing.assert_allclose(together, 2 * first + second / 2 + 4 * third, rtol=1e-9)


def test_fits_in_single_precision_score_as_those_in_double() -> None:
    rng = np.random.default_rng(0)
    tasks = [random_task(name, rng, rows=200, dimension=DIMENSION, clusters=2) for name in "abc"]
    background, points = a_background(rng), rng.normal(size=(50, DIMENSION)) / DIMENSION**0.5
    double = lda_fitter(background)(moments_of(tasks))
    single = lda_fitter(background, single=True)(moments_of(tasks))
    for exact, rounded in zip(double.terms, single.terms, strict=True):
        assert rounded.rows.dtype == np.float32
        expected = scores_of_term(exact, double, points)
        found = scores_of_term(rounded, single, points)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_single_precision_scores_are_the_scores_of_the_term() -> None:
    rng = np.random.default_rng(0)
    tasks = [random_task(name, rng, dimension=DIMENSION) for name in "abc"]
    fit = lda_fitter(a_background(rng))(moments_of(tasks))
    points = rng.normal(size=(5, DIMENSION)) / DIMENSION**0.5
    centered = (points - fit.center).astype(np.float32)
    for term in fit.terms:
        found = row_scores(term.rows, centered) + offset_scores(term.offset, centered)[:, None]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, scores_of_term(term, fit, points), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "rows",
    [
        np.full((1, DIMENSION), 9000),
        np.full((2, DIMENSION), 9000),
        np.full((500, DIMENSION), 9000),
        np.zeros((3, DIMENSION)),
        np.eye(DIMENSION)[:2] * 32767,
        np.array([np.eye(DIMENSION)[0] * 32767, np.eye(DIMENSION)[0] * -32767]),
    ],
)
def test_degenerate_rows_give_finite_fits(rows: np.ndarray) -> None:
    background = a_background(np.random.default_rng(0))
    for tasks in (1, 2):
        moments = moments_of(
            [
                TaskStatistics(
                    TaskKey(f"task-{n}", 1), rows.astype(np.int16), np.zeros(len(rows), np.int16)
                )
                for n in range(tasks)
            ]
        )
        for fitter in (fit_nearest_mean, lda_fitter(background)):
            fit = fitter(moments)
            for term in fit.terms:
                assert np.isfinite(term.rows).all()
                assert term.offset is None or np.isfinite(term.offset).all()


def test_the_offset_is_symmetric_and_the_precisions_are_positive() -> None:
    rng = np.random.default_rng(1)
    tasks = [random_task(name, rng, rows=3, dimension=DIMENSION) for name in "abcdefgh"]
    background = a_background(rng)
    fit = lda_fitter(background)(moments_of(tasks))
    offset = fit.terms[0].offset
    assert offset is not None
    np.testing.assert_array_equal(offset, offset.T)
