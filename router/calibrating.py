"""Fits the probability that a decision is right, on the scores of rows that were held out."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from router.cross_fitting import HeldOutScores
from router.probability import MatchProbability
from router.statistics import ExactArray
from router.threads import one_blas_thread

# Of a slope in standard units, before there is any row: the variance of its normal prior.
_PRIOR_VARIANCE = 1.0
# In standard units: beyond it a row says no more, and the optimiser would leave the numbers there.
_FAR = 30.0
# The last digits are the optimiser's, and say nothing.
_DIGITS = 6


def fit_probability(scores: HeldOutScores) -> MatchProbability | None:
    """The function that fits held-out rows best; None where none of them has a second best task.

    Logistic regression with slopes that are not negative. As in Platt (1999), a row that is right
    counts as (n + 1) / (n + 2) right, with n such rows, so that a set without any error is no
    certainty; slopes in units of the median margin and the deviation of the scores have a normal
    prior. Rows without which their task has none cannot be right, and are left out.
    """
    usable = np.isfinite(scores.own) & np.isfinite(scores.runner_up)
    if not usable.any():
        return None
    best = scores.best[usable].astype(np.float64)
    margin = best - scores.runner_up[usable]
    right = (scores.winner == scores.task)[usable]
    margin_unit = max(float(np.median(margin)), 1e-6)
    middle, score_unit = float(best.mean()), max(float(best.std()), 1e-6)
    features = np.stack([margin / margin_unit, (best - middle) / score_unit], axis=1)
    features = features.clip(-_FAR, _FAR)
    hits = int(right.sum())
    misses = len(right) - hits
    targets = np.where(right, (hits + 1) / (hits + 2), 1 / (misses + 2))
    intercept, margin_slope, score_slope = _logistic(features, targets)
    margin_slope, score_slope = margin_slope / margin_unit, score_slope / score_unit
    return MatchProbability(
        _rounded(intercept - score_slope * middle), _rounded(margin_slope), _rounded(score_slope)
    )


def _logistic(features: ExactArray, targets: ExactArray) -> tuple[float, float, float]:
    """Intercept and two slopes, neither of them negative, of the penalised maximum likelihood."""

    def loss(weights: ExactArray) -> tuple[float, ExactArray]:
        logits = weights[0] + features @ weights[1:]
        errors = expit(logits) - targets
        penalty = weights[1:] / _PRIOR_VARIANCE
        value = (np.logaddexp(0, logits) - targets * logits).sum() + weights[1:] @ penalty / 2
        return float(value), np.concatenate([[errors.sum()], features.T @ errors + penalty])

    with one_blas_thread():
        found = minimize(
            loss,
            np.array([0.0, 1.0, 1.0]),
            jac=True,
            method="L-BFGS-B",
            bounds=[(None, None), (0, None), (0, None)],
        )
    intercept, margin_slope, score_slope = found.x.tolist()
    return intercept, margin_slope, score_slope


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
