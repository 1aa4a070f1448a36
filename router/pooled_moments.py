"""The moments of a changing set of tasks, carried along as tasks come and go."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router.ordered_rows import OrderedRows
from router.statistics import (
    FOLDS,
    ChosenRows,
    ExactArray,
    Moments,
    TaskStatistics,
    sums_by_cluster,
    sums_of_folds,
    sums_of_tasks,
)
from router.tasks import TaskKey
from router.threads import one_blas_thread

_CHUNK_ROWS = 4096
_key_of = operator.attrgetter("key")


@dataclass(frozen=True, slots=True)
class KnownSums:
    """Exact sums over the rows of tasks in order, in the units of `Moments`.

    Task t has clusters `first[t]` to `first[t + 1]` (`first` is `[K + 1]`), of counts `[M]` and
    sums `[M, D]`; `gram` `[D, D]` is over all rows.
    """

    tasks: Sequence[TaskStatistics]
    first: NDArray[np.int64]
    counts: ExactArray
    sums: ExactArray
    gram: ExactArray


class PooledMoments:
    """The moments of a changing set of tasks, fold by fold.

    Sums and second moments are carried along when tasks come and go, so that adding the N+1st task
    costs that task's rows and not everybody's. They are brought up to date when they are asked for:
    second moments take most of the time, and some heads need neither.

    While a task keeps statistics only, each task is one cluster in the moments: a task that has
    several scores higher, and would draw rows from those that have one and set their thresholds.
    """

    def __init__(self, dimension: int) -> None:
        self._grams = np.zeros((FOLDS, dimension, dimension))
        self._gram_without_rows = np.zeros((dimension, dimension))
        self._tasks: dict[TaskKey, TaskStatistics] = {}
        # The tasks whose second moments are in the grams of the folds, and those whose are in one
        # of all folds.
        self._summed: dict[TaskKey, TaskStatistics] = {}
        self._gram_of_known = np.zeros((0, 0))
        self._known: dict[TaskKey, TaskStatistics] = {}
        self._in_order: list[TaskStatistics] = []
        self._columns: dict[Callable[[TaskStatistics], int], NDArray[np.uint64]] = {}
        # The tasks whose sums are in the next three, in order.
        self._added: list[TaskStatistics] = []
        # Their clusters: of task t those from `_first[t]` to `_first[t + 1]`.
        self._first = np.zeros(1, np.int64)
        self._counts = np.zeros(0)
        self._sums = OrderedRows(dimension)
        # Counts `[FOLDS, M]` and sums `[FOLDS, M, D]` of each task, once they were asked for.
        self._fold_sums: dict[TaskKey, tuple[ExactArray, ExactArray]] = {}

    @property
    def tasks(self) -> list[TaskStatistics]:
        """The tasks in the pool, in canonical order."""
        return self._in_order

    @property
    def cluster_counts(self) -> NDArray[np.int64]:
        """How many clusters each task has `[K]`."""
        self._add_up()
        return np.diff(self._first)

    def update(self, tasks: Iterable[TaskStatistics]) -> None:
        """Make the pool hold exactly `tasks`."""
        wanted = {task.key: task for task in tasks}
        self.hold(wanted.keys(), wanted.__getitem__)

    def hold(self, keys: Collection[TaskKey], read: Callable[[TaskKey], TaskStatistics]) -> None:
        """Make the pool hold exactly the tasks of `keys`; `read` gives those that it has not."""
        going = self._tasks.keys() - keys
        coming = sorted(map(read, keys - self._tasks.keys()), key=_key_of)
        if not going and not coming:
            return
        left = [number for number, task in enumerate(self._in_order) if task.key in going]
        stay = [task for task in self._in_order if task.key not in going] if going else None
        order = [*self._in_order] if stay is None else stay
        places = [bisect.bisect(order, task.key, key=_key_of) for task in coming]
        for place, task in reversed([*zip(places, coming, strict=True)]):
            order.insert(place, task)
        for of, column in self._columns.items():
            values = np.array([*map(of, coming)], column.dtype)
            self._columns[of] = np.insert(np.delete(column, left), places, values)
        for key in going:
            del self._tasks[key]
            self._fold_sums.pop(key, None)
        self._tasks.update((task.key, task) for task in coming)
        self._in_order = order

    def column(self, of: Callable[[TaskStatistics], int]) -> NDArray[np.uint64]:
        """A number, `of` each task in order `[K]`, which is worked out once a task.

        Of the same function, the numbers are carried along when tasks come and go.
        """
        if of not in self._columns:
            self._columns[of] = np.array([*map(of, self._in_order)], np.uint64)
        return self._columns[of]

    def by_fold(self) -> list[Moments]:
        """One `Moments` per fold, all with the same clusters."""
        for task in self.tasks:
            if task.key not in self._fold_sums:
                self._fold_sums[task.key] = sums_of_folds(task)
        of_tasks = [self._fold_sums[task.key] for task in self.tasks]
        self._known = {}  # they are not known of each fold
        self._sum_up()
        return [
            self._comparable(
                Moments(
                    np.concatenate([counts[fold] for counts, _ in of_tasks]),
                    np.concatenate([sums[fold] for _, sums in of_tasks]),
                    self._task_of(),
                    self._grams[fold],
                )
            )
            for fold in range(FOLDS)
        ]

    def without_rows(self) -> Moments:
        """The `Moments` of the tasks that keep statistics only: they belong to no fold."""
        kept = np.repeat([task.sums is None for task in self.tasks], self.cluster_counts)
        self._sum_up()
        return self._comparable(
            Moments(
                np.where(kept, 0.0, self._counts),
                np.where(kept[:, None], 0.0, self._sums.rows),
                self._task_of(),
                self._gram_without_rows,
            )
        )

    def total(self) -> Moments:
        """The `Moments` of all rows, kept or not. They are the pool's own, until it changes."""
        self._sum_up()
        gram = self._grams.sum(0) + self._gram_without_rows
        if self._known:
            gram += self._gram_of_known
        return replace(self.first_moments(), gram=gram)

    def known_sums(self) -> KnownSums | None:
        """What `know` takes; None where some tasks keep statistics only."""
        if any(task.sums is not None for task in self._in_order):
            return None
        total = self.total()
        return KnownSums(self._in_order, self._first, total.counts, total.sums, total.gram)

    def know(self, sums: KnownSums) -> None:
        """Take over the sums of tasks, so that their rows need not be read; nobody may be here."""
        self._in_order = self._added = list(sums.tasks)
        self._tasks = {task.key: task for task in sums.tasks}
        self._known, self._gram_of_known = dict(self._tasks), sums.gram
        self._first, self._counts = sums.first, sums.counts
        self._sums.insert([0] * len(sums.sums), sums.sums)

    def first_moments(self) -> Moments:
        """As `total`, but `gram` is empty."""
        self._add_up()
        return self._comparable(
            Moments(self._counts, self._sums.rows, self._task_of(), np.zeros((0, 0)))
        )

    def held_out(self, chosen: ChosenRows) -> Moments:
        """The sums of the tasks of which rows are `chosen`, less those of these rows.

        `gram` is empty. Clusters that are left without rows are not among them.
        """
        numbers, place = np.unique(chosen.task, return_inverse=True)
        if self._added is self._in_order:
            sizes = np.diff(self._first)
            mine = np.isin(np.repeat(np.arange(len(sizes)), sizes), numbers)
            counts, sums = self._counts[mine], self._sums.rows[mine]
            first = np.zeros(len(numbers) + 1, np.int64)
            np.cumsum(sizes[numbers], out=first[1:])
        else:
            tasks = [self.tasks[number] for number in numbers.tolist()]
            counts, sums, first = sums_of_tasks(tasks)
        taken_counts, taken_sums = sums_by_cluster(
            chosen.of(lambda task: self.tasks[task].embeddings),
            first[place] + chosen.of(lambda task: self.tasks[task].clusters),
            len(counts),
        )
        left = counts - taken_counts
        return self._comparable(
            Moments(
                left[left > 0],
                (sums - taken_sums)[left > 0],
                np.repeat(numbers, np.diff(first))[left > 0],
                np.zeros((0, 0)),
            )
        )

    def _comparable(self, moments: Moments) -> Moments:
        """`moments`, or those with one cluster a task where some tasks have no more than that."""
        if all(task.sums is None for task in self._in_order) or not len(moments.counts):
            return moments
        tasks, first = np.unique(moments.task_of, return_index=True)
        return Moments(
            np.add.reduceat(moments.counts, first),
            np.add.reduceat(moments.sums, first, axis=0),
            tasks,
            moments.gram,
        )

    def _task_of(self) -> NDArray[np.int64]:
        """The number of each cluster's task."""
        return np.repeat(np.arange(len(self._in_order)), self.cluster_counts)

    def _add_up(self) -> None:
        """Bring counts and sums up to date with the tasks."""
        if self._added is self._in_order:
            return
        gone = {task.key for task in self._added if self._tasks.get(task.key) is not task}
        if gone:
            self._leave(gone)
        known = {task.key for task in self._added}
        coming = [task for task in self._in_order if task.key not in known]
        if coming:
            self._join(coming)
        self._added = self._in_order

    def _leave(self, gone: Collection[TaskKey]) -> None:
        sizes = np.diff(self._first)
        stays = np.array([task.key not in gone for task in self._added])
        kept = np.repeat(stays, sizes)
        self._sums.remove(np.flatnonzero(~kept).tolist())
        self._counts = self._counts[kept]
        self._first = np.cumsum([0, *sizes[stays]])
        self._added = [task for task in self._added if task.key not in gone]

    def _join(self, coming: Sequence[TaskStatistics]) -> None:
        """Take up tasks, which are in canonical order, at their places."""
        keys = [task.key for task in self._added]
        places = [bisect.bisect(keys, task.key) for task in coming]
        counts, sums, first = sums_of_tasks(coming)
        clusters = np.diff(first)
        before = np.repeat(self._first[places], clusters)
        self._sums.insert(before.tolist(), sums)
        self._counts = np.insert(self._counts, before, counts)
        self._first = np.cumsum([0, *np.insert(np.diff(self._first), places, clusters)])

    def _sum_up(self) -> None:
        """Bring the second moments up to date with the tasks."""
        left = [each for key, each in self._known.items() if self._tasks.get(key) is not each]
        going = [each for key, each in self._summed.items() if self._tasks.get(key) is not each]
        coming = [
            each
            for key, each in self._tasks.items()
            if self._summed.get(key) is not each and self._known.get(key) is not each
        ]
        with one_blas_thread():
            for task in left:
                del self._known[task.key]
                rows = task.embeddings.astype(np.float64)
                self._gram_of_known -= rows.T @ rows
            self._accumulate(going, np.subtract)
            self._accumulate(coming, np.add)
        self._summed = {key: each for key, each in self._tasks.items() if key not in self._known}

    def _accumulate(self, tasks: Sequence[TaskStatistics], change: np.ufunc) -> None:
        """Add the second moments of `tasks`, or subtract them: many rows in one product."""
        for task in tasks:
            if task.sums is not None:
                change(self._gram_without_rows, task.sums.gram, out=self._gram_without_rows)
        kept = [task.embeddings for task in tasks if task.sums is None]
        for fold in range(FOLDS):
            for rows in _in_chunks([embeddings[fold::FOLDS] for embeddings in kept]):
                change(self._grams[fold], rows.T @ rows, out=self._grams[fold])


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
