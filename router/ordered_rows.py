"""Rows of numbers that come and go at any place, in memory that stays between the changes.

A large catalog's sums are tens of megabytes. To move them within memory that the process has takes
milliseconds; to ask the system for as much again at every publish can take a tenth of a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# What is moved at a time: it goes through a copy of that size.
_PIECE_ROWS = 256


class OrderedRows:
    """Rows `[n, D]` float64 in an order."""

    def __init__(self, dimension: int) -> None:
        self._memory = np.empty((0, dimension))
        self._count = 0

    @property
    def rows(self) -> NDArray[np.float64]:
        """The rows as they are until the next change; they cannot be written to."""
        view = self._memory[: self._count]
        view.setflags(write=False)
        return view

    def insert(self, places: Sequence[int], rows: NDArray[np.float64]) -> None:
        """Insert rows `[m, D]`, each before the row that is at its place now; places ascend."""
        count = self._count + len(rows)
        if count > len(self._memory):
            # A quarter more than is needed: only what is used takes memory.
            memory = np.empty((count + count // 4, self._memory.shape[1]))
            memory[: self._count] = self._memory[: self._count]
            self._memory = memory
        end = self._count
        for number in range(len(rows) - 1, -1, -1):
            self._move(places[number], end, number + 1)
            end = places[number]
            self._memory[end + number] = rows[number]
        self._count = count

    def remove(self, places: Sequence[int]) -> None:
        """Remove the rows at these places, which ascend."""
        for number, (place, end) in enumerate(itertools.pairwise([*places, self._count])):
            self._move(place + 1, end, -(number + 1))
        self._count -= len(places)

    def _move(self, begin: int, end: int, by: int) -> None:
        """Move rows `begin` to `end`, piece by piece, so that none is overwritten unmoved."""
        starts = range(begin, end, _PIECE_ROWS)
        for start in starts if by < 0 else reversed(starts):
            stop = min(start + _PIECE_ROWS, end)
            self._memory[start + by : stop + by] = self._memory[start:stop]
