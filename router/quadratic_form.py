"""The quadratic form x' A x, which reads little more than half of the matrix.

For one x it takes as long as reading the matrix from memory does, a good part of a decision.
"""

from __future__ import annotations

import itertools

import numpy as np

from router.interfaces import FloatArray

# More of them read less, and each costs a call.
_BANDS = 6


class QuadraticForm:
    """The form of a matrix `[D, D]`, of which it keeps what it reads. Threads may share it."""

    def __init__(self, matrix: FloatArray) -> None:
        edges = np.linspace(0, len(matrix), _BANDS + 1).astype(int).tolist()
        self._bands = [_band(matrix, start, end) for start, end in itertools.pairwise(edges)]

    def of(self, vectors: FloatArray) -> FloatArray:
        """The values `[B]` for vectors `[B, D]`."""
        products = [vectors[:, : len(band)] @ band for band in self._bands]
        values: FloatArray = np.vecdot(np.concatenate(products, axis=1), vectors)
        return values


def _band(matrix: FloatArray, start: int, end: int) -> FloatArray:
    """Columns `start` to `end` `[end, end - start]`: all of them that is not below the diagonal.

    What is above stands for its mirror image as well.
    """
    columns = matrix[start:end, :end].copy()
    columns[:, :start] += matrix[:start, start:end].T
    return columns.T
