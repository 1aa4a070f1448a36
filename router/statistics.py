"""What routing keeps of a task: its rows as fixed-point embeddings, and exact sums over them.

Embeddings are stored as int16 multiples of 2^-15. Sums and second moments of integers are exact in
float64 (a product is under 2^30, so 2^23 rows stay under 2^53), whatever the order of addition.
That makes a head a function of the *set* of tasks: any arrival order gives the same bits, and
subtracting a task leaves exactly what was there before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray
from router.tasks import TaskKey
from router.threads import one_blas_thread

FIXED_POINT = float(1 << 15)
FOLDS = 10
_CHUNK_ROWS = 4096

ExactArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TaskSums:
    """Exact sums over the rows of a task that keeps no embeddings, in the units of `Moments`.

    counts `[M]` and sums `[M, D]` are per cluster, gram `[D, D]` is over all rows.
    """

    counts: ExactArray
    sums: ExactArray
    gram: ExactArray


@dataclass(frozen=True, slots=True)
class TaskStatistics:
    """The rows of a task: fixed-point embeddings `[n, D]` int16 and their cluster `[n]`.

    Row i is in fold `i % FOLDS`: rows are stored in an order that does not depend on the file's.
    A task that keeps statistics only has no rows here, and `sums` instead.
    """

    key: TaskKey
    embeddings: NDArray[np.int16]
    clusters: NDArray[np.int16]
    sums: TaskSums | None = None

    @property
    def cluster_count(self) -> int:
        """How many clusters the rows are in."""
        return int(self.clusters.max()) + 1 if self.sums is None else len(self.sums.counts)

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


def sums_of(embeddings: NDArray[np.int16]) -> TaskSums:
    """What a task keeps of its embeddings `[n, D]` in statistics-only mode: one cluster of them.

    (The sum of a small cluster would tell its rows.)
    """
    rows = embeddings.astype(np.float64)
    with one_blas_thread():
        return TaskSums(np.array([float(len(rows))]), rows.sum(0, keepdims=True), rows.T @ rows)


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
        self._gram_without_rows = np.zeros((dimension, dimension))
        self._tasks: dict[TaskKey, TaskStatistics] = {}
        self._in_order: list[TaskStatistics] = []
        # Of each task: those of all its rows, so that they need not be read again.
        self._sums: dict[TaskKey, TaskSumsByCluster] = {}

    @property
    def tasks(self) -> list[TaskStatistics]:
        """The tasks in the pool, in canonical order."""
        return self._in_order

    def update(self, tasks: Iterable[TaskStatistics]) -> None:
        """Make the pool hold exactly `tasks`."""
        wanted = {task.key: task for task in tasks}
        going = [self._tasks[key] for key in self._tasks.keys() - wanted.keys()]
        coming = [wanted[key] for key in wanted.keys() - self._tasks.keys()]
        with one_blas_thread():
            self._accumulate(going, np.subtract)
            self._accumulate(coming, np.add)
        for task in going:
            del self._tasks[task.key], self._sums[task.key]
        for task in coming:
            self._tasks[task.key] = task
            self._sums[task.key] = _sums_by_cluster(task)
        self._in_order = sorted(
            self._tasks.values(), key=lambda task: (task.key.name, task.key.revision)
        )

    def by_fold(self) -> list[Moments]:
        """One `Moments` per fold, all with the same clusters."""
        return [self.of_fold(fold) for fold in range(FOLDS)]

    def of_fold(self, fold: int) -> Moments:
        """The `Moments` of the rows of one fold. (Exact: the order of addition does not matter.)"""
        tasks = self.tasks
        first = np.cumsum([0, *(task.cluster_count for task in tasks)])
        cluster = np.concatenate(
            [start + task.clusters[fold::FOLDS] for start, task in zip(first, tasks, strict=False)]
        )
        order = np.argsort(cluster, kind="stable")
        filled, begins = np.unique(cluster[order], return_index=True)
        rows = np.concatenate([task.embeddings[fold::FOLDS] for task in tasks])
        sums = np.zeros((first[-1], len(self._grams[fold])))
        if len(rows):
            sums[filled] = np.add.reduceat(rows[order].astype(np.float64), begins, axis=0)
        return Moments(
            np.bincount(cluster, minlength=first[-1]).astype(np.float64),
            sums,
            np.repeat(np.arange(len(tasks)), np.diff(first)),
            self._grams[fold],
        )

    def without_rows(self) -> Moments:
        """The `Moments` of the tasks that keep statistics only: they belong to no fold."""
        tasks = self.tasks
        dimension = len(self._gram_without_rows)
        counts = [np.zeros(t.cluster_count) if t.sums is None else t.sums.counts for t in tasks]
        sums = [
            np.zeros((t.cluster_count, dimension)) if t.sums is None else t.sums.sums for t in tasks
        ]
        return Moments(
            np.concatenate(counts),
            np.concatenate(sums),
            np.repeat(np.arange(len(tasks)), [t.cluster_count for t in tasks]),
            self._gram_without_rows,
        )

    def total(self) -> Moments:
        """The `Moments` of all rows, kept or not."""
        sums = [self._sums[task.key] for task in self.tasks]
        return Moments(
            np.concatenate([each.counts for each in sums]),
            np.concatenate([each.sums for each in sums]),
            np.repeat(np.arange(len(sums)), [len(each.counts) for each in sums]),
            self._grams.sum(0) + self._gram_without_rows,
        )

    def held_out(self, chosen: Sequence[NDArray[np.int64]]) -> Moments:
        """The sums of the tasks of which rows are `chosen` `[K][n_k]`, less those of these rows.

        `gram` is empty. Clusters that are left without rows are not among them.
        """
        counts, sums, numbers = [], [], []
        for number, (task, rows) in enumerate(zip(self.tasks, chosen, strict=True)):
            if not len(rows):
                continue
            all_rows, clusters = self._sums[task.key], task.clusters[rows]
            left, less = all_rows.counts.copy(), all_rows.sums.copy()
            np.subtract.at(left, clusters, 1.0)
            np.subtract.at(less, clusters, task.embeddings[rows].astype(np.float64))
            counts.append(left[left > 0])
            sums.append(less[left > 0])
            numbers.append(np.full(int((left > 0).sum()), number))
        return Moments(
            np.concatenate(counts), np.concatenate(sums), np.concatenate(numbers), np.zeros((0, 0))
        )

    def _accumulate(self, tasks: Sequence[TaskStatistics], change: np.ufunc) -> None:
        """Add the second moments of `tasks`, or subtract them: many rows in one product."""
        for task in tasks:
            if task.sums is not None:
                change(self._gram_without_rows, task.sums.gram, out=self._gram_without_rows)
        kept = [task.embeddings for task in tasks if task.sums is None]
        for fold in range(FOLDS):
            for rows in _in_chunks([embeddings[fold::FOLDS] for embeddings in kept]):
                change(self._grams[fold], rows.T @ rows, out=self._grams[fold])


@dataclass(frozen=True, slots=True)
class TaskSumsByCluster:
    """Exact counts `[M]` and sums `[M, D]` over all rows of a task's clusters."""

    counts: ExactArray
    sums: ExactArray


def _sums_by_cluster(task: TaskStatistics) -> TaskSumsByCluster:
    if task.sums is not None:
        return TaskSumsByCluster(task.sums.counts, task.sums.sums)
    sums = np.zeros((task.cluster_count, task.embeddings.shape[1]))
    for cluster in range(task.cluster_count):
        sums[cluster] = task.embeddings[task.clusters == cluster].sum(0, dtype=np.int64)
    return TaskSumsByCluster(
        np.bincount(task.clusters, minlength=task.cluster_count).astype(np.float64), sums
    )


def _in_chunks(parts: Sequence[NDArray[np.int16]]) -> Iterator[ExactArray]:
    """Rows of many tasks `[about _CHUNK_ROWS, D]` at a time, as numbers to multiply."""
    waiting: list[NDArray[np.int16]] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        if count >= _CHUNK_ROWS:
            yield np.concatenate(waiting).astype(np.float64)
            waiting, count = [], 0
    if count:
        yield np.concatenate(waiting).astype(np.float64)


def added(parts: Sequence[Moments]) -> Moments:
    """The sum of moments that have the same clusters."""
    total = Moments(
        parts[0].counts.copy(), parts[0].sums.copy(), parts[0].task_of, parts[0].gram.copy()
    )
    for part in parts[1:]:
        np.add(total.counts, part.counts, out=total.counts)
        np.add(total.sums, part.sums, out=total.sums)
        np.add(total.gram, part.gram, out=total.gram)
    return total
