"""Every row is scored by a fit that never saw it, and comes back to its place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router.cross_fitting import cross_fitting
from router.examples import NEIGHBOURS, SHORTLIST, Closeness, sample_examples
from router.fitting import Term, combine, lda_fitter, step_metric
from router.head import best_row_per_task
from router.pooled_moments import PooledMoments
from router.regression import PENALTY, fit_regression
from router.statistics import FOLDS, TaskStatistics
from router.tasks import TaskKey
from tests.catalogs import random_task, wide_background

DIMENSION = 8
ORIGIN = np.zeros(DIMENSION, np.float32)
PLAIN = np.zeros((DIMENSION, 1), np.float32)
"""A whitening that changes nothing."""


def pooled(tasks: list[TaskStatistics]) -> PooledMoments:
    pool = PooledMoments(DIMENSION)
    pool.update(tasks)
    return pool


def closeness_of(tasks: list[TaskStatistics], weight: float) -> Closeness:
    examples = sample_examples(tasks, ORIGIN, PLAIN)
    assert examples is not None
    return Closeness(examples, weight)


@pytest.mark.parametrize("weight", [0.0, 3.0])
@pytest.mark.parametrize("rows", [(23, 4, 11), (30,), (3, 1)])
@pytest.mark.parametrize("close_in_fold", [False, True])
def test_rows_are_scored_by_a_fit_to_the_rows_of_the_other_folds(
    rows: tuple[int, ...], weight: float, close_in_fold: bool
) -> None:
    rng = np.random.default_rng(0)
    tasks = [
        random_task(f"task-{n}", rng, rows=count, dimension=DIMENSION, clusters=2)
        for n, count in enumerate(rows)
    ]
    fitter, weights = lda_fitter(wide_background(DIMENSION)), (0.5, 0.3, 2.0)
    examples = sample_examples(tasks, ORIGIN, PLAIN)
    assert examples is not None
    biases = np.split(examples.biases, examples.starts[1:-1])
    with cross_fitting(pooled(tasks)) as fitting:
        _, folds = fitting.fit(fitter, lambda _: fitter)
        closeness = closeness_of(tasks, weight) if weight else None
        found = fitting.score(folds, weights, closeness, close_in_fold=close_in_fold)
    moments = pooled(tasks)
    place = 0
    for number, task in enumerate(tasks):
        for row, vector in enumerate(task.vectors):
            fit = fitter(moments.total().without(moments.by_fold()[row % FOLDS]))
            term = combine(fit, weights)
            x = vector - fit.center
            scores = np.full(len(tasks), -np.inf)
            scores[np.unique(fit.row_task)] = best_row_per_task(
                (term.rows @ [*x, 1.0])[None], fit.row_task
            )[0]
            scores -= x @ term.offset @ x
            for other, near in enumerate(tasks):
                cosines = near.vectors @ vector + biases[other]
                kept = cosines[near.folds != row % FOLDS]
                if close_in_fold:
                    kept = np.delete(cosines, row) if other == number else cosines
                nearest = np.sort(kept)[-NEIGHBOURS:]
                scores[other] += weight * (nearest.mean() if len(nearest) else -1.25)
            assert found.task[place] == number
            ranked = np.sort(scores)[::-1]
            np.testing.assert_allclose(found.own[place], scores[number], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found.best[place], ranked[0], rtol=1e-4, atol=1e-4)
            if len(tasks) > 1:
                np.testing.assert_allclose(found.runner_up[place], ranked[1], rtol=1e-4, atol=1e-4)
            assert scores[found.winner[place]] == pytest.approx(ranked[0], rel=1e-4, abs=1e-4)
            place += 1


def test_the_regression_of_a_fold_is_fitted_to_the_rows_of_the_other_folds() -> None:
    rng = np.random.default_rng(4)
    tasks = [
        random_task(f"task-{n}", rng, rows=rows, dimension=DIMENSION, clusters=2)
        for n, rows in enumerate((23, 11, 1))
    ]
    fitter = lda_fitter(wide_background(DIMENSION), with_cosine=False)
    pool = pooled(tasks)
    with cross_fitting(pool) as fitting:
        whole, folds = fitting.with_regression(*fitting.fit(fitter, lambda _: fitter))
    metric = step_metric(pool.total(), PENALTY)
    vectors = np.concatenate([task.vectors for task in tasks])
    task_of = np.repeat(np.arange(len(tasks)), [len(task.vectors) for task in tasks])
    fold_of = np.concatenate([task.folds for task in tasks])
    for number, fit in [(-1, whole), *((fold.number, fold.fit) for fold in folds)]:
        kept = fold_of != number
        centered = vectors[kept] - fit.center.astype(np.float32)
        expected = fit_regression(centered, task_of[kept], len(tasks), metric)
        assert len(fit.terms) == 3
        np.testing.assert_array_equal(fit.terms[2].rows, expected[fit.row_task])
    assert all(len(fold.offsets) == 3 and not fold.offsets[2].any() for fold in folds)


def test_tasks_of_the_same_rows_have_the_same_regression() -> None:
    rng = np.random.default_rng(5)
    one = random_task("a", rng, rows=40, dimension=DIMENSION)
    same = TaskStatistics(TaskKey("b", 1), one.embeddings, one.clusters)
    other = random_task("c", rng, rows=40, dimension=DIMENSION)
    fitter = lda_fitter(wide_background(DIMENSION), with_cosine=False)
    with cross_fitting(pooled([one, same, other])) as fitting:
        whole, folds = fitting.with_regression(*fitting.fit(fitter, lambda _: fitter))
    for fit in [whole, *(fold.fit for fold in folds)]:
        rows = fit.terms[2].rows
        np.testing.assert_array_equal(rows[fit.row_task == 0], rows[fit.row_task == 1])
        assert not np.array_equal(rows[fit.row_task == 0], rows[fit.row_task == 2])


def test_own_scores_are_those_of_the_own_task_and_leave_out_rows_that_have_none() -> None:
    rng = np.random.default_rng(1)
    tasks = [
        random_task("a", rng, rows=15, dimension=DIMENSION),
        random_task("b", rng, rows=1, dimension=DIMENSION),
    ]
    with cross_fitting(pooled(tasks)) as fitting:
        fitter = lda_fitter(wide_background(DIMENSION))
        _, folds = fitting.fit(fitter, lambda _: fitter)
        own = fitting.own_scores(folds)
        found = fitting.score(folds, (1.0, 1.0, 1.0))
    assert [len(scores) for scores in own] == [15, 15, 15]
    assert np.isneginf(found.own[15])
    np.testing.assert_allclose(np.sort(np.sum(own, 0)), np.sort(found.own[:15]), rtol=1e-4)


def test_contested_rows_are_compared_with_the_tasks_that_come_closest_and_their_own() -> None:
    rng = np.random.default_rng(2)
    tasks = [
        random_task(f"task-{n:02}", rng, rows=12, dimension=DIMENSION, clusters=2)
        for n in range(15)
    ]
    with cross_fitting(pooled(tasks)) as fitting:
        fitter = lda_fitter(wide_background(DIMENSION))
        _, folds = fitting.fit(fitter, lambda _: fitter)
        contested = fitting.contested(folds, (0.0, 1.0, 0.0), closeness_of(tasks, 1.0), 4 * 15)
        scored = fitting.score(folds, (0.0, 1.0, 0.0))
    assert contested.terms.shape == (2, 60, SHORTLIST)
    places = np.concatenate([fold.places[fold.places % 12 < 4] for fold in folds])
    np.testing.assert_allclose(contested.own_terms[0], scored.own[places], rtol=1e-4, atol=1e-4)
    best = contested.terms[0].max(1)
    np.testing.assert_allclose(best, scored.best[places], rtol=1e-4, atol=1e-4)


def test_a_term_of_the_tasks_is_multiplied_once_a_task_and_counts_for_each_of_their_rows() -> None:
    rng = np.random.default_rng(5)
    tasks = [
        random_task(f"task-{n:02}", rng, rows=20, dimension=DIMENSION, clusters=1 + n % 3)
        for n in range(9)
    ]
    fitter, weights = lda_fitter(wide_background(DIMENSION), with_cosine=False), (0.0, 1.0, 1.0)
    with cross_fitting(pooled(tasks)) as fitting:
        _, folds = fitting.with_regression(*fitting.fit(fitter, lambda _: fitter))
        assert all(fold.fit.terms[-1].of_tasks for fold in folds)
        found = fitting.contested(folds, weights, None, 180)
        by_row = [
            replace(fold, fit=replace(fold.fit, terms=tuple(map(of_rows, fold.fit.terms))))
            for fold in folds
        ]
        expected = fitting.contested(by_row, weights, None, 180)
    np.testing.assert_array_equal(found.own, expected.own)
    np.testing.assert_allclose(found.terms, expected.terms, rtol=1e-5, atol=1e-5)


def of_rows(term: Term) -> Term:
    return replace(term, of_tasks=False)


def test_terms_without_weight_are_left_out_and_closeness_where_there_is_none() -> None:
    rng = np.random.default_rng(3)
    tasks = [random_task(name, rng, rows=3, dimension=DIMENSION) for name in "abc"]
    with cross_fitting(pooled(tasks)) as fitting:
        fitter = lda_fitter(wide_background(DIMENSION))
        _, folds = fitting.fit(fitter, lambda _: fitter)
        assert fitting.contested(folds, (0.0, 1.0, 1.0), None, 100).terms.shape == (2, 9, 3)


def test_scores_are_the_same_however_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    tasks = [random_task(name, rng, rows=20, dimension=DIMENSION, clusters=2) for name in "abc"]
    fitter, found = lda_fitter(wide_background(DIMENSION)), []
    with cross_fitting(pooled(tasks)) as fitting:
        _, folds = fitting.fit(fitter, lambda _: fitter)
        for at_once in (1 << 19, 7):
            monkeypatch.setattr("router.cross_fitting._SCORES_AT_ONCE", at_once)
            found.append(fitting.score(folds, (0.5, 1.0, 1.0), closeness_of(tasks, 2.0)))
    whole, in_parts = found
    np.testing.assert_array_equal(in_parts.task, whole.task)
    np.testing.assert_array_equal(in_parts.winner, whole.winner)
    np.testing.assert_allclose(in_parts.best, whole.best, rtol=1e-5)
    np.testing.assert_allclose(in_parts.own, whole.own, rtol=1e-5)
    np.testing.assert_allclose(in_parts.runner_up, whole.runner_up, rtol=1e-5)
