"""Fits heads from exact moments: pure functions, the same bits for the same set of tasks.

Two kinds:

- `nearest-mean`: cosine to the normalised mean of each task. A row depends on its own task alone.
- `lda`: linear discriminant analysis over sub-centroids, as a likelihood ratio against a broad
  background Gaussian (a relative Mahalanobis distance, Ren et al. 2021, arXiv:2106.09022), plus
  the cosine to the sub-centroid, each scaled to its spread over the rows of the tasks. The ratio
  separates tasks from each other, the cosine separates them from what belongs to none; their sum
  rejects better than either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from router.interfaces import FloatArray
from router.statistics import FIXED_POINT, ExactArray, Moments

_BACKGROUND_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Background:
    """Mean `[D]` and covariance `[D, D]` of an encoder's embeddings of general text."""

    mean: ExactArray
    covariance: ExactArray


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a score: `rows[m] . [x - center ; 1] - (x - center)' offset (x - center)`.

    rows `[M, D + 1]`, offset `[D, D]` or None.
    """

    rows: ExactArray
    offset: ExactArray | None = None


@dataclass(frozen=True, slots=True)
class Fit:
    """The terms of the scores of M rows, before they are scaled and added up."""

    terms: tuple[Term, ...]
    center: ExactArray
    row_task: NDArray[np.int64]


Fitter = Callable[[Moments], Fit]


def fit_nearest_mean(moments: Moments) -> Fit:
    """One row per task: its normalised mean."""
    tasks, task_number = np.unique(moments.task_of, return_inverse=True)
    sums = np.zeros((len(tasks), moments.sums.shape[1]))
    np.add.at(sums, task_number, moments.sums)
    rows = np.concatenate([_unit(sums), np.zeros((len(tasks), 1))], axis=1)
    return Fit((Term(rows),), np.zeros(sums.shape[1]), tasks)


def lda_fitter(background: Background | None) -> Fitter:
    """One row per cluster, two terms: the log-likelihood ratio, and the cosine."""

    def fit_lda(moments: Moments) -> Fit:
        ratio, mean = _likelihood_ratio(moments, background)
        cosines = _unit(moments.sums)
        # The search is over centred embeddings: c.x = c.(x - mean) + c.mean
        cosine_rows = np.concatenate([cosines, (cosines @ mean)[:, None]], axis=1)
        return Fit((ratio, Term(cosine_rows)), mean, moments.task_of)

    return fit_lda


def combine(fit: Fit, spreads: Sequence[float]) -> Term:
    """The sum of the terms, each divided by its spread."""
    rows = sum(term.rows / spread for term, spread in zip(fit.terms, spreads, strict=True))
    offsets = [
        term.offset / spread
        for term, spread in zip(fit.terms, spreads, strict=True)
        if term.offset is not None
    ]
    return Term(np.asarray(rows), np.sum(offsets, axis=0) if offsets else None)


def row_scores(rows: ExactArray, centered: FloatArray) -> FloatArray:
    """Scores `[B, M]` of rows `[M, D + 1]` for centred embeddings `[B, D]`, without offset."""
    single = rows.astype(np.float32)
    scores: FloatArray = centered @ single[:, :-1].T
    scores += single[:, -1]
    return scores


def offset_scores(offset: ExactArray | None, centered: FloatArray) -> FloatArray:
    """The part of a score `[B]` that is the same for all rows."""
    if offset is None:
        return np.zeros(len(centered), np.float32)
    product = centered @ offset.astype(np.float32)
    scores: FloatArray = -np.einsum("bd,bd->b", product, centered)
    return scores


def _likelihood_ratio(moments: Moments, background: Background | None) -> tuple[Term, ExactArray]:
    """The likelihood ratio as a term, and its centre `[D]`.

    The covariances are shrunk towards a multiple of the identity by D / (D + N): half where there
    are as many rows as dimensions, little where there are many.
    """
    total = moments.counts.sum()
    dimension = moments.sums.shape[1]
    mean = moments.sums.sum(0) / total / FIXED_POINT
    second = moments.gram / total / FIXED_POINT**2
    centroids = moments.sums / moments.counts[:, None] / FIXED_POINT
    weighted = centroids * np.sqrt(moments.counts / total)[:, None]
    # Each cluster's mean takes one degree of freedom off its own scatter.
    free = max(1.0 - len(centroids) / total, 1.0 / total)
    within = (second - weighted.T @ weighted) / free
    overall = second - np.outer(mean, mean)
    if background is not None:
        gap = background.mean - mean
        general = background.covariance + np.outer(gap, gap)
        overall = (1 - _BACKGROUND_SHARE) * overall + _BACKGROUND_SHARE * general
    shrinkage = dimension / (dimension + total)
    precision = _inverse(_shrunk(within, shrinkage))
    offset = precision - _inverse(_shrunk(overall, shrinkage))
    centered = centroids - mean
    weights = centered @ precision
    biases = -np.einsum("md,md->m", weights, centered)
    return Term(np.concatenate([2 * weights, biases[:, None]], axis=1), offset), mean


def _shrunk(covariance: ExactArray, shrinkage: float) -> ExactArray:
    # The floor keeps a set of identical texts invertible.
    level = max(float(np.trace(covariance)) / len(covariance), 1e-9)
    shrunk = (1 - shrinkage) * covariance
    shrunk[np.diag_indices_from(shrunk)] += shrinkage * level
    return shrunk


def _inverse(matrix: ExactArray) -> ExactArray:
    """The inverse of a positive definite matrix, by Cholesky."""
    factor = linalg.cho_factor(matrix, lower=True, check_finite=False)
    inverse: ExactArray = linalg.cho_solve(factor, np.eye(len(matrix)), check_finite=False)
    return (inverse + inverse.T) / 2


def _unit(vectors: ExactArray) -> ExactArray:
    norms: ExactArray = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)
