"""Which stored rows a large catalog is calibrated on: all of them, until that would take long.

Scoring every row for every centroid takes their product. Where that is more than 2^26 pairs (8,000
tasks of one row each), only so many rows are scored as make five million pairs, and 512 at least.
The rates of a whole catalog are known from them to about a percent; thresholds of single tasks
are then much like that of all together. The choice is a function of the set of tasks: the first
rows of fold 0 of all tasks alike, and where there are more tasks than rows to score, of those whose
digests come first.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from router.pooled_moments import PooledMoments
from router.statistics import FOLDS, ChosenRows, TaskStatistics, row_count_of
from router.tasks import TaskKey

MOST_PAIRS = 1 << 26
SAMPLED_PAIRS = 5_000_000
LEAST_SAMPLED_ROWS = 512


def sampled_rows(pool: PooledMoments, centroids: int) -> ChosenRows | None:
    """The rows that are scored, all of fold 0; None: all rows."""
    rows = pool.column(row_count_of)
    if int(rows.sum()) * centroids <= MOST_PAIRS:
        return None
    wanted = max(SAMPLED_PAIRS // centroids, LEAST_SAMPLED_ROWS)
    most = -(-wanted // len(rows))
    chosen: list[tuple[int, int]] = []
    for number in np.argsort(pool.column(_digest_of), kind="stable").tolist():
        if len(chosen) == wanted:
            break
        rows_of_fold = range(0, int(rows[number]), FOLDS)
        mine = rows_of_fold[: min(most, wanted - len(chosen))]
        chosen += [(number, row) for row in mine]
    task, row = np.array(sorted(chosen), np.int64).T
    return ChosenRows(task, row)


def _digest_of(task: TaskStatistics) -> int:
    return key_digest(task.key)


@functools.lru_cache(1 << 16)
def key_digest(key: TaskKey) -> int:
    """A number of 64 bits that says nothing of a task but which one it is."""
    return int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=8).digest())
