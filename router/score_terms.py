"""The terms that a head's scores are the sum of, found again from the tasks' stored rows.

A head stores the sum alone, which is all that serving needs. The terms are functions of the stored
rows; how they were scaled follows from the head, whose rows are their weighted sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.cross_fitting import cross_fitting
from router.fitting import Background, Fit, Fitter, fit_nearest_mean, lda_fitter, offset_scores
from router.head import Head
from router.interfaces import FloatArray
from router.pooled_moments import PooledMoments
from router.statistics import ExactArray, TaskStatistics
from router.threads import one_blas_thread

_LDA = ("likelihood", "discriminant", "cosine")
TERM_NAMES = {
    "auto": _LDA,
    "lda": _LDA,
    "nearest-mean": ("cosine",),
}
"""The terms of each kind of head without examples, in the order of its fit."""

TERMS_WITH_EXAMPLES = ("likelihood", "discriminant", "regression", "closeness")
"""The terms of a head that looks at stored rows; without the regression where that has none."""

# Heads are stored in single precision.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ScoreTerms:
    """The scaled terms of a head's scores: rows `[M, D + 1]`, offsets `[D, D]`, as in the head."""

    names: tuple[str, ...]
    rows: tuple[FloatArray, ...]
    offsets: tuple[FloatArray | None, ...]

    def of(self, head: Head, vector: FloatArray, task: int) -> tuple[float, ...]:
        """The value of each term of the score of task number `task` for an embedding `[D]`."""
        query = np.append(vector - head.center, np.float32(1))
        mine = np.flatnonzero(head.row_task == task)
        best = mine[(head.rows[mine] @ query).argmax()]
        centered = query[None, :-1]
        linear = tuple(
            float(rows[best] @ query + offset_scores(offset, centered)[0])
            for rows, offset in zip(self.rows, self.offsets, strict=True)
        )
        closeness = head.closeness()
        if closeness is None:
            return linear
        return (*linear, float(closeness.of(centered, np.array([[task]]))[0, 0]))


def score_terms(
    head: Head, tasks: Sequence[TaskStatistics], background: Background
) -> ScoreTerms | None:
    """The terms of `head`, which was compiled from `tasks`; None for a kind that is not known."""
    if head.kind not in TERM_NAMES:
        return None
    fitter: Fitter = fit_nearest_mean
    if head.kind != "nearest-mean":
        fitter = lda_fitter(background, with_cosine=head.examples is None)
    pool = PooledMoments(len(head.center))
    pool.update(tasks)
    with one_blas_thread():
        fit = fitter(pool.total())
        if head.examples is not None:
            with cross_fitting(pool) as fitting:
                fit, _ = fitting.with_regression(fit, [])
        weights = _weights(fit, head)
    if weights is None:
        return None
    return ScoreTerms(
        _names(head, fit),
        tuple(
            (weight * term.rows).astype(np.float32)
            for weight, term in zip(weights, fit.terms, strict=True)
        ),
        tuple(
            None if term.offset is None else (weight * term.offset).astype(np.float32)
            for weight, term in zip(weights, fit.terms, strict=True)
        ),
    )


def _names(head: Head, fit: Fit) -> tuple[str, ...]:
    if head.examples is None:
        return TERM_NAMES[head.kind]
    linear = TERMS_WITH_EXAMPLES[:-1][: len(fit.terms)]
    return (*linear, TERMS_WITH_EXAMPLES[-1])


def _weights(fit: Fit, head: Head) -> ExactArray | None:
    """How the terms were scaled: the least squares of the head's rows and background.

    None where the head is no weighted sum of them.
    """
    if fit.terms[0].rows.shape != head.rows.shape:
        return None
    zero = np.zeros((0, 0))
    offset = zero if head.background is None else head.background
    wanted = np.concatenate([head.rows.ravel(), offset.ravel()]).astype(np.float64)
    none = np.zeros(offset.size)
    columns = np.stack(
        [
            np.concatenate(
                [term.rows.ravel(), none if term.offset is None else term.offset.ravel()]
            )
            for term in fit.terms
        ],
        axis=1,
    ).astype(np.float64)
    weights = np.asarray(np.linalg.lstsq(columns.T @ columns, columns.T @ wanted)[0], np.float64)
    gap = np.linalg.norm(columns @ weights - wanted)
    return weights if gap <= _TOLERANCE * max(float(np.linalg.norm(wanted)), 1e-12) else None
