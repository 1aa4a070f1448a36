"""What routing keeps of a task: its rows as fixed-point embeddings, and exact sums over them.

Embeddings are stored as int16 multiples of 2^-15. Sums and second moments of integers are exact in
float64 (a product is under 2^30, so 2^23 rows stay under 2^53), whatever the order of addition.
That makes a head a function of the *set* of tasks: any arrival order gives the same bits, and
subtracting a task leaves exactly what was there before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray
from router.tasks import TaskKey
from router.threads import one_blas_thread

FIXED_POINT = float(1 << 15)
# Of 5 and 10, 5 rejects fresh rows at rates nearest to what is asked for, and fits least often.
FOLDS = 5
_OF_ROWS = ("embeddings", "clusters")

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
    def row_count(self) -> int:
        """n, how many rows are kept."""
        return len(self.embeddings)

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


def row_count_of(task: TaskStatistics) -> int:
    """How many rows a task keeps."""
    return task.row_count


class UnreadStatistics(TaskStatistics):
    """The rows of a task, of which only the number is known until they are asked for.

    A large catalog's head can be compiled from few of them. Threads may share it.
    """

    __slots__ = ("_read", "row_count")

    row_count: int

    def __init__(self, key: TaskKey, row_count: int, read: Callable[[], TaskStatistics]) -> None:
        """`read` gives the `row_count` rows, or raises what is wrong with them, at first need."""
        # The fields of the rows stay empty: who asks for one of them comes to `__getattr__`.
        values = {"key": key, "sums": None, "row_count": row_count, "_read": read}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> NDArray[np.int16]:
        if name not in _OF_ROWS:
            raise AttributeError(name)
        read: TaskStatistics = object.__getattribute__(self, "_read")()
        for field in _OF_ROWS:
            object.__setattr__(self, field, getattr(read, field))
        found: NDArray[np.int16] = getattr(read, name)
        return found


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
        sums, task_of, kept = self.sums - other.sums, self.task_of, counts > 0
        if not kept.all():
            counts, sums, task_of = counts[kept], sums[kept], task_of[kept]
        return Moments(counts, sums, task_of, self.gram - other.gram)


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """Some rows `[n]` of some tasks: the number of each one's task, ascending, and its own."""

    task: NDArray[np.int64]
    row: NDArray[np.int64]

    def of(self, array: Callable[[int], NDArray[np.int16]]) -> NDArray[np.int16]:
        """The chosen rows `[n, ...]` of the arrays of the tasks, by their numbers."""
        pairs = zip(self.task.tolist(), self.row.tolist(), strict=True)
        return np.stack([array(task)[row] for task, row in pairs])


def sums_of_each(tasks: Sequence[TaskStatistics]) -> Moments:
    """The `Moments` of tasks, in this order, for heads that need no more of them.

    Each task is one cluster, and `gram` is empty.
    """
    counts, sums, first = sums_of_tasks(tasks)
    return Moments(
        np.add.reduceat(counts, first[:-1]),
        np.add.reduceat(sums, first[:-1], axis=0),
        np.arange(len(tasks)),
        np.zeros((0, 0)),
    )


def sums_of_tasks(
    tasks: Sequence[TaskStatistics],
) -> tuple[ExactArray, ExactArray, NDArray[np.int64]]:
    """Exact counts `[M]` and sums `[M, D]` of the clusters of tasks, and where each task begins.

    Task t has clusters `first[t]` to `first[t + 1]`.
    """
    counts, sums = zip(*(_sums_of_task(task) for task in tasks), strict=True)
    first = np.cumsum([0, *(len(each) for each in counts)])
    return np.concatenate(counts), np.concatenate(sums), first


def _sums_of_task(task: TaskStatistics) -> tuple[ExactArray, ExactArray]:
    """Exact counts `[M]` and sums `[M, D]` over all rows of a task's clusters."""
    if task.sums is not None:
        return task.sums.counts, task.sums.sums
    return sums_by_cluster(task.embeddings, task.clusters.astype(np.int64), task.cluster_count)


def sums_of_folds(task: TaskStatistics) -> tuple[ExactArray, ExactArray]:
    """Exact counts `[FOLDS, M]` and sums `[FOLDS, M, D]`; none where a task keeps no rows."""
    of_folds = [
        sums_by_cluster(
            task.embeddings[fold::FOLDS],
            task.clusters[fold::FOLDS].astype(np.int64),
            task.cluster_count,
        )
        for fold in range(FOLDS)
    ]
    counts, sums = zip(*of_folds, strict=True)
    return np.stack(counts), np.stack(sums)


def sums_by_cluster(
    rows: NDArray[np.int16], cluster: NDArray[np.int64], clusters: int
) -> tuple[ExactArray, ExactArray]:
    """Exact counts `[M]` and sums `[M, D]` of rows `[n, D]` that are of a `cluster` `[n]` each."""
    order = np.argsort(cluster, kind="stable")
    filled, begins = np.unique(cluster[order], return_index=True)
    sums = np.zeros((clusters, rows.shape[1]))
    if len(rows):
        sums[filled] = np.add.reduceat(rows[order].astype(np.float64), begins, axis=0)
    return np.bincount(cluster, minlength=clusters).astype(np.float64), sums
