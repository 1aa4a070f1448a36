"""Weighs the terms of a score by how well they tell the tasks apart on held-out rows.

Which term deserves trust differs: where tasks are of different kinds the discriminant is nearly all
that counts, between close intents the cosines count as much. The weights maximise the likelihood of
each held-out row's own task under a softmax over the best tasks (stacking, Wolpert 1992, with a
conditional logit, McFadden 1974). A penalty draws them to fixed ones where rows are few.

Scores get a unit from that: a difference of 1 between two tasks makes the better one e times as
likely as the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray
from router.statistics import ExactArray

PENALTY = 0.1
"""What usually draws a weight to its prior."""

_STEPS = 50
_LARGEST_STEP = 3.0
_HALVINGS = 30
# Of the log-likelihood: what a step may seem to lose where nothing is left to gain.
_ROUNDING = 1e-9


def weigh(
    terms: FloatArray,
    own: NDArray[np.int64],
    prior: Sequence[float],
    penalties: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Weights `[J]`, none negative, for terms `[J, N, S]` of which `own` `[N]` are the right ones.

    `prior` is what the weights are without rows, in the units of terms of unit spread; `penalties`,
    `PENALTY` each if None, how strongly they are drawn there. The same input gives the same bits.
    """
    drawn = np.array([PENALTY] * len(prior) if penalties is None else penalties, np.float64)
    weights = np.array(prior, np.float64)
    if terms.shape[1] == 0:
        return tuple(prior)
    free = np.ones(len(weights), np.bool_)
    while free.any():
        weights[free] = _fitted(
            terms[free].astype(np.float64), own, np.array(prior)[free], drawn[free]
        )
        if (weights >= 0).all():
            break
        # A term that would count against a task is left out, and the others are fitted again.
        free &= weights > 0
        weights[~free] = 0.0
    return tuple(weights.tolist())


def _fitted(
    terms: ExactArray, own: NDArray[np.int64], prior: ExactArray, penalties: ExactArray
) -> ExactArray:
    """The penalised maximum of the likelihood, by Newton's method: it is concave.

    Where scores are sure of what is wrong, a whole step may lead far beyond: it is halved then.
    """
    weights = prior.copy()
    right = terms[:, np.arange(len(own)), own]

    def tried(at: ExactArray) -> tuple[float, ExactArray]:
        """The penalised log-likelihood, and how likely each task is for each row `[N, S]`."""
        scores = np.einsum("j,jns->ns", at, terms)
        highest = scores.max(1, keepdims=True)
        likely = np.exp(scores - highest)
        total = likely.sum(1, keepdims=True)
        likely /= total
        value = (at @ right - highest[:, 0] - np.log(total[:, 0])).sum()
        return float(value - 0.5 * (penalties * (at - prior) ** 2).sum()), likely

    value, likely = tried(weights)
    for _ in range(_STEPS):
        expected = np.einsum("jns,ns->jn", terms, likely)
        gradient = (right - expected).sum(1) - penalties * (weights - prior)
        spread = np.einsum("jns,kns,ns->jk", terms, terms, likely) - expected @ expected.T
        step = np.linalg.solve(spread + np.diag(penalties), gradient)
        largest = float(np.abs(step).max())
        step *= min(1.0, _LARGEST_STEP / max(largest, 1e-12))
        before = value
        for _ in range(_HALVINGS):
            moved = weights + step
            value, likely = tried(moved)
            if value >= before - _ROUNDING * abs(before):
                break
            step /= 2
        weights = moved
        if largest < 1e-6:
            break
    return weights
