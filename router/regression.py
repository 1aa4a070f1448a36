"""Multinomial logistic regression over the tasks: rows that are fitted to tell them apart.

The discriminant knows a task by its means and what all tasks spread like; where tasks lie close
together, the rows between them say better where the border is. The regression counts towards the
scores as one more linear term, so that a search costs nothing more.

It is stopped early, after a fixed number of steps, which regularises it as well as its penalty
does. Steps are accelerated (Nesterov 1983) and measured by the covariance of all rows, which bounds
the curvature (Böhning 1992, Annals of the Institute of Statistical Mathematics 44). The bound is
seldom reached: steps are longer at first, and one that raises the loss is taken back. The same
input gives the same bits.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from router.examples import LEAST_EXAMPLES_PER_TASK, examples_per_task
from router.fitting import row_scores
from router.interfaces import FloatArray
from router.inverse import RealArray

PENALTY = 0.01
"""In units of the mean variance of an embedding's dimensions."""

# Rows times tasks: a publish has six fits of about a fifth of a second each then, with 1,152
# dimensions on one core.
_MOST_PAIRS = 1 << 19
# Chosen on training rows of public data sets: of 2 to 30, where held-out rows gain no more.
_STEPS = 8
_LONGEST_STEP = np.float32(4.0)
_LEAST_RISE = 1e-6
_LEAST_PROBABILITY = np.float32(1e-30)


def regression_rows_per_task(tasks: int) -> int:
    """How many rows of each of so many tasks are fitted at most; 0 where there is no regression."""
    if tasks < 2:
        return 0
    most = min(examples_per_task(tasks), _MOST_PAIRS // tasks**2)
    return most if most >= LEAST_EXAMPLES_PER_TASK else 0


def fit_regression(
    centered: FloatArray, task: NDArray[np.int64], tasks: int, metric: RealArray
) -> FloatArray:
    """Rows `[K, D + 1]` for K `tasks`, from N embeddings `[N, D]` and their task numbers `[N]`.

    Task numbers ascend. `metric` `[D, D]` is what `router.fitting.step_metric` makes with
    `PENALTY`. Rows are for `[x ; 1]`, x centred as the embeddings are; their products are
    log-probabilities of the tasks, up to what all tasks share.
    """
    count, dimension = centered.shape
    own = np.arange(count), task
    penalty = np.float32(PENALTY) * np.float32(np.vdot(centered, centered) / (count * dimension))
    rows = ahead = np.zeros((tasks, dimension + 1), np.float32)
    # The products of the embeddings with `rows` and `ahead`. Nearly all time goes into products:
    # those with zeros, and with rows that a step is taken back to, are known without.
    odds = np.zeros((count, tasks), np.float32)
    odds_ahead: FloatArray | None = odds
    likely = np.empty_like(odds)
    momentum, push, step, last_loss = 1.0, np.float32(0), _LONGEST_STEP, np.inf
    for number in range(_STEPS):
        if odds_ahead is None:
            odds_ahead = row_scores(ahead, centered)
            # `rows` lie between the rows before them and those ahead.
            odds *= push
            odds += odds_ahead
            odds /= 1 + push
        np.subtract(odds_ahead, odds_ahead.max(1, keepdims=True), out=likely)
        np.exp(likely, out=likely)
        likely /= likely.sum(1, keepdims=True)
        loss = -float(np.log(np.maximum(likely[own], _LEAST_PROBABILITY)).mean())
        loss += 0.5 * float(penalty) * float(np.square(ahead[:, :-1]).sum())
        if loss > last_loss + _LEAST_RISE and step > 1:
            ahead, odds_ahead, momentum, step, last_loss = rows, odds, 1.0, step / 2, np.inf
            continue
        last_loss = loss
        likely[own] -= 1
        moved = ahead.copy()
        pull = likely.T @ centered if number else _pull_of_zeros(centered, task, tasks)
        gradient = pull / np.float32(count) + penalty * ahead[:, :-1]
        moved[:, :-1] -= step * (gradient @ metric)
        # Of a constant 1, half the curvature's bound is half the covariance, too.
        moved[:, -1] -= step * 2 * likely.mean(0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        push = np.float32((momentum - 1) / following)
        ahead, odds_ahead = moved + push * (moved - rows), None
        rows, momentum = moved, following
    return rows


def _pull_of_zeros(centered: FloatArray, task: NDArray[np.int64], tasks: int) -> FloatArray:
    """The gradient `[K, D]` at rows of zeros, times N: all tasks are as likely there."""
    starts = np.searchsorted(task, np.arange(tasks + 1)).tolist()
    sums = np.stack([centered[a:b].sum(0) for a, b in itertools.pairwise(starts)])
    pull: FloatArray = sums.sum(0) / np.float32(tasks) - sums
    return pull
