"""An approximate index, for heads of so many rows that looking at each takes too long.

Scores are inner products `w . x + b`. Rows become points such that the best row is the nearest
point: with the precision P of a discriminant, w becomes `P^-1/2 w - o` and x becomes `s P^1/2 x`,
and one dimension more makes up for what the points' lengths and `b` do not share (after Bachrach
et al. 2014, RecSys). The points of tasks then are as far apart as their inputs are, in units of
what these spread. Principal directions of the points are kept, and cells of them searched
by 4-bit product quantisation (FAISS: inverted file, fast scan). The candidates that are found are
scored exactly by `router.index`: an approximate search may miss a task, and misstates no score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from router.errors import CorruptArtifactError
from router.interfaces import FloatArray

LEAST_ROWS = 16_384
"""Heads of fewer rows are searched exactly."""
CANDIDATES = 64
"""How many rows are scored exactly for each query."""

# Chosen on tasks drawn around real embeddings: of inputs like those of the tasks' rows at least
# 95 % meet their best task, for nearest mean and discriminants of up to a million rows.
_DIMENSIONS = 192
_CELLS_SEARCHED = 64
_TRAINED_ROWS_PER_CELL = 40
_ITERATIONS = 8
_PIECE_ROWS = 16_384
_MOST_FITTED_ROWS = 65_536
_RIDGE = 1e-6
_LEAST_PRECISION = 1e-9


class ApproximateIndex:
    """Finds rows that are likely to be the best. Never changed; searches may run at once."""

    def __init__(self, projection: FloatArray, content: NDArray[np.uint8]) -> None:
        """`projection` `[E, R]` makes points of queries `[E]`; `content` is FAISS's own form.

        Raises:
            CorruptArtifactError: they are not what `build` made.
        """
        try:
            index: Any = faiss.deserialize_index(content)
            index.nprobe = min(_CELLS_SEARCHED, index.nlist)
        except (RuntimeError, AttributeError) as error:
            raise CorruptArtifactError(
                "approximate index", error, "publish again: any registration compiles a new head"
            ) from error
        self.projection = projection
        self.content = content
        self._index = index

    @classmethod
    def build(
        cls, rows: FloatArray, precision: NDArray[np.floating[Any]] | None
    ) -> ApproximateIndex:
        """Index `rows` `[M, E]` of a discriminant with the `precision` `[D, D]`, D = E - 1.

        Without one, rows are like queries, of unit length. The same rows give the same index on
        one kind of processor.
        """
        points, projection = _points(rows, precision)
        with _one_thread():
            return cls(projection, faiss.serialize_index(cls._trained(points)))

    @staticmethod
    def _trained(points: FloatArray) -> Any:  # noqa: ANN401 - an index of FAISS
        count, kept = points.shape
        cells = max(min(int(4 * count**0.5), count // _TRAINED_ROWS_PER_CELL), 1)
        index: Any = faiss.index_factory(kept, f"IVF{cells},PQ{kept // 2}x4fsr", faiss.METRIC_L2)
        index.cp.niter = _ITERATIONS
        index.cp.max_points_per_centroid = _TRAINED_ROWS_PER_CELL
        step = max(count // (cells * _TRAINED_ROWS_PER_CELL), 1)
        index.train(np.ascontiguousarray(points[::step]))
        index.add(points)
        return index

    def fits(self, rows: int, width: int) -> bool:
        """Whether this can be the index of so many rows of that width."""
        return bool(
            self.projection.shape == (width, self._index.d)
            and np.isfinite(self.projection).all()
            and self._index.ntotal == rows
        )

    def candidates(self, queries: FloatArray) -> NDArray[np.int64]:
        """The numbers of `CANDIDATES` rows for each query `[B, E]`; -1 where so many are not met.

        The likelier ones come first.
        """
        found: NDArray[np.int64] = self._index.search(queries @ self.projection, CANDIDATES)[1]
        return found


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """FAISS in one thread: its threads wait for each other spinning, as those of BLAS do."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _points(
    rows: FloatArray, precision: NDArray[np.floating[Any]] | None
) -> tuple[FloatArray, FloatArray]:
    """The points `[M, R]` of rows `[M, E]`, and the map `[E, R]` of queries to points."""
    dimension = rows.shape[1] - 1
    spread = whitening = np.eye(dimension, dtype=np.float32)
    if precision is not None:
        precisions, directions = np.linalg.eigh(precision)
        precisions = np.maximum(precisions, _LEAST_PRECISION * precisions.max())
        spread = (directions / np.sqrt(precisions)).astype(np.float32)
        whitening = (directions * np.sqrt(precisions)).astype(np.float32)
    chosen = rows[:: -(-len(rows) // _MOST_FITTED_ROWS)]
    some = chosen[:, :-1] @ spread
    stretch, origin = 1.0, np.zeros(dimension, np.float32)
    if precision is not None:
        stretch, origin = _stretch_and_origin(some, chosen[:, -1])

    mean = some.mean(0)
    _, directions = np.linalg.eigh(np.cov(some.T))
    kept = min(_DIMENSIONS, (dimension + 1) // 2 * 2) - 1
    kept_directions = directions[:, ::-1][:, :kept].astype(np.float32)
    points = np.empty((len(rows), kept + 1), np.float32)
    missing = np.empty(len(rows))  # squared
    for piece in _pieces(len(rows)):
        lifted = rows[piece, :-1] @ spread
        points[piece, :kept] = (lifted - mean) @ kept_directions
        lifted -= origin
        missing[piece] = -2 * stretch * rows[piece, -1] - np.einsum("md,md->m", lifted, lifted)
    last = np.sqrt(missing - missing.min())
    points[:, kept] = last - last.mean()
    projection = np.zeros((dimension + 1, kept + 1), np.float32)
    projection[:-1, :kept] = stretch * (whitening @ kept_directions)
    projection[-1, :kept] = (origin - mean) @ kept_directions
    projection[-1, kept] = -last.mean()
    return points, projection


def _stretch_and_origin(lifted: FloatArray, biases: FloatArray) -> tuple[float, FloatArray]:
    """The s and o `[D]` for which biases are nearest to `-|y - o|^2 / 2s`, up to a constant.

    By least squares over rows `y`. Those of a discriminant are just that, for some s and o.
    """
    lengths = np.einsum("md,md->m", lifted, lifted).astype(np.float64)
    known = np.column_stack([lengths, lifted]).astype(np.float64)
    known -= known.mean(0)
    scales = np.maximum(known.std(0), 1e-12)
    known /= scales
    gram = known.T @ known
    gram[np.diag_indices_from(gram)] += _RIDGE * len(known)
    found = np.linalg.solve(gram, known.T @ (biases - biases.mean())) / scales
    # Where longer rows have no smaller biases, queries are taken to be as long as rows are.
    if found[0] >= 0:
        stretch = max(float(lengths.mean()) / lifted.shape[1], 1e-12) ** 0.5
        return stretch, np.zeros(lifted.shape[1], np.float32)
    stretch = -0.5 / float(found[0])
    return stretch, (stretch * found[1:]).astype(np.float32)


def _pieces(count: int) -> Iterator[slice]:
    for start in range(0, count, _PIECE_ROWS):
        yield slice(start, start + _PIECE_ROWS)
