"""What routing keeps of a task: its rows as fixed-point embeddings, and exact sums over them.

Embeddings are stored as int16 multiples of 2^-15. Sums and second moments of integers are exact in
float64 (a product is under 2^30, so 2^23 rows stay under 2^53), whatever the order of addition.
That makes a head a function of the *set* of tasks: any arrival order gives the same bits, and
subtracting a task leaves exactly what was there before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray
from router.tasks import TaskKey

FIXED_POINT = float(1 << 15)
FOLDS = 10

ExactArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TaskStatistics:
    """The rows of a task: fixed-point embeddings `[n, D]` int16 and their cluster `[n]`.

    Row i is in fold `i % FOLDS`: rows are stored in an order that does not depend on the file's.
    """

    key: TaskKey
    embeddings: NDArray[np.int16]
    clusters: NDArray[np.int16]

    @property
    def folds(self) -> NDArray[np.int64]:
        """The fold of each row `[n]`."""
        return np.arange(len(self.embeddings)) % FOLDS

    @property
    def vectors(self) -> FloatArray:
        """The embeddings `[n, D]` as float32."""
        return self.embeddings.astype(np.float32) / np.float32(FIXED_POINT)


def to_fixed_point(vectors: FloatArray) -> NDArray[np.int16]:
    """Unit vectors `[n, D]` as int16 multiples of 2^-15."""
    limit = np.iinfo(np.int16).max
    fixed: NDArray[np.int16] = np.clip(np.rint(vectors * FIXED_POINT), -limit, limit).astype(
        np.int16
    )
    return fixed


@dataclass(frozen=True, slots=True)
class Moments:
    """Exact sums over some rows of some tasks, in units of 2^-15 (sums) and 2^-30 (gram).

    `counts` `[M]` and `sums` `[M, D]` are per cluster, `task_of` `[M]` is the cluster's task
    number, `gram` `[D, D]` the second moment over all rows, not centred.
    """

    counts: ExactArray
    sums: ExactArray
    task_of: NDArray[np.int64]
    gram: ExactArray

    def without(self, other: Moments) -> Moments:
        """These sums less those of a subset of the rows. Clusters left without rows go."""
        counts = self.counts - other.counts
        kept = counts > 0
        return Moments(
            counts[kept],
            (self.sums - other.sums)[kept],
            self.task_of[kept],
            self.gram - other.gram,
        )


class PooledMoments:
    """The moments of a changing set of tasks, fold by fold.

    The second moments are carried along when tasks come and go, so that adding the N+1st task
    costs that task's rows and not everybody's.
    """

    def __init__(self, dimension: int) -> None:
        self._grams = np.zeros((FOLDS, dimension, dimension))
        self._tasks: dict[TaskKey, TaskStatistics] = {}

    @property
    def tasks(self) -> list[TaskStatistics]:
        """The tasks in the pool, in canonical order."""
        return [self._tasks[key] for key in sorted(self._tasks)]

    def update(self, tasks: Iterable[TaskStatistics]) -> None:
        """Make the pool hold exactly `tasks`."""
        wanted = {task.key: task for task in tasks}
        for key in set(self._tasks) - set(wanted):
            self._accumulate(self._tasks.pop(key), -1.0)
        for key in set(wanted) - set(self._tasks):
            self._accumulate(wanted[key], 1.0)
            self._tasks[key] = wanted[key]

    def by_fold(self) -> list[Moments]:
        """One `Moments` per fold, all with the same clusters."""
        tasks = self.tasks
        return [
            _moments(tasks, [task.folds == fold for task in tasks], self._grams[fold])
            for fold in range(FOLDS)
        ]

    def total(self) -> Moments:
        """The `Moments` of all rows."""
        tasks = self.tasks
        everything = [np.ones(len(task.embeddings), bool) for task in tasks]
        return _moments(tasks, everything, self._grams.sum(0))

    def _accumulate(self, task: TaskStatistics, sign: float) -> None:
        for fold in range(FOLDS):
            rows = task.embeddings[task.folds == fold].astype(np.float64)
            self._grams[fold] += sign * (rows.T @ rows)


def _moments(
    tasks: Sequence[TaskStatistics], chosen: Sequence[NDArray[np.bool_]], gram: ExactArray
) -> Moments:
    counts, sums, task_of = [], [], []
    for number, (task, mask) in enumerate(zip(tasks, chosen, strict=True)):
        clusters = int(task.clusters.max()) + 1
        member = np.zeros((clusters, len(task.embeddings)))
        member[task.clusters[mask], np.flatnonzero(mask)] = 1.0
        counts.append(member.sum(1))
        sums.append(member @ task.embeddings.astype(np.float64))
        task_of.append(np.full(clusters, number, np.int64))
    return Moments(np.concatenate(counts), np.concatenate(sums), np.concatenate(task_of), gram)
