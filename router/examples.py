"""Closeness: how near a text is to the nearest stored rows of a task.

Means and covariances smooth over what a task's rows are really like. The mean cosine to the five
nearest stored rows tells what they leave out: it decides between tasks that lie close together, and
it keeps texts away that lie between a task's rows and text in general. Cosines are of centred and
partly whitened embeddings (`router.whitening`). A row that is alone reaches further than one in a
crowd: two fifths of the mean cosine to its own five nearest are taken off (after the local outlier
factor, Breunig et al. 2000).

A head keeps a bounded sample for that: at most 16,384 rows in all (36 MiB at 1,152 dimensions), the
same number of each task and at most 256, and none where that would be fewer than four. A search
looks at the rows of the five tasks that are best without them.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray
from router.statistics import (
    FIXED_POINT,
    FOLDS,
    ChosenRows,
    TaskStatistics,
    to_fixed_point,
)
from router.whitening import whitened

MAX_EXAMPLES = 16_384
MAX_EXAMPLES_PER_TASK = 256
LEAST_EXAMPLES_PER_TASK = 4
SHORTLIST = 5
NEIGHBOURS = 5

ForEach = Callable[..., Iterable[Any]]
"""`map`, or that of a pool of threads."""

# How much of the cosine to its nearest neighbours an example gives up, and what that is for a lone
# one. Of 0 to 0.75, and of 1 to 5 neighbours, chosen on rows of tasks that were left out.
_CROWDING = np.float32(0.4)
_COSINE_WHEN_ALONE = np.float32(0.5)

# Less than any closeness, for a task none of whose rows may be looked at.
_LEAST_CLOSENESS = np.float32(-1.25)


@dataclass(frozen=True, slots=True)
class Examples:
    """Stored rows of the tasks: whitened unit vectors `[E, D]` int16, and biases `[E]`.

    Those of task t are `starts[t]` to `starts[t + 1]` (`starts` is `[K + 1]`). Example i of a task
    is its stored row i. Embeddings were centred at `center` `[D]` and whitened with `whitening`
    `[D, R]`. `made` is what `rows` gives, where it was made on the way.
    """

    vectors: NDArray[np.int16]
    biases: FloatArray
    starts: NDArray[np.int64]
    center: FloatArray
    whitening: FloatArray
    made: FloatArray | None = None

    def fit(self, tasks: int, dimension: int) -> bool:
        """Whether these are examples for so many tasks in so many dimensions."""
        return (
            self.vectors.ndim == 2
            and self.vectors.shape[1] == dimension
            and self.vectors.dtype == np.int16
            and self.biases.shape == (len(self.vectors),)
            and bool(np.isfinite(self.biases).all())
            and self.starts.shape == (tasks + 1,)
            and int(self.starts[0]) == 0
            and int(self.starts[-1]) == len(self.vectors)
            and bool((np.diff(self.starts) > 0).all())
            and self.whitening.ndim == 2
            and len(self.whitening) == dimension
            and bool(np.isfinite(self.whitening).all())
        )

    def rows(self) -> FloatArray:
        """Rows `[E, D + 1]`: with `[u ; 1]`, u a whitened unit vector, the cosine plus the bias."""
        if self.made is not None:
            return self.made
        rows = np.empty((len(self.vectors), self.vectors.shape[1] + 1), np.float32)
        np.divide(self.vectors, np.float32(FIXED_POINT), out=rows[:, :-1])
        rows[:, -1] = self.biases
        return rows


def examples_per_task(tasks: int) -> int:
    """How many examples each of so many tasks has at most; 0 where none has any."""
    most = min(MAX_EXAMPLES // max(tasks, 1), MAX_EXAMPLES_PER_TASK)
    return most if tasks and most >= LEAST_EXAMPLES_PER_TASK else 0


def sample_examples(
    tasks: Sequence[TaskStatistics],
    center: FloatArray,
    whitening: FloatArray,
    for_each: ForEach = map,
) -> Examples | None:
    """The first rows of every task, as good as drawn; None where there are too many tasks.

    How many depends on the number of tasks alone, so that the same tasks give the same examples.
    Embeddings are centred at `center` `[D]` and whitened with `whitening` `[D, R]`. `for_each` is
    `map`, or that of a pool of threads.
    """
    most = examples_per_task(len(tasks))
    if not most:
        return None

    sizes = [min(len(task.embeddings), most) for task in tasks]
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    vectors = np.empty((int(starts[-1]), len(center)), np.int16)
    rows = np.empty((len(vectors), len(center) + 1), np.float32)

    def fill(task: TaskStatistics, begin: int, end: int) -> None:
        centered = _floats(task.embeddings[:most])
        centered -= center
        vectors[begin:end] = to_fixed_point(whitened(centered, whitening))
        mine = rows[begin:end]
        np.divide(vectors[begin:end], np.float32(FIXED_POINT), out=mine[:, :-1])
        mine[:, -1] = _crowding(mine[:, :-1])

    list(for_each(fill, tasks, starts[:-1].tolist(), starts[1:].tolist()))
    return Examples(vectors, rows[:, -1].copy(), starts, center, whitening, rows)


def _crowding(vectors: FloatArray) -> FloatArray:
    """The bias `[n]` of each of a task's examples `[n, D]`."""
    others = min(len(vectors) - 1, NEIGHBOURS)
    nearest = np.full(1, _COSINE_WHEN_ALONE)
    if others:
        cosines = vectors @ vectors.T
        np.fill_diagonal(cosines, _LEAST_CLOSENESS)
        nearest = _mean_of_highest(cosines, others)
    return np.asarray(-_CROWDING * nearest, np.float32)


def _floats(fixed: NDArray[np.int16]) -> FloatArray:
    return fixed.astype(np.float32) / np.float32(FIXED_POINT)


class Closeness:
    """The mean product with a task's nearest examples, times `weight`. Threads may share it.

    Embeddings are to be centred at `center` `[D]`.
    """

    def __init__(self, examples: Examples, weight: float) -> None:
        self._of_task = np.split(examples.rows(), examples.starts[1:-1])
        sizes = np.diff(examples.starts)
        self._fewest, self._most = int(sizes.min()), int(sizes.max())
        self._whitening = examples.whitening
        self.center = examples.center
        self.weight = np.float32(weight)

    def weighing(self, weight: float) -> Closeness:
        """The same, times another weight. The rows are shared."""
        other = copy.copy(self)
        other.weight = np.float32(weight)
        return other

    def of(
        self,
        centered: FloatArray,
        tasks: NDArray[np.int64],
        *,
        without_fold: int | None = None,
        stored: ChosenRows | None = None,
    ) -> FloatArray:
        """Closeness `[B, S]` of each centred embedding `[B, D]` to each of its tasks `[B, S]`.

        Examples of the fold `without_fold` are left out. Where the embeddings are those of the
        `stored` rows, none counts as close to itself.
        """
        nearest = np.full(tasks.size, _LEAST_CLOSENESS)
        if not tasks.size:
            return nearest.reshape(tasks.shape)
        queries = np.ones((len(centered), centered.shape[1] + 1), np.float32)
        queries[:, :-1] = whitened(centered, self._whitening)
        alone = len(queries) == 1 and without_fold is None and stored is None
        if alone and self._fewest >= NEIGHBOURS:
            return self._of_one(queries[0], tasks[0])[None]
        by_task = np.argsort(tasks, axis=None, kind="stable")
        numbers = tasks.ravel()[by_task]
        begins = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
        for begin, end in itertools.pairwise([*begins, len(numbers)]):
            places, number = by_task[begin:end], numbers[begin]
            asking = places // tasks.shape[1]
            products = queries[asking] @ self._of_task[number].T
            if without_fold is None and stored is None:
                count = min(products.shape[1], NEIGHBOURS)
                nearest[places] = _mean_of_highest(products, count)
                continue
            usable = np.full(len(asking), products.shape[1])
            if without_fold is not None:
                out = products[:, without_fold::FOLDS]
                out[:] = _LEAST_CLOSENESS
                usable -= out.shape[1]
            if stored is not None:
                row = stored.row[asking]
                among = np.flatnonzero((stored.task[asking] == number) & (row < usable))
                products[among, row[among]] = _LEAST_CLOSENESS
                usable[among] -= 1
            nearest[places] = _mean_of_nearest(products, np.minimum(usable, NEIGHBOURS))
        return nearest.reshape(tasks.shape) * self.weight

    def _of_one(self, query: FloatArray, tasks: NDArray[np.int64]) -> FloatArray:
        """Closeness `[S]` of one query `[D + 1]`: a lone call waits for each step of this."""
        products = np.full((len(tasks), self._most), _LEAST_CLOSENESS)
        for row, number in zip(products, tasks.tolist(), strict=True):
            examples = self._of_task[number]
            np.matmul(examples, query, out=row[: len(examples)])
        return _mean_of_highest(products, NEIGHBOURS) * self.weight

    def add_to_best(
        self, scores: FloatArray, tasks: NDArray[np.int64], centered: FloatArray
    ) -> None:
        """Add to scores `[B, N]` of tasks `[B, N]`, best first. Only the best ones' are looked at.

        The others get the least that one of those got, so that they stay behind.
        """
        if not scores.size:
            return
        added = self.of(centered, tasks[:, :SHORTLIST])
        scores[:, :SHORTLIST] += added
        scores[:, SHORTLIST:] += added.min(1, keepdims=True)

    def add_to(
        self,
        scores: FloatArray,
        centered: FloatArray,
        *,
        without_fold: int | None = None,
        stored: ChosenRows | None = None,
    ) -> None:
        """Add to scores `[B, K]` of all tasks, in the order of their numbers, as `add_to_best`.

        `without_fold` and `stored` as in `of`.
        """
        if not scores.size:
            return
        tasks = best_first(scores)
        added = self.of(centered, tasks, without_fold=without_fold, stored=stored)
        least = added.min(1, keepdims=True)
        best = np.take_along_axis(scores, tasks, 1) + added
        scores += least
        np.put_along_axis(scores, tasks, best, 1)


def _mean_of_nearest(products: FloatArray, counts: NDArray[np.int64]) -> FloatArray:
    """The mean `[n]` of the highest `counts` `[n]` of products `[n, E]`, where there are any."""
    found = np.full(len(products), _LEAST_CLOSENESS)
    for count in np.unique(counts[counts > 0]).tolist():
        asking = slice(None) if (counts == count).all() else counts == count
        found[asking] = _mean_of_highest(products[asking], count)
    return found


def _mean_of_highest(products: FloatArray, count: int) -> FloatArray:
    """The mean `[n]` of the highest `count` of products `[n, E]`, which it sorts a little."""
    products.partition(-count, axis=1)
    sums: FloatArray = np.add.reduce(products[:, -count:], axis=1)
    return sums / np.float32(count)


def best_first(scores: FloatArray) -> NDArray[np.int64]:
    """The tasks on the shortlist `[B, S]`, best first, from the scores `[B, K]` of all."""
    if scores.shape[1] > SHORTLIST:
        tasks = np.sort(np.argpartition(-scores, SHORTLIST - 1, axis=1)[:, :SHORTLIST], axis=1)
    else:
        tasks = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, tasks, 1), axis=1, kind="stable")
    return np.take_along_axis(tasks, order, 1)
