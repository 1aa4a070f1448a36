"""Scores every stored row with a head that was fitted without it: five fits, each without a fold.

What calibration needs of them is one number or a few per row, so that nothing of the size of rows
times tasks is ever held. The folds are worked on side by side, one thread each.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router.examples import Closeness, Examples, best_first, sample_examples
from router.fitting import Fit, Fitter, Term, combine, row_scores, step_metric
from router.head import best_row_per_task
from router.interfaces import FloatArray
from router.pooled_moments import PooledMoments
from router.quadratic_form import QuadraticForm
from router.regression import PENALTY, fit_regression, regression_rows_per_task
from router.statistics import FIXED_POINT, FOLDS, ChosenRows, Moments
from router.threads import one_blas_thread

_CHUNK_ROWS = 1024
# Rows times tasks, about, that a thread scores at a time: closeness is quicker for many rows.
_SCORES_AT_ONCE = 1 << 19
# For the threads to share.
_SAMPLE_PARTS = 2


@dataclass(frozen=True, slots=True)
class Fold:
    """The rows of fold `number` and a fit without them.

    `places` `[n]` number the rows in canonical order; the rows of task t are `starts[t]` to
    `starts[t + 1]` of the fold, and `row` `[n]` numbers them within the task. `offsets[i]` `[n]`
    is the part of term i's score that is the same for all tasks.
    """

    number: int
    fit: Fit
    places: NDArray[np.int64]
    starts: NDArray[np.int64]
    row: NDArray[np.int64]
    centered: FloatArray
    offsets: tuple[FloatArray, ...]

    @property
    def task(self) -> NDArray[np.int64]:
        """The number of each row's task `[n]`."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def stored(self, rows: slice) -> ChosenRows:
        """Which of the tasks' stored rows some rows of the fold are."""
        return ChosenRows(self.task[rows], self.row[rows])

    def centered_at(self, center: FloatArray, rows: NDArray[np.int64] | slice) -> FloatArray:
        """The embeddings `[n, D]` of some rows, centred elsewhere than the fit centres them."""
        return self.centered[rows] + (self.fit.center.astype(np.float32) - center)


@dataclass(frozen=True, slots=True)
class Contested:
    """The terms of the scores of some rows for the tasks that come closest, their own included.

    terms `[J, N, S]`; `own` `[N]` is the place of the own task among the S.
    """

    terms: FloatArray
    own: NDArray[np.int64]

    @property
    def own_terms(self) -> FloatArray:
        """The terms of the rows' own tasks `[J, N]`."""
        chosen: FloatArray = self.terms[:, np.arange(len(self.own)), self.own]
        return chosen


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Per stored row `[N]`: its task's number, that task's score, the winner and its score.

    `own` is -inf for a row without which its task has none.
    """

    task: NDArray[np.int64]
    own: FloatArray
    winner: NDArray[np.int64]
    best: FloatArray
    runner_up: FloatArray


class CrossFitting:
    """Fits to all rows of a pool, and without each fold in turn; scores the rows of the folds."""

    def __init__(self, pool: PooledMoments, threads: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._threads = threads
        self.for_each = threads.map
        """As `map`, side by side."""

    def fit(self, fitter: Fitter, for_folds: Callable[[Moments], Fitter]) -> tuple[Fit, list[Fold]]:
        """The fit to all rows, and the folds that have rows, each with a fit without it.

        `for_folds` makes the fitter of the folds from the moments of all rows. Tasks that keep
        statistics only are in every fit, and in no fold.
        """
        by_fold, total = self._pool.by_fold(), self._pool.total()
        whole = self._threads.submit(fitter, total)
        # With one row in all there is nothing else to fit to.
        filled = [fold for fold in range(FOLDS) if by_fold[fold].counts.any()]
        if len(filled) == 1 and total.counts.sum() == by_fold[filled[0]].counts.sum():
            return whole.result(), [self._fold(filled[0], whole.result())]
        fold_fitter = for_folds(total)
        folds = self._threads.map(
            lambda fold: self._fold(fold, fold_fitter(total.without(by_fold[fold]))), filled
        )
        return whole.result(), list(folds)

    def fit_sample(
        self, fitter_for: Callable[[Moments], Fitter], chosen: ChosenRows
    ) -> tuple[Fit, list[Fold]]:
        """The fit to all rows, and the `chosen` ones, at least one, with a fit without them.

        The fitter that `fitter_for` makes from the moments of all rows must take what all tasks
        share from there: the chosen rows are left out of the means of their tasks, and of nothing
        else. They are all of fold 0, and come in several parts, which number the chosen rows alone.
        """
        total = self._pool.total()
        fitter = fitter_for(total)
        whole = self._threads.submit(fitter, total)
        left = self._pool.held_out(chosen)
        part = fitter(left) if len(left.counts) else None
        without = _replaced(whole.result(), part, np.unique(chosen.task))
        if not len(without.row_task):  # as in `fit`, where there is nothing else to fit to
            without = whole.result()
        # No part ends amid the rows of a task.
        ends = np.flatnonzero(np.diff(chosen.task, prepend=-1, append=len(self._pool.tasks)))
        cuts = np.searchsorted(ends, np.linspace(0, len(chosen.task), _SAMPLE_PARTS + 1))
        return whole.result(), [
            self._part(without, chosen, slice(begin, end))
            for begin, end in itertools.pairwise(ends[cuts].tolist())
            if begin < end
        ]

    def with_regression(self, whole: Fit, folds: Sequence[Fold]) -> tuple[Fit, list[Fold]]:
        """What `fit` returned, with one term more: a regression, where tasks are few enough.

        That of a fold is fitted to rows of the other folds. How long its steps are in which
        direction is told by the embeddings of all rows, and by the task of none.
        """
        tasks = self._pool.tasks
        most = regression_rows_per_task(len(tasks))
        if not most:
            return whole, list(folds)
        fixed = np.concatenate([task.embeddings[:most] for task in tasks])
        rows_of = np.array([min(len(task.embeddings), most) for task in tasks])
        task_of = np.repeat(np.arange(len(tasks)), rows_of)
        fold_of = np.concatenate([np.arange(rows) % FOLDS for rows in rows_of])
        metric = step_metric(self._pool.total(), PENALTY)
        # Tasks of the same rows score alike: their rows would differ in rounding.
        first: dict[bytes, int] = {}
        alike = np.array(
            [
                first.setdefault(task.embeddings[:most].tobytes(), number)
                for number, task in enumerate(tasks)
            ]
        )

        def regression(fit: Fit, kept: NDArray[np.bool_]) -> Fit:
            centered = fixed[kept].astype(np.float32) / np.float32(FIXED_POINT)
            centered -= fit.center.astype(np.float32)
            rows = fit_regression(centered, task_of[kept], len(tasks), metric)
            return replace(fit, terms=(*fit.terms, Term(rows[alike[fit.row_task]], of_tasks=True)))

        def of_fold(fold: Fold) -> Fold:
            # As in `fit`, where there is nothing else to fit to.
            if fold.fit is whole:
                fit = of_all.result()
            else:
                fit = regression(fold.fit, fold_of != fold.number)
            return replace(
                fold, fit=fit, offsets=(*fold.offsets, np.zeros(len(fold.places), np.float32))
            )

        of_all = self._threads.submit(regression, whole, np.ones(len(task_of), np.bool_))
        with_terms = list(self._threads.map(of_fold, folds))
        return of_all.result(), with_terms

    def _part(self, fit: Fit, chosen: ChosenRows, places: slice) -> Fold:
        """Some of the chosen rows."""
        mine = ChosenRows(chosen.task[places], chosen.row[places])
        fixed = mine.of(lambda task: self._pool.tasks[task].embeddings)
        centered = fixed.astype(np.float32) / np.float32(FIXED_POINT)
        centered -= fit.center.astype(np.float32)
        return Fold(
            0,
            fit,
            np.arange(places.start, places.stop),
            np.searchsorted(mine.task, np.arange(len(self._pool.tasks) + 1)),
            mine.row,
            centered,
            tuple(_offsets(term, centered) for term in fit.terms),
        )

    def _fold(self, number: int, fit: Fit) -> Fold:
        tasks = self._pool.tasks
        first = np.cumsum([0, *(len(task.embeddings) for task in tasks)])
        places = [np.arange(a + number, b, FOLDS) for a, b in itertools.pairwise(first)]
        fixed = np.concatenate([task.embeddings[number::FOLDS] for task in tasks])
        centered = fixed.astype(np.float32) / np.float32(FIXED_POINT)
        centered -= fit.center.astype(np.float32)
        return Fold(
            number,
            fit,
            np.concatenate(places),
            np.cumsum([0, *(len(rows) for rows in places)]),
            np.concatenate([rows - begin for rows, begin in zip(places, first[:-1], strict=True)]),
            centered,
            tuple(_offsets(term, centered) for term in fit.terms),
        )

    def examples(self, center: FloatArray, whitening: FloatArray) -> Examples | None:
        """Those of the tasks, as in `router.examples.sample_examples`."""
        return sample_examples(self._pool.tasks, center, whitening, self._threads.map)

    def own_scores(self, folds: Sequence[Fold]) -> list[FloatArray]:
        """Per term, the scores of the rows for their own task, where that has other rows."""
        per_fold = list(self._threads.map(_own_scores, folds))
        return [np.concatenate(scores) for scores in zip(*per_fold, strict=True)]

    def contested(
        self,
        folds: Sequence[Fold],
        weights: Sequence[float],
        closeness: Closeness | None,
        most_rows: int,
    ) -> Contested:
        """The first rows of every task, about `most_rows` in all, and the tasks that come closest.

        `weights` are those of the terms that find these tasks; terms of no weight are left out.
        Closeness is the last term.
        """
        per_task = -(-most_rows // max(len(self._pool.tasks), 1))
        width = min(len(np.unique(fold.fit.row_task)) for fold in folds)
        parts = list(
            self._threads.map(
                lambda fold: _contested_in_fold(fold, weights, closeness, per_task, width),
                folds,
            )
        )
        return Contested(
            np.concatenate([part.terms for part in parts], axis=1),
            np.concatenate([part.own for part in parts]),
        )

    def score(
        self,
        folds: Sequence[Fold],
        weights: Sequence[float],
        closeness: Closeness | None = None,
        *,
        close_in_fold: bool = False,
    ) -> HeldOutScores:
        """Score every row by the fit without its fold; the rows are in canonical order again.

        With `close_in_fold` a row may be close to the others of its fold, else to none of them.
        """
        count = sum(len(fold.places) for fold in folds)
        own = np.full(count, -np.inf, np.float32)
        scores = HeldOutScores(
            np.zeros(count, np.int64), own, np.zeros(count, np.int64), own.copy(), own.copy()
        )
        # The parts of a sample share one fit.
        fits = {id(fold.fit): fold.fit for fold in folds}
        combined = self._threads.map(lambda fit: combine(fit, weights).rows, fits.values())
        rows_of = {
            key: rows.astype(np.float32, copy=False)
            for key, rows in zip(fits, combined, strict=True)
        }
        parts = [
            (fold, rows_of[id(fold.fit)], weights, closeness, close_in_fold, scores, part)
            for fold in folds
            for part in _parts(fold)
        ]
        # Every part writes to the places of its own rows.
        list(self._threads.map(lambda part: _score_part(*part), parts))
        return scores


def _replaced(whole: Fit, part: Fit | None, tasks: NDArray[np.int64]) -> Fit:
    """`whole` in float32, where the rows of `tasks` are those of `part`, or none."""
    kept = ~np.isin(whole.row_task, tasks)
    if part is None:
        terms = [Term(one.rows[kept].astype(np.float32), one.offset) for one in whole.terms]
        return Fit(tuple(terms), whole.center, whole.row_task[kept])
    row_task = np.concatenate([whole.row_task[kept], part.row_task])
    order = np.argsort(row_task, kind="stable")
    terms = []
    for one, other in zip(whole.terms, part.terms, strict=True):
        if len(order) == len(kept):
            rows = one.rows.astype(np.float32)
            rows[~kept] = other.rows
        else:  # a cluster is left without rows
            rows = np.concatenate([one.rows[kept], other.rows], dtype=np.float32)[order]
        terms.append(Term(rows, one.offset))
    return Fit(tuple(terms), whole.center, row_task[order])


@contextlib.contextmanager
def cross_fitting(pool: PooledMoments) -> Iterator[CrossFitting]:
    """Cross-fitting over the tasks of `pool`, which must not be empty or change meanwhile."""
    threads = ThreadPoolExecutor(min(os.cpu_count() or 1, FOLDS))
    with one_blas_thread(), threads:
        yield CrossFitting(pool, threads)


def _offsets(term: Term, centered: FloatArray) -> FloatArray:
    """The part of a term's scores `[B]` that is the same for all rows."""
    offsets = np.zeros(len(centered), np.float32)
    if term.offset is not None:
        form = QuadraticForm(term.offset.astype(np.float32, copy=False))
        for begin in range(0, len(centered), _CHUNK_ROWS):
            chunk = slice(begin, begin + _CHUNK_ROWS)
            offsets[chunk] = -form.of(centered[chunk])
    return offsets


def _own_scores(fold: Fold) -> list[FloatArray]:
    rows = [term.rows.astype(np.float32, copy=False) for term in fold.fit.terms]
    own: list[list[FloatArray]] = [[np.zeros(0, np.float32)] for _ in rows]
    ends = np.searchsorted(fold.fit.row_task, np.arange(len(fold.starts)))
    for task, (start, stop) in enumerate(itertools.pairwise(fold.starts)):
        mine = slice(ends[task], ends[task + 1])
        if start == stop or mine.start == mine.stop:
            continue
        for scores, term, offset in zip(own, rows, fold.offsets, strict=True):
            best = row_scores(term[mine], fold.centered[start:stop]).max(1)
            scores.append(best + offset[start:stop])
    return [np.concatenate(scores) for scores in own]


def _contested_in_fold(
    fold: Fold,
    weights: Sequence[float],
    closeness: Closeness | None,
    per_task: int,
    width: int,
) -> Contested:
    present = np.unique(fold.fit.row_task)
    # Row i of the fold is row i * FOLDS + number of its task.
    in_fold = np.arange(len(fold.places)) - fold.starts[fold.task]
    chosen = (in_fold * FOLDS + fold.number < per_task) & np.isin(fold.task, present)
    rows = np.flatnonzero(chosen)
    own_task = np.searchsorted(present, fold.task[rows])
    counted = [place for place, weight in enumerate(weights) if weight]
    starts = np.flatnonzero(np.diff(fold.fit.row_task, prepend=-1))
    task_of_row = np.searchsorted(present, fold.fit.row_task)

    def scores_of(term: Term) -> FloatArray:
        if term.of_tasks:  # an eighth of the products, where a task has eight rows
            return row_scores(term.rows[starts], fold.centered[rows])[:, task_of_row]
        return row_scores(term.rows, fold.centered[rows])

    per_term = [scores_of(fold.fit.terms[place]) for place in counted]
    together = np.zeros((len(rows), len(fold.fit.row_task)), np.float32)
    for place, scores in zip(counted, per_term, strict=True):
        together += np.float32(weights[place]) * scores
    by_task = best_row_per_task(together, fold.fit.row_task)
    tasks = best_first(by_task)[:, :width]
    missing = ~(tasks == own_task[:, None]).any(1)
    tasks[missing, -1] = own_task[missing]
    best_rows = _best_rows(together, starts, tasks)
    terms = [np.take_along_axis(scores, best_rows, 1) for scores in per_term]
    if closeness is not None:
        # Beside terms that know none of the fold's rows, a closeness that does counts for too much.
        centered = fold.centered_at(closeness.center, rows)
        terms.append(closeness.of(centered, present[tasks], without_fold=fold.number))
    return Contested(np.stack(terms), (tasks == own_task[:, None]).argmax(1))


def _best_rows(
    scores: FloatArray, starts: NDArray[np.int64], tasks: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The best row of each task `[n, S]`, of scores `[n, M]`. A task's rows begin at `starts`."""
    best = np.empty(tasks.shape, np.int64)
    ends = np.append(starts[1:], scores.shape[1])
    for number in np.unique(tasks):
        row, column = np.nonzero(tasks == number)
        mine = scores[row, starts[number] : ends[number]]
        best[row, column] = starts[number] + mine.argmax(1)
    return best


def _parts(fold: Fold) -> list[slice]:
    """The rows of a fold, in equal parts: as many, whatever the number of threads."""
    rows = len(fold.places)
    parts = -(-rows * (len(fold.starts) - 1) // _SCORES_AT_ONCE)
    # Two threads share five folds unevenly. Products of few rows take nearly as long as of many.
    parts = max(min(max(parts, 2), rows // _CHUNK_ROWS), 1)
    cuts = np.linspace(0, rows, parts + 1).astype(int)
    return [slice(begin, end) for begin, end in itertools.pairwise(cuts.tolist())]


def _score_part(
    fold: Fold,
    rows: FloatArray,
    weights: Sequence[float],
    closeness: Closeness | None,
    close_in_fold: bool,
    found: HeldOutScores,
    part: slice,
) -> None:
    tasks, present = len(fold.starts) - 1, np.unique(fold.fit.row_task)
    at, own_task, centered = fold.places[part], fold.task[part], fold.centered[part]
    scores = np.full((len(at), tasks), -np.inf, np.float32)
    columns = slice(None) if len(present) == tasks else present
    for begin in range(0, len(at), _CHUNK_ROWS):
        chunk = slice(begin, begin + _CHUNK_ROWS)
        by_row = row_scores(rows, centered[chunk])
        scores[chunk, columns] = best_row_per_task(by_row, fold.fit.row_task)
    for offsets, weight in zip(fold.offsets, weights, strict=True):
        scores += (offsets[part] * weight)[:, None]
    if closeness is not None:
        centered = fold.centered_at(closeness.center, part)
        if close_in_fold:
            closeness.add_to(scores, centered, stored=fold.stored(part))
        else:
            closeness.add_to(scores, centered, without_fold=fold.number)
    number = np.arange(len(at))
    found.task[at] = own_task
    found.own[at] = scores[number, own_task]
    winner = scores.argmax(1)
    found.winner[at] = winner
    found.best[at] = scores[number, winner]
    scores[number, winner] = -np.inf
    found.runner_up[at] = scores.max(1)
