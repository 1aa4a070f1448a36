"""Thresholds of a catalog in which every task keeps statistics only: no row can be held out.

Of a nearest-mean head the scores of a task's own rows are cosines to its mean, whose mean and
variance the sums tell exactly; they are taken as normal. A fresh row lies further from a mean that
does not know it: the cosine of a row to the mean of the others follows from its own exactly, and is
what counts. The score of a discriminant is compared
with 0, where a text is as likely to be of the task as to be text in general: that rejects less
than held-out rows would have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from router.interfaces import FloatArray
from router.statistics import FIXED_POINT, TaskStatistics


def thresholds_without_rows(
    head: str, tasks: Sequence[TaskStatistics], false_reject_rate: float
) -> FloatArray:
    """A threshold `[K]` for each of `tasks`, all of which keep statistics only."""
    if head != "nearest-mean":
        return np.zeros(len(tasks), np.float32)
    if false_reject_rate <= 0:
        return np.full(len(tasks), -np.inf, np.float32)
    deviations = NormalDist().inv_cdf(false_reject_rate)
    return np.array([_cosine_at(task, deviations) for task in tasks], np.float32)


def _cosine_at(task: TaskStatistics, deviations: float) -> float:
    """The mean cosine of a task's rows to their mean, so many standard deviations further up.

    It is that to the mean without the row itself: with n rows, m their mean and c the cosine of a
    unit vector x to it, that of the others is (n m - x) / (n - 1).
    """
    if task.sums is None:
        return -np.inf
    count = float(task.sums.counts.sum())
    mean = task.sums.sums.sum(0) / count / FIXED_POINT
    length = max(float(np.linalg.norm(mean)), 1e-12)
    direction = mean / length
    second = float(direction @ (task.sums.gram @ direction)) / count / FIXED_POINT**2
    cosine = length + deviations * math.sqrt(max(second - length**2, 0.0))
    if count < 2:
        return cosine
    # Lengths times n - 1, which goes out.
    others = math.sqrt(max((count * length) ** 2 - 2 * count * length * cosine + 1, 1e-12))
    return (count * length * cosine - 1) / others
