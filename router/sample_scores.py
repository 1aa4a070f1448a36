"""Scores the sample that a large catalog of nearest means is calibrated on, block by block.

A nearest mean is a matter of its own task, so that a block's scores of the sample stay what they
are while the sample does and the block's tasks do: they are remembered from publish to publish, and
one more task costs the scores of one block. Which tasks share a block is told by their names: the
same tasks make the same blocks, and so the same products, in any order of arrival.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.cross_fitting import HeldOutScores
from router.fitting import fit_nearest_mean, row_scores
from router.interfaces import FloatArray
from router.pooled_moments import PooledMoments
from router.statistics import FIXED_POINT, ChosenRows, TaskStatistics

# At most, about; products of fewer take nearly as long.
_TASKS_PER_BLOCK = 256
_CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class _Block:
    """What a block's tasks score: per row of the sample `[S]` the best, its task and the next best.

    `winner` is the place of the task among `tasks`. `own` `[n]` are the scores of rows of the
    block's own tasks, which are at `own_at` `[n]` of the sample.
    """

    tasks: Sequence[TaskStatistics]
    best: FloatArray
    winner: NDArray[np.int64]
    runner_up: FloatArray
    own: FloatArray
    own_at: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Sample:
    """The rows of a sample as floats `[S, D]`, their tasks, and the means of these without them.

    Those `[D + 1]` are by the identity of the task; None of one that has no other rows.
    """

    tasks: Sequence[TaskStatistics]
    rows: NDArray[np.int64]
    vectors: FloatArray
    without: dict[int, FloatArray | None]


class SampleScores:
    """Scores samples, and remembers what it takes to do so again. Not thread-safe."""

    def __init__(self) -> None:
        self._sample: _Sample | None = None
        self._blocks: dict[tuple[int, int], _Block] = {}

    def of(
        self,
        pool: PooledMoments,
        chosen: ChosenRows,
        means: FloatArray,
        for_each: Callable[..., Iterable[Any]] = map,
    ) -> HeldOutScores:
        """The scores of the `chosen` rows by the means of the tasks without them.

        `means` `[K, D + 1]` are the rows that `fit_nearest_mean` makes of all rows. `for_each` is
        `map`, or that of a pool of threads.
        """
        tasks = pool.tasks
        sample = self._taken(pool, chosen)
        count = 1 << (len(tasks) // _TASKS_PER_BLOCK).bit_length()
        block_of = (pool.column(_digest_of) % count).astype(np.int64)
        in_blocks = np.argsort(block_of, kind="stable")
        members = np.split(in_blocks, np.searchsorted(block_of[in_blocks], range(1, count)))
        numbers = {(count, place): mine for place, mine in enumerate(members) if len(mine)}
        now = {
            block: [tasks[number] for number in mine.tolist()] for block, mine in numbers.items()
        }
        blocks = {
            block: known
            for block, known in self._blocks.items()
            if block in now and _same(known.tasks, now[block])
        }
        missing = [block for block in numbers if block not in blocks]
        scored = for_each(lambda block: _score(sample, now[block], means[numbers[block]]), missing)
        blocks.update(zip(missing, scored, strict=True))
        self._blocks = blocks
        return _together(chosen, [(numbers[block], blocks[block]) for block in numbers])

    def _taken(self, pool: PooledMoments, chosen: ChosenRows) -> _Sample:
        tasks = [pool.tasks[number] for number in chosen.task.tolist()]
        if (
            self._sample is None
            or not _same(self._sample.tasks, tasks)
            or not np.array_equal(self._sample.rows, chosen.row)
        ):
            fixed = chosen.of(lambda task: pool.tasks[task].embeddings)
            without: dict[int, FloatArray | None] = {id(task): None for task in tasks}
            left = pool.held_out(chosen)
            if not len(left.counts) and len(without) == len(pool.tasks):
                without = {}  # as in `CrossFitting.fit`, where there is nothing else to fit to
            elif len(left.counts):
                fit = fit_nearest_mean(left)
                for number, row in zip(fit.row_task.tolist(), fit.terms[0].rows, strict=True):
                    without[id(pool.tasks[number])] = row.astype(np.float32, copy=False)
            vectors = fixed.astype(np.float32) / np.float32(FIXED_POINT)
            self._sample, self._blocks = _Sample(tasks, chosen.row, vectors, without), {}
        return self._sample


def _digest_of(task: TaskStatistics) -> int:
    return zlib.crc32(str(task.key).encode())


def _same(some: Sequence[TaskStatistics], others: Sequence[TaskStatistics]) -> bool:
    """Whether these are the same tasks. (Keys may come back: of what failed to be published.)"""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _score(sample: _Sample, tasks: Sequence[TaskStatistics], means: FloatArray) -> _Block:
    """Score the sample for a block's tasks, whose `means` `[m, D + 1]` are changed on the way."""
    gone = np.zeros(len(tasks), np.bool_)
    place_of = {id(task): place for place, task in enumerate(tasks)}
    for identity, place in place_of.items():
        if identity in sample.without:
            mean = sample.without[identity]
            gone[place] = mean is None
            if mean is not None:
                means[place] = mean
    places = np.array([place_of.get(id(task), -1) for task in sample.tasks])
    own_at = np.flatnonzero(places >= 0)
    count = len(sample.vectors)
    own, best = np.empty(count, np.float32), np.empty(count, np.float32)
    runner_up, winner = np.empty(count, np.float32), np.empty(count, np.int64)
    for begin in range(0, count, _CHUNK_ROWS):
        chunk = slice(begin, begin + _CHUNK_ROWS)
        scores = row_scores(means, sample.vectors[chunk])
        scores[:, gone] = -np.inf
        row = np.arange(len(scores))
        own[chunk] = scores[row, places[chunk]]
        winner[chunk] = scores.argmax(1)
        best[chunk] = scores[row, winner[chunk]]
        scores[row, winner[chunk]] = -np.inf
        runner_up[chunk] = scores.max(1)
    return _Block(tasks, best, winner, runner_up, own[own_at], own_at)


def _together(
    chosen: ChosenRows, blocks: Sequence[tuple[NDArray[np.int64], _Block]]
) -> HeldOutScores:
    """The scores over all blocks, each with the numbers of its tasks; of equals the first wins."""
    best = np.stack([block.best for _, block in blocks])
    winners = np.stack([numbers[block.winner] for numbers, block in blocks])
    highest = best.max(0)
    ahead = np.where(best == highest, winners, winners.max() + 1)
    holder = ahead.argmin(0)
    row = np.arange(len(highest))
    winner = winners[holder, row]
    best[holder, row] = np.stack([block.runner_up for _, block in blocks])[holder, row]
    own = np.empty(len(highest), np.float32)
    for _, block in blocks:
        own[block.own_at] = block.own
    return HeldOutScores(chosen.task, own, winner, highest, best.max(0))
