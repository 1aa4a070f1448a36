"""The index of task centroids. The only file that imports faiss."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from router.examples import SHORTLIST, Closeness
from router.interfaces import FloatArray


class CentroidIndex:
    """An exact inner-product index over a head's rows. Never changed once it is built.

    Concurrent searches are safe because nothing ever mutates the index: a new catalog revision
    gets a new one.
    """

    def __init__(
        self, rows: FloatArray, row_task: NDArray[np.int64], closeness: Closeness | None = None
    ) -> None:
        """Index `rows` `[M, E]`; row m belongs to task number `row_task[m]` `[M]`.

        `closeness` counts for the tasks that are best without it.
        """
        self._row_task = row_task
        self._closeness = closeness
        tasks, counts = np.unique(row_task, return_counts=True)
        self._tasks = len(tasks)
        # How many rows must be asked for so that k different tasks are surely among them.
        self._rows_before_kth_task = np.cumsum(np.sort(counts)[::-1])
        self._index = faiss.IndexFlatIP(rows.shape[1])
        self._index.add(np.ascontiguousarray(rows, dtype=np.float32))

    def search(self, queries: FloatArray, k: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """The best `k` tasks for each query `[B, E]`: scores `[B, k]` and task numbers `[B, k]`.

        A task scores as its best row, plus its closeness. `k` must not exceed the number of tasks.
        Equal scores are ordered by task number.
        """
        if self._closeness is None:
            return self._search(queries, k)
        scores, tasks = self._search(queries, max(k, min(SHORTLIST, self._tasks)))
        self._closeness.add_to_best(scores, tasks, queries[:, :-1])
        scores, tasks = _best_first(scores, tasks)
        return scores[:, :k], tasks[:, :k]

    def _search(self, queries: FloatArray, k: int) -> tuple[FloatArray, NDArray[np.int64]]:
        wanted = int(self._rows_before_kth_task[k - 2]) + 1 if k > 1 else 1
        scores, rows = self._best_rows(np.ascontiguousarray(queries, dtype=np.float32), wanted)
        scores, tasks = _best_first(scores, self._row_task[rows])
        if self._tasks == len(self._row_task):
            return scores[:, :k], tasks[:, :k]
        return _best_per_task(scores, tasks, k)

    def _best_rows(self, queries: FloatArray, wanted: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """The best rows of each query, at least `wanted`: scores and row numbers `[B, N]`.

        Of equal scores faiss returns any: where the cut would go through some, take all rows.
        """
        scores, rows = self._index.search(queries, min(wanted + 1, len(self._row_task)))
        if (scores[:, wanted:] == scores[:, wanted - 1 : wanted]).any():
            scores, rows = self._index.search(queries, len(self._row_task))
        return scores, rows


def _best_first(
    scores: FloatArray, tasks: NDArray[np.int64]
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Hits `[B, N]` in the order of their scores; equal ones in that of their task numbers."""
    order = np.lexsort((tasks, -scores))
    rows = np.arange(len(scores))[:, None]
    return scores[rows, order], tasks[rows, order]


def _best_per_task(
    scores: FloatArray, tasks: NDArray[np.int64], k: int
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Keep each task's first (best) hit: `[B, N]` hits, best first -> `[B, k]`."""
    best_scores = np.empty((len(scores), k), np.float32)
    best_tasks = np.empty((len(scores), k), np.int64)
    for row, row_tasks in enumerate(tasks.tolist()):
        first: dict[int, int] = {}
        for place, task in enumerate(row_tasks):
            first.setdefault(task, place)
            if len(first) == k:
                break
        best_tasks[row] = list(first)
        best_scores[row] = scores[row, list(first.values())]
    return best_scores, best_tasks
