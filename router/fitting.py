"""Fits heads from exact moments: pure functions, the same bits for the same set of tasks.

Two kinds:

- `nearest-mean`: cosine to the normalised mean of each task. A row depends on its own task alone.
- `lda`: linear discriminant analysis over shrunken sub-centroids. Its terms are weighed and added
  up: the likelihood ratio against a broad Gaussian of text in general (a relative Mahalanobis
  distance, Ren et al. 2021, arXiv:2106.09022), the discriminant against text in general as one
  more class, and, where no stored rows are looked at, the cosine; where they are, a regression
  comes to them (`router.regression`). The first two rank the tasks
  alike and err differently on what belongs to none, so that their sum rejects better than each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray
from router.inverse import RealArray, inverse
from router.statistics import FIXED_POINT, ExactArray, Moments
from router.whitening import whitening_of

_PRIOR_ROWS = 15.0
_SHORTEST = 1e-12
_PIECE_ROWS = 256


@dataclass(frozen=True)
class Background:
    """Mean `[D]` and covariance `[D, D]` of an encoder's embeddings of general text."""

    mean: ExactArray
    covariance: ExactArray

    @cached_property
    def whitening(self) -> FloatArray:
        """The directions `[D, R]` of text in general, for `router.whitening.whitened`."""
        return whitening_of(self.covariance)


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a score: `rows[m] . [x - center ; 1] - (x - center)' offset (x - center)`.

    rows `[M, D + 1]`, offset `[D, D]` or None. `of_tasks`: all rows of a task are the same one.
    """

    rows: RealArray
    offset: RealArray | None = None
    of_tasks: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """The terms of the scores of M rows, before they are scaled and added up."""

    terms: tuple[Term, ...]
    center: ExactArray
    row_task: NDArray[np.int64]


Fitter = Callable[[Moments], Fit]


@dataclass(frozen=True, slots=True)
class Shared:
    """What discriminants take from all rows: their mean `[D]`, and the precision `[D, D]`.

    The precision is that of rows around the means of their tasks.
    """

    mean: ExactArray
    precision: RealArray


def shared_by_tasks(moments: Moments, *, single: bool = False) -> Shared:
    """Of the rows of all tasks; in float32 if `single`."""
    means, counts, _ = _task_means(moments)
    number = np.float32 if single else np.float64
    within = _regularised(_within_covariance(moments, means, counts), moments)
    return Shared(_mean(moments), inverse(within.astype(number)))


def fit_nearest_mean(moments: Moments) -> Fit:
    """One row per task: its normalised mean, in float32."""
    tasks, first = np.unique(moments.task_of, return_index=True)
    sums = _added_up(moments.sums, first)
    rows = np.zeros((len(tasks), sums.shape[1] + 1), np.float32)
    norms = np.sqrt(np.einsum("kd,kd->k", sums, sums))
    norms = np.maximum(norms, _SHORTEST)[:, None]
    np.divide(sums, norms, out=rows[:, :-1], casting="same_kind")
    return Fit((Term(rows),), np.zeros(sums.shape[1]), tasks)


def general_precision(
    moments: Moments, background: Background, *, single: bool = False
) -> RealArray:
    """The inverse `[D, D]` of the covariance of text in general, in float32 if `single`."""
    number = np.float32 if single else np.float64
    overall = _regularised(_background_covariance(moments, background), moments)
    return inverse(overall.astype(number))


def step_metric(moments: Moments, penalty: float) -> RealArray:
    """The inverse `[D, D]` of the bound of a regression's curvature, in float32.

    The bound is half the covariance of all rows, and `penalty` times the mean variance of an
    embedding's dimensions on the diagonal.
    """
    mean = _mean(moments)
    bound: ExactArray = moments.gram / moments.counts.sum()
    bound /= FIXED_POINT**2
    bound -= np.outer(mean, mean)
    level = max(float(np.trace(bound)) / len(bound), 1e-9)
    bound /= 2
    bound[np.diag_indices_from(bound)] += penalty * level
    return inverse(bound.astype(np.float32))


def lda_fitter(
    background: Background,
    *,
    with_cosine: bool = True,
    single: bool = False,
    general: RealArray | None = None,
    shared: Shared | None = None,
) -> Fitter:
    """One row per cluster, two or three terms: two log-likelihood ratios, and the cosine.

    `single` inverts and multiplies in float32, in half the time: for fits that only calibrate.
    (Shrinkage keeps the condition of the covariances under 1e5 for a million rows.)

    The first ratio is against text in general with a covariance of its own, the second against
    text in general as one more class of the discriminant analysis. `general` is the precision of
    the former where it is known already: the same for all fits that calibrate one head. With
    `shared` as well, the moments may be those of some tasks alone.
    """

    def fit_lda(moments: Moments) -> Fit:
        means, _, task_number = _task_means(moments)
        number: type[np.floating[Any]] = np.float32 if single else np.float64
        all_rows = shared_by_tasks(moments, single=single) if shared is None else shared
        mean, precision = all_rows.mean, all_rows.precision
        wide = general_precision(moments, background, single=single) if general is None else general
        centroids = np.empty(moments.sums.shape, number)
        cosines = np.empty((len(centroids), len(mean) + 1), number) if with_cosine else None
        # By the piece: of ten thousand tasks, memory for all that lies between is slow to come by.
        for start in range(0, len(centroids), _PIECE_ROWS):
            piece = slice(start, start + _PIECE_ROWS)
            found = _sub_centroids(moments, means[task_number[piece]], piece)
            centroids[piece] = found - mean
            if cosines is not None:
                unit = _unit(found.astype(number))
                # The search is over centred embeddings: c.x = c.(x - mean) + c.mean
                cosines[piece, :-1], cosines[piece, -1] = unit, unit @ mean.astype(number)
        discriminant = _discriminant(centroids, precision)
        general_row = _discriminant((background.mean[None] - mean).astype(number), precision)
        terms = [Term(discriminant, precision - wide), Term(discriminant - general_row)]
        if cosines is not None:
            terms.append(Term(cosines))
        return Fit(tuple(terms), mean, moments.task_of)

    return fit_lda


def combine(fit: Fit, weights: Sequence[float]) -> Term:
    """The sum of the terms, each times its weight."""
    if weights == (1.0,):
        return fit.terms[0]
    rows = fit.terms[0].rows * weights[0]
    for term, weight in zip(fit.terms[1:], weights[1:], strict=True):
        if weight:
            rows += term.rows * weight
    offsets = [
        term.offset * weight
        for term, weight in zip(fit.terms, weights, strict=True)
        if term.offset is not None
    ]
    return Term(rows, np.sum(offsets, axis=0) if offsets else None)


def row_scores(rows: RealArray, centered: FloatArray) -> FloatArray:
    """Scores `[B, M]` of rows `[M, D + 1]` for centred embeddings `[B, D]`, without offset."""
    single = rows.astype(np.float32, copy=False)
    scores: FloatArray = centered @ single[:, :-1].T
    scores += single[:, -1]
    return scores


def offset_scores(offset: RealArray | None, centered: FloatArray) -> FloatArray:
    """The part of a score `[B]` that is the same for all rows."""
    if offset is None:
        return np.zeros(len(centered), np.float32)
    product = centered @ offset.astype(np.float32, copy=False)
    scores: FloatArray = -np.einsum("bd,bd->b", product, centered)
    return scores


def _mean(moments: Moments) -> ExactArray:
    return np.asarray(moments.sums.sum(0) / moments.counts.sum() / FIXED_POINT)


def _task_means(moments: Moments) -> tuple[ExactArray, ExactArray, NDArray[np.int64]]:
    """The means `[K, D]` and numbers of rows `[K]` of the tasks, and each cluster's task `[M]`."""
    _, first, task_number = np.unique(moments.task_of, return_index=True, return_inverse=True)
    counts = _added_up(moments.counts, first)
    sums = _added_up(moments.sums, first)
    return sums / counts[:, None] / FIXED_POINT, counts, task_number


def _added_up(of_clusters: ExactArray, first: NDArray[np.int64]) -> ExactArray:
    """Sums over the clusters of each task, which begin at `first` `[K]`."""
    if len(first) == len(of_clusters):
        return of_clusters
    return np.asarray(np.add.reduceat(of_clusters, first, axis=0))


def _sub_centroids(moments: Moments, task_means: ExactArray, piece: slice) -> ExactArray:
    """The means of a piece of the clusters `[m, D]`, drawn to their tasks' where rows are few.

    Empirical Bayes: the task's mean counts as much as `_PRIOR_ROWS` rows. A task that is one cloud
    keeps one centre, and one that is several is served by several.
    """
    sums = moments.sums[piece] / FIXED_POINT + _PRIOR_ROWS * task_means
    return np.asarray(sums / (moments.counts[piece] + _PRIOR_ROWS)[:, None])


def _within_covariance(moments: Moments, means: ExactArray, counts: ExactArray) -> ExactArray:
    """The pooled covariance `[D, D]` of rows around their task's mean."""
    weighted = means * np.sqrt(counts)[:, None]
    scatter = moments.gram / FIXED_POINT**2
    scatter -= weighted.T @ weighted
    # Each task's mean takes one degree of freedom off its scatter.
    scatter /= max(counts.sum() - len(counts), 1.0)
    return scatter


def _discriminant(centered: RealArray, precision: RealArray) -> RealArray:
    """Rows `[M, D + 1]` of twice the log-likelihood of centred centroids, up to what they share."""
    rows = np.empty((len(centered), len(precision) + 1), centered.dtype)
    weights = np.matmul(centered, precision, out=rows[:, :-1])
    rows[:, -1] = -np.einsum("md,md->m", weights, centered)
    weights *= 2
    return rows


def _background_covariance(moments: Moments, background: Background) -> ExactArray:
    """The covariance of text in general: half what the tasks' rows say, half the background's."""
    mean = _mean(moments)
    overall: ExactArray = moments.gram / moments.counts.sum()
    overall /= FIXED_POINT**2
    overall -= np.outer(mean, mean)
    overall += background.covariance
    gap = background.mean - mean
    overall += np.outer(gap, gap)
    overall /= 2
    return overall


def _regularised(covariance: ExactArray, moments: Moments) -> ExactArray:
    """Shrunk, in its place, towards a multiple of the identity by D / (D + N).

    Half where there are as many rows as dimensions, little where there are many.
    """
    dimension = len(covariance)
    shrinkage = dimension / (dimension + moments.counts.sum())
    # The floor keeps a set of identical texts invertible.
    level = max(float(np.trace(covariance)) / dimension, 1e-9)
    covariance *= 1 - shrinkage
    covariance[np.diag_indices_from(covariance)] += shrinkage * level
    return covariance


def _unit(vectors: RealArray) -> RealArray:
    norms: RealArray = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, _SHORTEST)
