"""Compiles the head of a catalog revision from the tasks' statistics, and calibrates it.

Calibration is cross-fitted: the rows of each fold are scored by a head that was fitted without
them, thresholds are set on those scores, and the head that serves is then fitted on all rows.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.approximate_index import LEAST_ROWS, ApproximateIndex
from router.calibrating import fit_probability
from router.cross_fitting import CrossFitting, Fold, HeldOutScores, cross_fitting
from router.examples import Closeness, Examples, examples_per_task
from router.fitting import (
    Background,
    Fit,
    Fitter,
    Term,
    combine,
    fit_nearest_mean,
    general_precision,
    lda_fitter,
    shared_by_tasks,
)
from router.head import CALIBRATION_LEVELS, CALIBRATION_STEPS, Head, empty_head
from router.interfaces import FloatArray
from router.pooled_moments import PooledMoments
from router.sample_scores import SampleScores
from router.sampling import sampled_rows
from router.statistics import ChosenRows, Moments, TaskStatistics, row_count_of, sums_of_each
from router.sums_only import thresholds_without_rows
from router.tasks import Policy, TaskKey
from router.weighing import PENALTY, weigh

HEAD_KINDS = ("auto", "lda", "nearest-mean")

REJECTED = -1
UNSCORED = -2
"""A row of a catalog that is calibrated on a sample, and that is not in it."""
_GONE = -3
# A task's own threshold counts n / (n + 200) against the one of all tasks together: the fifth
# smallest of a hundred scores is mostly chance. Of 20 to 2,000, chosen on rows that no head was
# compiled from: of domains left out of HWU64 and CLINC150, and of example tasks left out.
_SHRINKAGE_ROWS = 200
# How many rows the terms are weighed on, about.
_WEIGHED_ROWS = 4096
# The weights that few rows change little, of terms of unit spread: the discriminant, and beside it
# the cosine or the closeness. Chosen on training rows, as the next numbers. The regression counts
# where many held-out rows ask for it: few rows it fits so well that its scores say little of what
# is out of scope.
_PRIOR_DISCRIMINANT = 2.0
_PRIOR_COSINE = 1.0
_PRIOR_REGRESSION, _REGRESSION_PENALTY = 0.0, 10.0
_PRIOR_CLOSENESS = 2.0
# How many tasks' means are worked out at a time.
_MEANS_AT_ONCE = 1024
# Under so many rows for each dimension there are few. The covariance of text in general knows the
# rows of all tasks, and one that knows a row makes it look common: where there are few, each fold
# has its own, else they share one. And a row is close to fewer others where a fifth of the rows is
# left out: where there are few, it alone is left out. (Where there are many that matters less than
# that a row may have a twin, written by the same hand, which a fresh text has not.)
_FEW_ROWS = 4
# The share of the likelihood ratio against text in general, which ranks as the discriminant does:
# of what that counts, or would count without the regression, which ranks better and rejects worse.
_RATIO_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class _Weights:
    """What the terms of a fit, and the closeness, count in the sum."""

    terms: tuple[float, ...]
    closeness: float = 0.0


# Where no row is kept: what the terms count as they are, likelihood ratios times two. A score of
# 0 is then that of a text which is as likely to be of the task as text in general.
_WEIGHTS_WITHOUT_ROWS = _Weights((_RATIO_SHARE / 2, (1 - _RATIO_SHARE) / 2, 0.0))


def compile_head(
    pool: PooledMoments,
    *,
    policy: Policy,
    encoder: str,
    dimension: int,
    background: Background | None,
    sample_scores: SampleScores | None = None,
    before: Head | None = None,
) -> Head:
    """The head for the tasks in `pool`: the same bits for the same tasks in any order.

    `background` may be None where the policy's head is `nearest-mean`, which does not ask for it.
    `sample_scores` remembers, from one call to the next, what a large catalog's calibration can use
    again. `before` is a head of the same catalog: a large head takes over from it what is a matter
    of single tasks.
    """
    tasks = pool.tasks
    if not tasks:
        return empty_head(encoder, dimension)
    nearest_mean = policy.head == "nearest-mean"
    centroids = len(tasks) if nearest_mean else int(pool.cluster_counts.sum())
    chosen = sampled_rows(pool, centroids)
    with cross_fitting(pool) as fitting:
        if nearest_mean and chosen is not None:
            means = _means(tasks, dimension, _known_means(before, encoder))
            remembered = SampleScores() if sample_scores is None else sample_scores
            found = _Found(
                means, remembered.of(pool, chosen, means.terms[0].rows, fitting.for_each)
            )
        elif nearest_mean:
            whole, folds = fitting.fit(fit_nearest_mean, lambda _: fit_nearest_mean)
            found = _Found(whole, fitting.score(folds, (1.0,)))
        elif background is None:
            raise ValueError(f"a head of kind {policy.head} needs a background")
        else:
            found = _discriminants(fitting, tasks, chosen, policy.head, background, dimension)
    held_out, center = found.held_out, found.whole.center.astype(np.float32)
    thresholds, margin = _calibrate(held_out, len(tasks), policy)
    if not len(held_out.task):
        thresholds = thresholds_without_rows(policy.head, tasks, policy.false_reject_rate)
    decided = np.where(held_out.best >= thresholds[held_out.winner], held_out.winner, REJECTED)
    term = combine(found.whole, found.weights.terms)
    rows = term.rows.astype(np.float32, copy=False)
    return Head(
        kind=policy.head,
        encoder=encoder,
        tasks=tuple(map(operator.attrgetter("key"), tasks)),
        rows=rows,
        row_task=found.whole.row_task,
        thresholds=tuple(thresholds.tolist()),
        ambiguity_margin=margin,
        center=center,
        background=None if term.offset is None else term.offset.astype(np.float32),
        held_out=_of_all_rows(decided, pool, chosen),
        summary=_summary(held_out, decided, margin, policy),
        probability=fit_probability(held_out),
        examples=found.examples,
        closeness_weight=found.weights.closeness,
        calibration=_calibration(held_out, len(tasks)),
        approximate=_approximate(rows, pool, policy) if len(rows) >= LEAST_ROWS else None,
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """A fit to all rows, the scores of held-out ones, and what the terms of the fit count."""

    whole: Fit
    held_out: HeldOutScores
    weights: _Weights = _Weights((1.0,))
    examples: Examples | None = None


def _discriminants(
    fitting: CrossFitting,
    tasks: Sequence[TaskStatistics],
    chosen: ChosenRows | None,
    kind: str,
    background: Background,
    dimension: int,
) -> _Found:
    near = kind == "auto" and examples_per_task(len(tasks)) > 0
    # Closeness to nothing cannot be compared with closeness to rows.
    near = near and all(task.sums is None for task in tasks)

    def for_folds(total: Moments) -> Fitter:
        general = None
        if total.counts.sum() >= _FEW_ROWS * dimension:
            general = general_precision(total, background, single=True)
        return lda_fitter(background, with_cosine=not near, single=True, general=general)

    def for_sample(total: Moments) -> Fitter:
        return lda_fitter(
            background,
            with_cosine=not near,
            single=True,
            general=general_precision(total, background, single=True),
            shared=shared_by_tasks(total, single=True),
        )

    if chosen is None:
        whole, folds = fitting.fit(lda_fitter(background, with_cosine=not near), for_folds)
        if near:
            whole, folds = fitting.with_regression(whole, folds)
    else:
        whole, folds = fitting.fit_sample(for_sample, chosen)
    center = whole.center.astype(np.float32)
    examples = fitting.examples(center, background.whitening) if near else None
    closeness = Closeness(examples, 1.0) if examples is not None else None
    # A sample is in several parts, and rows enough to weigh the terms on are in one.
    weighed = folds if chosen is None else folds[:1]
    weights = _weigh(fitting, weighed, closeness) if folds else _WEIGHTS_WITHOUT_ROWS
    counts = closeness is not None and weights.closeness > 0
    closeness = closeness.weighing(weights.closeness) if closeness and counts else None
    few = sum(task.row_count for task in tasks) < _FEW_ROWS * dimension
    held_out = fitting.score(folds, weights.terms, closeness, close_in_fold=few)
    return _Found(whole, held_out, weights, examples if closeness is not None else None)


def _known_means(before: Head | None, encoder: str) -> Head | None:
    """`before` where its rows are means of embeddings by this encoder, one of each task."""
    if before is None or (before.kind, before.encoder) != ("nearest-mean", encoder):
        return None
    return before if len(before.rows) == len(before.tasks) else None


def _means(tasks: Sequence[TaskStatistics], dimension: int, known: Head | None) -> Fit:
    """What `fit_nearest_mean` makes of the tasks: rows that are `known` are taken over.

    A mean is a matter of its own task, which its key tells from all others for ever.
    """
    number_of: Mapping[TaskKey, int] = {} if known is None else known.number_of
    keys = map(operator.attrgetter("key"), tasks)
    places = np.array([*map(number_of.get, keys, itertools.repeat(-1))])
    rows = np.empty((len(tasks), dimension + 1), np.float32)
    if known is not None:
        # Without a mode that forgives, NumPy would make another copy first.
        known.rows.take(places, axis=0, out=rows, mode="clip")
    missing = np.flatnonzero(places < 0)
    for begin in range(0, len(missing), _MEANS_AT_ONCE):
        some = missing[begin : begin + _MEANS_AT_ONCE]
        fit = fit_nearest_mean(sums_of_each([tasks[number] for number in some.tolist()]))
        rows[some] = fit.terms[0].rows
    return Fit((Term(rows),), np.zeros(dimension), np.arange(len(tasks)))


def _approximate(rows: FloatArray, pool: PooledMoments, policy: Policy) -> ApproximateIndex:
    if policy.head == "nearest-mean":
        return ApproximateIndex.build(rows, None)
    return ApproximateIndex.build(rows, shared_by_tasks(pool.total()).precision)


def _of_all_rows(
    decided: NDArray[np.int64], pool: PooledMoments, chosen: ChosenRows | None
) -> NDArray[np.int32]:
    """The decisions on the rows that were scored, in the places `[N]` of all rows."""
    if chosen is None:
        return decided.astype(np.int32)
    ends = np.cumsum(pool.column(row_count_of), dtype=np.int64)
    begins = np.concatenate([[0], ends])
    held_out = np.full(begins[-1], UNSCORED, np.int32)
    held_out[begins[chosen.task] + chosen.row] = decided
    return held_out


def changed_decisions(before: Head, after: Head, rows: Mapping[TaskKey, int]) -> dict[str, int]:
    """How many held-out decisions on rows that both heads know differ, per task of those rows.

    `rows` is the number of stored rows of each task of either head. Tasks are compared by key:
    a row that moves to a revised task counts as changed.
    """
    old_task, old_row, old = _scored(before, rows)
    new_task, new_row, new = _scored(after, rows)
    # Last, where REJECTED looks: rejected before and after is no change.
    translated = np.full(len(before.tasks) + 1, _GONE)
    translated[REJECTED] = REJECTED
    for number in np.unique(np.concatenate([old_task, old[old != REJECTED]])).tolist():
        translated[number] = after.number_of.get(before.tasks[number], _GONE)
    stays = translated[old_task] >= 0
    old_task, old_row, old = translated[old_task[stays]], old_row[stays], old[stays]
    widest = 1 + max(old_row.max(initial=0), new_row.max(initial=0))
    _, of_old, of_new = np.intersect1d(
        old_task * widest + old_row,
        new_task * widest + new_row,
        assume_unique=True,
        return_indices=True,
    )
    differing = new_task[of_new][translated[old[of_old]] != new[of_new]]
    tasks, counts = np.unique(differing, return_counts=True)
    return {
        str(after.tasks[task]): count
        for task, count in zip(tasks.tolist(), counts.tolist(), strict=True)
    }


def _scored(
    head: Head, rows: Mapping[TaskKey, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Of each row that was scored: its task's number, its own, and what it was decided for."""
    ends = head.row_ends(rows)
    scored = np.flatnonzero(head.held_out != UNSCORED)
    task = np.searchsorted(ends, scored, side="right")
    begins = np.concatenate([[0], ends])
    return task, scored - begins[task], head.held_out[scored]


def held_out_by_task(head: Head, rows: Mapping[TaskKey, int]) -> dict[TaskKey, NDArray[np.int32]]:
    """Per task of a head, the number of the task that each of its rows was decided for.

    Or `REJECTED`, or `UNSCORED`. Tasks of which no row was scored are left out.
    """
    ends = head.row_ends(rows)
    scored = np.flatnonzero(head.held_out != UNSCORED)
    if len(scored) == len(head.held_out):
        return dict(zip(head.tasks, np.split(head.held_out, ends), strict=False))
    begins = np.concatenate([[0], ends])
    return {
        head.tasks[number]: head.held_out[begins[number] : ends[number]]
        for number in np.unique(np.searchsorted(ends, scored, side="right"))
    }


def _weigh(fitting: CrossFitting, folds: Sequence[Fold], closeness: Closeness | None) -> _Weights:
    """Weights of the terms of the fits, and of the closeness."""
    _, discriminant, *others = (_spread(scores) for scores in fitting.own_scores(folds))
    prior, penalties = [_PRIOR_DISCRIMINANT, _PRIOR_COSINE], [PENALTY, PENALTY]
    if closeness is not None:
        prior = [_PRIOR_DISCRIMINANT, *(_PRIOR_REGRESSION for _ in others), _PRIOR_CLOSENESS]
        penalties = [PENALTY, *(_REGRESSION_PENALTY for _ in others), PENALTY]
    # Closeness finds no tasks: it is looked at for those that the other terms find.
    finders = (0.0, _PRIOR_DISCRIMINANT / discriminant, *(1 / spread for spread in others))
    contested = fitting.contested(folds, finders, closeness, _WEIGHED_ROWS)
    spreads = np.array([_spread(scores) for scores in contested.own_terms])
    found = weigh(contested.terms / spreads[:, None, None], contested.own, prior, penalties)
    ratio = _RATIO_SHARE * max(found[0], prior[0]) / float(spreads[0])
    first, *others = (np.array(found) / spreads).tolist()
    last = [] if closeness is None else [others.pop()]
    return _Weights((ratio, first - ratio, *others), *last)


def _spread(scores: FloatArray) -> float:
    """The standard deviation of a term over held-out rows, scored for their own task."""
    return max(float(scores.std()), 1e-6) if len(scores) else 1.0


def _calibrate(scores: HeldOutScores, tasks: int, policy: Policy) -> tuple[FloatArray, float]:
    """Thresholds `[K]` and the margin of ambiguity, that share one budget.

    The thresholds of the tasks are set one by one, and then moved together, up or down, until the
    share of all held-out rows that are kept from every task is what was asked for.
    """
    rate = policy.false_reject_rate
    ambiguous_rate = min(policy.ambiguous_rate, rate)
    margin = _ambiguity_margin(scores, ambiguous_rate)
    thresholds = _thresholds(scores, tasks, rate - ambiguous_rate)
    rows = np.isfinite(scores.own)
    over = (scores.best - thresholds[scores.winner])[rows]
    over[(scores.best - scores.runner_up)[rows] < margin] = -np.inf
    rank = int(rate * (len(over) + 1))
    if rank >= 1:
        moved = float(np.partition(over, rank - 1)[rank - 1])
        # Without end where ambiguity alone used the budget up: then the thresholds stay.
        if np.isfinite(moved):
            thresholds += np.float32(moved)
    return thresholds, margin


def _thresholds(scores: HeldOutScores, tasks: int, rate: float) -> FloatArray:
    """Per task, the floor(rate (n + 1))-th smallest score of its own rows, shrunk to all tasks'.

    That many of n + 1 exchangeable rows fall under it, so that the share of a task's own inputs
    that is rejected is at most `rate` (split conformal prediction, Vovk et al. 2005).
    """
    finite = scores.own[np.isfinite(scores.own)]
    overall = _conformal(finite, rate)
    thresholds = np.full(tasks, overall, np.float32)
    numbers, place = np.unique(scores.task, return_inverse=True)
    usable = np.isfinite(scores.own)
    rows = np.bincount(place[usable], minlength=len(numbers))
    mine = np.full(len(numbers), overall)
    for number in np.flatnonzero((rate * (rows + 1)).astype(np.int64) >= 1):
        mine[number] = _conformal(scores.own[usable & (place == number)], rate)
    weight = rows / (rows + _SHRINKAGE_ROWS)
    thresholds[numbers] = weight * mine + (1 - weight) * overall
    return thresholds


def _conformal(scores: FloatArray, rate: float) -> float:
    rank = max(int(rate * (len(scores) + 1)), 1)
    return float(np.partition(scores, rank - 1)[rank - 1]) if len(scores) else -np.inf


def _calibration(scores: HeldOutScores, tasks: int) -> NDArray[np.float64]:
    """Per task `[K, 1 + Q]`: the rows that it scored best for, and quantiles of their scores."""
    found = np.full((tasks, 1 + len(CALIBRATION_LEVELS)), np.nan)
    found[:, 0] = 0
    usable = np.flatnonzero(np.isfinite(scores.best))
    order = usable[np.lexsort((scores.best[usable], scores.winner[usable]))]
    winners, begins, counts = np.unique(scores.winner[order], return_index=True, return_counts=True)
    found[winners, 0] = counts
    # The lowest score that the share of them is at or under: a rank of exact integers.
    ranks = -(-np.arange(1, len(CALIBRATION_LEVELS) + 1) * counts[:, None] // CALIBRATION_STEPS) - 1
    found[winners, 1:] = scores.best[order[begins[:, None] + ranks]]
    return found


def _ambiguity_margin(scores: HeldOutScores, rate: float) -> float:
    """The margin that at most `rate` of the rightly routed held-out rows stay under."""
    margins = (scores.best - scores.runner_up)[scores.winner == scores.task]
    margins = margins[np.isfinite(margins)]
    if not len(margins) or rate <= 0:
        return 0.0
    return max(float(np.quantile(margins, rate, method="lower")), 0.0)


def _summary(
    scores: HeldOutScores,
    decided: NDArray[np.int64],
    margin: float,
    policy: Policy,
) -> dict[str, float]:
    if not len(decided):
        return {
            "held_out_rows": 0.0,
            "false_reject_rate": policy.false_reject_rate,
            "ambiguous_rate": policy.ambiguous_rate,
        }
    rejected = decided == REJECTED
    ambiguous = ~rejected & (scores.best - scores.runner_up < margin)
    return {
        "held_out_rows": float(len(scores.task)),
        "held_out_accuracy": float((scores.winner == scores.task).mean()),
        "held_out_rejected": float(rejected.mean()),
        "held_out_ambiguous": float(ambiguous.mean()),
        "false_reject_rate": policy.false_reject_rate,
        "ambiguous_rate": policy.ambiguous_rate,
    }
