"""Compiles the head of a catalog revision from the tasks' statistics, and calibrates it.

Calibration is cross-fitted: the rows of each fold are scored by a head that was fitted without
them, thresholds are set on those scores, and the head that serves is then fitted on all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.fitting import (
    Background,
    Fit,
    Fitter,
    combine,
    fit_nearest_mean,
    lda_fitter,
    offset_scores,
    row_scores,
)
from router.head import Head, best_row_per_task, empty_head
from router.interfaces import FloatArray
from router.statistics import Moments, PooledMoments
from router.tasks import Policy, TaskKey

HEAD_KINDS = ("lda", "nearest-mean")

REJECTED = -1
_CHUNK_ROWS = 4096
# A task's own threshold counts n / (n + 20) against the one of all tasks together.
_SHRINKAGE_ROWS = 20


@dataclass(frozen=True, slots=True)
class _Fold:
    """The rows of one fold and a fit without them.

    `places` `[n]` number the rows in canonical order, `task` `[n]` is the number of their task,
    `offsets[t]` `[n]` the part of term t's score that is the same for all tasks.
    """

    fit: Fit
    places: NDArray[np.int64]
    task: NDArray[np.int64]
    centered: FloatArray
    offsets: tuple[FloatArray, ...]


@dataclass(frozen=True, slots=True)
class _HeldOutScores:
    """Per stored row `[N]`: its task's number, that task's score, the winner and its score."""

    task: NDArray[np.int64]
    own: FloatArray
    winner: NDArray[np.int64]
    best: FloatArray
    runner_up: FloatArray


def compile_head(
    pool: PooledMoments,
    *,
    policy: Policy,
    encoder: str,
    dimension: int,
    background: Background,
) -> Head:
    """The head for the tasks in `pool`: the same bits for the same tasks in any order."""
    tasks = pool.tasks
    if not tasks:
        return empty_head(encoder, dimension)
    total = pool.total()
    fitter = fit_nearest_mean if policy.head == "nearest-mean" else lda_fitter(background)
    whole = fitter(total)
    folds = _folds(pool, total, fitter, whole)
    spreads = (1.0,) if policy.head == "nearest-mean" else _spreads(folds, len(whole.terms))
    held_out = _score_held_out(folds, spreads, len(tasks))
    thresholds = _thresholds(held_out, len(tasks), policy.false_reject_rate)
    margin = _ambiguity_margin(held_out, policy.ambiguous_rate)
    decided = np.where(held_out.best >= thresholds[held_out.winner], held_out.winner, REJECTED)
    term = combine(whole, spreads)
    return Head(
        kind=policy.head,
        encoder=encoder,
        tasks=tuple(task.key for task in tasks),
        rows=term.rows.astype(np.float32),
        row_task=whole.row_task,
        thresholds=tuple(thresholds.tolist()),
        ambiguity_margin=margin,
        center=whole.center.astype(np.float32),
        background=None if term.offset is None else term.offset.astype(np.float32),
        held_out=decided.astype(np.int32),
        summary=_summary(held_out, decided, margin, policy),
    )


def changed_decisions(before: Head, after: Head, rows: Mapping[TaskKey, int]) -> dict[str, int]:
    """How many held-out decisions on rows that both heads know differ, per task of those rows.

    `rows` is the number of stored rows of each task of either head. Tasks are compared by key:
    a row that moves to a revised task counts as changed.
    """
    old = _held_out_by_task(before, rows)
    new = _held_out_by_task(after, rows)
    changed = {}
    for key in old.keys() & new.keys():
        differing = sum(a != b for a, b in zip(old[key], new[key], strict=True))
        if differing:
            changed[str(key)] = differing
    return changed


def _held_out_by_task(
    head: Head, rows: Mapping[TaskKey, int]
) -> dict[TaskKey, list[TaskKey | None]]:
    decisions: dict[TaskKey, list[TaskKey | None]] = {}
    start = 0
    for key in head.tasks:
        numbers = head.held_out[start : start + rows[key]]
        decisions[key] = [None if n == REJECTED else head.tasks[n] for n in numbers]
        start += rows[key]
    return decisions


def _folds(pool: PooledMoments, total: Moments, fitter: Fitter, whole: Fit) -> list[_Fold]:
    tasks = pool.tasks
    starts = np.cumsum([0, *(len(task.embeddings) for task in tasks)])
    folds = []
    for number, moments in enumerate(pool.by_fold()):
        chosen = [np.flatnonzero(task.folds == number) for task in tasks]
        if not any(len(rows) for rows in chosen):
            continue
        rest = total.without(moments)
        # With one row in all there is nothing else to fit to.
        fit = fitter(rest) if len(rest.counts) else whole
        vectors = np.concatenate(
            [task.vectors[rows] for task, rows in zip(tasks, chosen, strict=True)]
        )
        centered = (vectors - fit.center).astype(np.float32)
        folds.append(
            _Fold(
                fit,
                np.concatenate([s + rows for s, rows in zip(starts, chosen, strict=False)]),
                np.repeat(np.arange(len(tasks)), [len(rows) for rows in chosen]),
                centered,
                tuple(offset_scores(term.offset, centered) for term in fit.terms),
            )
        )
    return folds


def _spreads(folds: Sequence[_Fold], terms: int) -> tuple[float, ...]:
    """The standard deviation of each term over held-out rows, scored for their own task."""
    own: list[list[FloatArray]] = [[] for _ in range(terms)]
    for fold in folds:
        for task in np.unique(fold.task):
            rows, mine = fold.task == task, fold.fit.row_task == task
            if mine.any():
                for scores, term, offset in zip(own, fold.fit.terms, fold.offsets, strict=True):
                    best = row_scores(term.rows[mine], fold.centered[rows]).max(1)
                    scores.append(best + offset[rows])
    return tuple(
        max(float(np.concatenate(scores).std()), 1e-6) if scores else 1.0 for scores in own
    )


def _score_held_out(folds: Sequence[_Fold], spreads: Sequence[float], tasks: int) -> _HeldOutScores:
    """Score every row by the fit without its fold, and put the rows back into canonical order."""
    count = sum(len(fold.places) for fold in folds)
    own = np.full(count, -np.inf, np.float32)
    best, runner_up = own.copy(), own.copy()
    winner, number_of = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for fold in folds:
        term = combine(fold.fit, spreads)
        present = np.unique(fold.fit.row_task)
        offsets = np.sum(
            [offset / spread for offset, spread in zip(fold.offsets, spreads, strict=True)], axis=0
        )
        for begin in range(0, len(fold.places), _CHUNK_ROWS):
            chunk = slice(begin, begin + _CHUNK_ROWS)
            at = fold.places[chunk]
            scores = np.full((len(at), tasks), -np.inf, np.float32)
            scores[:, present] = best_row_per_task(
                row_scores(term.rows, fold.centered[chunk]), fold.fit.row_task
            )
            scores += offsets[chunk, None]
            rows = np.arange(len(at))
            number_of[at] = fold.task[chunk]
            own[at] = scores[rows, fold.task[chunk]]
            winner[at] = scores.argmax(1)
            best[at] = scores[rows, winner[at]]
            scores[rows, winner[at]] = -np.inf
            runner_up[at] = scores.max(1)
    return _HeldOutScores(number_of, own, winner, best, runner_up)


def _thresholds(scores: _HeldOutScores, tasks: int, rate: float) -> FloatArray:
    """Per task, the floor(rate (n + 1))-th smallest score of its own rows, shrunk to all tasks'.

    That many of n + 1 exchangeable rows fall under it, so that the share of a task's own inputs
    that is rejected is at most `rate` (split conformal prediction, Vovk et al. 2005).
    """
    finite = scores.own[np.isfinite(scores.own)]
    overall = _conformal(finite, rate)
    thresholds = np.empty(tasks, np.float32)
    for number in range(tasks):
        own = scores.own[(scores.task == number) & np.isfinite(scores.own)]
        weight = len(own) / (len(own) + _SHRINKAGE_ROWS)
        enough = int(rate * (len(own) + 1)) >= 1
        mine = _conformal(own, rate) if enough else overall
        thresholds[number] = weight * mine + (1 - weight) * overall
    return thresholds


def _conformal(scores: FloatArray, rate: float) -> float:
    rank = max(int(rate * (len(scores) + 1)), 1)
    return float(np.partition(scores, rank - 1)[rank - 1]) if len(scores) else -np.inf


def _ambiguity_margin(scores: _HeldOutScores, rate: float) -> float:
    """The margin that at most `rate` of the rightly routed held-out rows stay under."""
    margins = (scores.best - scores.runner_up)[scores.winner == scores.task]
    margins = margins[np.isfinite(margins)]
    if not len(margins) or rate <= 0:
        return 0.0
    return max(float(np.quantile(margins, rate, method="lower")), 0.0)


def _summary(
    scores: _HeldOutScores,
    decided: NDArray[np.int64],
    margin: float,
    policy: Policy,
) -> dict[str, float]:
    ambiguous = (decided != REJECTED) & (scores.best - scores.runner_up < margin)
    return {
        "held_out_rows": float(len(scores.task)),
        "held_out_accuracy": float((scores.winner == scores.task).mean()),
        "held_out_rejected": float((decided == REJECTED).mean()),
        "held_out_ambiguous": float(ambiguous.mean()),
        "false_reject_rate": policy.false_reject_rate,
        "ambiguous_rate": policy.ambiguous_rate,
    }
