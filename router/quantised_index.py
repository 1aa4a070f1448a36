"""An exact search that reads a quarter of the rows.

One search takes as long as reading all rows from memory does. Of rows in bytes (FAISS: uniform
8-bit scalar quantisation) the error of every score has a bound, so that the rows which could be
among the best are known to be among the likely ones. These few are scored exactly.
"""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray

LEAST_ROWS = 512
"""Fewer rows are read as quickly as they are."""
MOST_QUERIES = 4
"""More queries at once are a matrix product, which reads the rows once for all."""

_MOST_WANTED = 128
_SPARE_ROWS = 32
_WIDTH_MULTIPLE = 16  # else FAISS takes one dimension at a time
_PIECE_ROWS = 1024
# Sums of float32 products are off by no more than this share of the product of the lengths.
_ROUNDING = 1e-4


class QuantisedIndex:
    """Finds the best rows. Never changed once it is built; searches may run at once."""

    def __init__(self, rows: FloatArray) -> None:
        """Index `rows` `[M, E]`, which are kept. Their last column, the bias, takes two bytes."""
        count, width = rows.shape
        padded = np.zeros((count, -(-(width + 1) // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE), np.float32)
        self._rows = rows
        self._scales = np.ones(padded.shape[1], np.float32)
        self._scales[:width] = _largest(rows)
        np.divide(rows, self._scales[:width], out=padded[:, :width])
        left = padded[:, width - 1] - _decoded(_indexed(padded), 0, count)[:, width - 1]
        [scale] = _largest(left[:, None])
        padded[:, width] = left / scale
        self._scales[width] = scale * self._scales[width - 1]
        self._index = _indexed(padded)
        self._row_error, self._bias_error = self._errors()

    def best(self, queries: FloatArray, wanted: int) -> tuple[FloatArray, NDArray[np.int64]] | None:
        """Scores and numbers `[B, N]` of rows, the best `wanted` (and their equals) among them.

        None where a search of another kind is in order: it takes less, or more rows than were
        looked at are about as good.
        """
        if len(queries) > MOST_QUERIES or wanted > _MOST_WANTED:
            return None
        total, width = self._rows.shape
        scaled = np.zeros((len(queries), len(self._scales)), np.float32)
        np.multiply(queries, self._scales[:width], out=scaled[:, :width])
        scaled[:, width] = queries[:, -1] * self._scales[width]
        scores, rows = self._index.search(scaled, min(wanted + _SPARE_ROWS, total))
        # The best `wanted` score no less than these do, less the error; whatever scores as much
        # has been found to score that, less the error once more. (All are shorter than they are
        # together.)
        length = math.sqrt(np.vdot(queries, queries))
        error = self._row_error * length + self._bias_error
        least = scores[:, wanted - 1 : wanted] - 2 * error
        likely = np.count_nonzero((scores >= least).any(0))
        if likely == rows.shape[1] < total:
            return None
        rows = rows[:, :likely]
        return np.vecdot(self._rows[rows], queries[:, None, :]), rows

    def _errors(self) -> tuple[float, float]:
        """The most by which a score is off: for each unit of a query's length, and beyond that."""
        count, width = self._rows.shape
        row_error = bias_error = longest = largest = 0.0
        for start in range(0, count, _PIECE_ROWS):
            rows = self._rows[start : start + _PIECE_ROWS]
            found = _decoded(self._index, start, len(rows)) * self._scales
            found[:, width - 1] += found[:, width]
            off = rows - found[:, :width]
            row_error = max(row_error, _longest(off[:, :-1]))
            bias_error = max(bias_error, float(np.abs(off[:, -1]).max()))
            longest = max(longest, _longest(rows[:, :-1]))
            largest = max(largest, float(np.abs(rows[:, -1]).max()))
        return row_error + _ROUNDING * longest, bias_error + _ROUNDING * largest


def _indexed(scaled: FloatArray) -> Any:  # noqa: ANN401 - an index of FAISS
    """The index of rows of -1 to 1."""
    index: Any = faiss.IndexScalarQuantizer(
        scaled.shape[1], faiss.ScalarQuantizer.QT_8bit_uniform, faiss.METRIC_INNER_PRODUCT
    )
    index.train(np.array([[-1.0], [1.0]], np.float32).repeat(scaled.shape[1], axis=1))
    index.add(scaled)
    return index


def _decoded(index: Any, start: int, count: int) -> FloatArray:  # noqa: ANN401 - an index of FAISS
    decoded: FloatArray = index.reconstruct_n(start, count)
    return decoded


def _largest(rows: FloatArray) -> FloatArray:
    """The largest absolute value of each column, 1 where all are 0."""
    largest: FloatArray = np.abs(rows).max(0)
    largest[largest == 0] = 1
    return largest


def _longest(rows: FloatArray) -> float:
    return float(np.sqrt(np.vecdot(rows, rows).max()))
