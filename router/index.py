"""The index of task centroids: exact, or scoring exactly what an approximate one finds.

Few rows are all looked at; of more, those that bytes say are the likely ones (`quantised_index`),
which is exact, too; of very many, those in cells nearby (`approximate_index`).
"""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from router.approximate_index import CANDIDATES, ApproximateIndex
from router.examples import SHORTLIST, Closeness
from router.interfaces import FloatArray
from router.quantised_index import LEAST_ROWS, QuantisedIndex

# FAISS takes one query at a time while all have fewer values than this, by default 128,000. On one
# thread a matrix product is quicker from three queries on (faiss pull request 5109).
faiss.cvar.distance_compute_blas_threshold = 3_000

# Comparing all pairs of hits of a query takes less than looking at one after the other.
_MOST_COMPARED_HITS = 64
_BEFORE = np.tri(_MOST_COMPARED_HITS, k=-1, dtype=np.bool_)


class CentroidIndex:
    """An inner-product index over a head's rows. Never changed once it is built.

    Exact, unless it is given an approximate index; the scores that it gives are exact always.
    Concurrent searches are safe because nothing ever mutates the index: a new catalog revision
    gets a new one.
    """

    def __init__(
        self,
        rows: FloatArray,
        row_task: NDArray[np.int64],
        closeness: Closeness | None = None,
        approximate: ApproximateIndex | None = None,
    ) -> None:
        """Index `rows` `[M, E]`; row m belongs to task number `row_task[m]` `[M]`.

        `closeness` counts for the tasks that are best without it. `approximate` finds the rows
        that are looked at, where few are wanted.
        """
        self._row_task = row_task
        self._closeness = closeness
        tasks, counts = np.unique(row_task, return_counts=True)
        self._tasks = len(tasks)
        # How many rows must be asked for so that k different tasks are surely among them.
        self._rows_before_kth_task: list[int] = np.cumsum(np.sort(counts)[::-1]).tolist()
        self._rows = rows
        self._approximate = approximate
        # Empty, and not looked at, beside an approximate one.
        self._flat = faiss.IndexFlatIP(rows.shape[1])
        self._quantised = None
        if approximate is None:
            self._flat.add(np.ascontiguousarray(rows, dtype=np.float32))
            if len(rows) >= LEAST_ROWS:
                self._quantised = QuantisedIndex(rows)

    def search(self, queries: FloatArray, k: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """The best `k` tasks for each query `[B, E]`: scores `[B, k]` and task numbers `[B, k]`.

        A task scores as its best row, plus its closeness. `k` must not exceed the number of tasks.
        Equal scores are ordered by task number.
        """
        # A setting of the calling thread. Those of FAISS wait for each other spinning: beside other
        # load, a search of 50 microseconds takes milliseconds.
        faiss.omp_set_num_threads(1)
        if self._closeness is None:
            return self._search(queries, k)
        scores, tasks = self._search(queries, max(k, min(SHORTLIST, self._tasks)))
        self._closeness.add_to_best(scores, tasks, queries[:, :-1])
        scores, tasks = _best_first(scores, tasks)
        return scores[:, :k], tasks[:, :k]

    def _search(self, queries: FloatArray, k: int) -> tuple[FloatArray, NDArray[np.int64]]:
        wanted = self._rows_before_kth_task[k - 2] + 1 if k > 1 else 1
        scores, rows = self._best_rows(np.ascontiguousarray(queries, dtype=np.float32), wanted)
        scores, tasks = _best_first(scores, self._row_task[rows])
        if self._tasks == len(self._row_task):
            return scores[:, :k], tasks[:, :k]
        return _best_per_task(scores, tasks, k)

    def _best_rows(self, queries: FloatArray, wanted: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """The best rows of each query, at least `wanted`: scores and row numbers `[B, N]`.

        Of equal scores faiss returns any: where the cut would go through some, take all rows.
        """
        if self._approximate is not None:
            return self._likely_rows(self._approximate, queries, wanted)
        if self._quantised is not None:
            found = self._quantised.best(queries, wanted)
            if found is not None:
                return found
        scores, rows = self._flat.search(queries, min(wanted + 1, len(self._row_task)))
        if (scores[:, wanted:] == scores[:, wanted - 1 : wanted]).any():
            scores, rows = self._flat.search(queries, len(self._row_task))
        return scores, rows

    def _likely_rows(
        self, approximate: ApproximateIndex, queries: FloatArray, wanted: int
    ) -> tuple[FloatArray, NDArray[np.int64]]:
        """As `_best_rows`, of the rows that `approximate` finds; of all where it finds too few."""
        rows = np.empty((len(queries), 0), np.int64)
        if wanted <= CANDIDATES:
            rows = approximate.candidates(queries)
        scores = np.full(rows.shape, -np.inf, np.float32)
        for query, found, into in zip(queries, rows, scores, strict=True):
            met = found >= 0
            into[met] = self._rows[found[met]] @ query
        if rows.shape[1] and np.isfinite(scores).sum(1).min() >= wanted:
            return scores, rows
        # More are wanted than it looks for, or too few were met: rare, and slow.
        scores = queries @ self._rows.T
        rows = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(scores, rows, 1), rows


def _best_first(
    scores: FloatArray, tasks: NDArray[np.int64]
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Hits `[B, N]` in the order of their scores; equal ones in that of their task numbers."""
    if (scores[:, 1:] < scores[:, :-1]).all():  # as FAISS gives them, but for equal ones
        return scores, tasks
    order = np.lexsort((tasks, -scores))
    rows = np.arange(len(scores))[:, None]
    return scores[rows, order], tasks[rows, order]


def _best_per_task(
    scores: FloatArray, tasks: NDArray[np.int64], k: int
) -> tuple[FloatArray, NDArray[np.int64]]:
    """Keep each task's first (best) hit: `[B, N]` hits, best first -> `[B, k]`."""
    if len(tasks) == 1:
        places = _first_places(tasks[0].tolist(), k)
        return scores[:, places], tasks[:, places]
    hits = tasks.shape[1]
    if hits > _MOST_COMPARED_HITS:
        firsts = np.array([_firsts(row) for row in tasks], np.bool_).reshape(tasks.shape)
    else:  # every hit with those before it, of all queries at once
        repeated = (tasks[:, :, None] == tasks[:, None, :]) & _BEFORE[:hits, :hits]
        firsts = ~repeated.any(2)
    kept = np.argsort(~firsts, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, kept, 1), np.take_along_axis(tasks, kept, 1)


def _first_places(tasks: list[int], k: int) -> list[int]:
    """Where the first `k` different tasks are met first."""
    place_of: dict[int, int] = {}
    for place, task in enumerate(tasks):
        if task not in place_of:
            place_of[task] = place
            if len(place_of) == k:
                break
    return list(place_of.values())


def _firsts(tasks: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where each task of `[N]` is met first."""
    found = np.zeros(len(tasks), np.bool_)
    found[np.unique(tasks, return_index=True)[1]] = True
    return found
