"""The approximate index: what it finds, what it says of scores, and how it is kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import router.compiling
from router.approximate_index import CANDIDATES, ApproximateIndex
from router.compiling import compile_head
from router.errors import CorruptArtifactError
from router.head import Head
from router.index import CentroidIndex
from router.interfaces import FloatArray
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import Policy, TaskKey
from tests.catalogs import DIMENSION, place_background
from trainer.clustering import cluster

TASKS = 20_000
WIDTH = 48
QUERIES = 400


def drawn_centers(rng: np.random.Generator) -> FloatArray:
    """Unit vectors that spread more in some directions than in others, as embeddings do."""
    spread = 1 / np.sqrt(np.arange(1, WIDTH + 1))
    centers = rng.normal(size=(TASKS, WIDTH)) * spread
    return (centers / np.linalg.norm(centers, axis=1, keepdims=True)).astype(np.float32)


def mean_rows(centers: FloatArray) -> tuple[FloatArray, np.ndarray | None]:
    """Rows of nearest mean."""
    return np.hstack([centers, np.zeros((TASKS, 1), np.float32)]), None


def discriminant_rows(centers: FloatArray) -> tuple[FloatArray, np.ndarray | None]:
    """Rows of a discriminant, within whose classes directions differ a hundredfold."""
    precision = np.diag(np.geomspace(1, 100, WIDTH))
    rows = 2 * centers @ precision
    biases = -np.einsum("md,md->m", centers @ precision, centers)
    return np.hstack([rows, biases[:, None]]).astype(np.float32), precision


MAKERS = {"nearest-mean": mean_rows, "discriminant": discriminant_rows}


@pytest.fixture(scope="module", params=MAKERS)
def drawn(request: pytest.FixtureRequest) -> tuple[FloatArray, FloatArray, ApproximateIndex]:
    """Rows, queries near to some of their tasks, and the index of the rows."""
    rng = np.random.default_rng(1)
    centers = drawn_centers(rng)
    make: Callable[[FloatArray], tuple[FloatArray, np.ndarray | None]] = MAKERS[request.param]
    rows, precision = make(centers)
    near = centers[rng.integers(TASKS, size=QUERIES)]
    near = near + 0.02 * rng.normal(size=near.shape)
    queries = np.hstack([near, np.ones((QUERIES, 1))]).astype(np.float32)
    return rows, queries, ApproximateIndex.build(rows, precision)


def test_the_best_task_is_among_the_candidates_nearly_always(
    drawn: tuple[FloatArray, FloatArray, ApproximateIndex],
) -> None:
    rows, queries, approximate = drawn
    best = (queries @ rows.T).argmax(1)
    found = approximate.candidates(queries)
    assert found.shape == (QUERIES, CANDIDATES)
    assert (found == best[:, None]).any(1).mean() >= 0.95


def test_scores_of_what_is_found_are_exact(
    drawn: tuple[FloatArray, FloatArray, ApproximateIndex],
) -> None:
    rows, queries, approximate = drawn
    index = CentroidIndex(rows, np.arange(TASKS), approximate=approximate)
    scores, tasks = index.search(queries, 3)
    exact = np.take_along_axis(queries @ rows.T, tasks, 1)
    np.testing.assert_allclose(scores, exact, rtol=1e-5, atol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_where_more_is_wanted_than_candidates_all_rows_are_looked_at(
    drawn: tuple[FloatArray, FloatArray, ApproximateIndex],
) -> None:
    rows, queries, approximate = drawn
    index = CentroidIndex(rows, np.arange(TASKS), approximate=approximate)
    scores, tasks = index.search(queries[:3], CANDIDATES + 1)
    expected = queries[:3] @ rows.T
    order = np.argsort(-expected, axis=1, kind="stable")[:, : CANDIDATES + 1]
    np.testing.assert_array_equal(tasks, order)
    np.testing.assert_allclose(scores, np.take_along_axis(expected, order, 1), rtol=1e-6)


def test_a_decision_does_not_depend_on_its_batch_neighbours_or_on_searches_at_once(
    drawn: tuple[FloatArray, FloatArray, ApproximateIndex],
) -> None:
    rows, queries, approximate = drawn
    index = CentroidIndex(rows, np.arange(TASKS), approximate=approximate)
    _, together = index.search(queries, 1)
    with ThreadPoolExecutor(4) as threads:
        alone = list(threads.map(lambda query: index.search(query[None], 1)[1], queries))
    np.testing.assert_array_equal(np.concatenate(alone), together)


# In a head


def pool_of(names: list[int]) -> PooledMoments:
    pool = PooledMoments(DIMENSION)
    statistics = []
    for name in names:
        rows = np.random.default_rng(name).normal(size=(8, DIMENSION)).astype(np.float32)
        rows[:, name % DIMENSION] += 3
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        key = TaskKey(f"task-{name:04}", 1)
        statistics.append(TaskStatistics(key, to_fixed_point(rows), cluster(rows)))
    for one in statistics:
        pool.update([*pool.tasks, one])
    return pool


def compiled(names: list[int], head: str) -> Head:
    return compile_head(
        pool_of(names),
        policy=Policy(head=head),
        encoder="place",
        dimension=DIMENSION,
        background=place_background(),
    )


@pytest.mark.parametrize("head", ["nearest-mean", "lda"])
def test_a_large_head_keeps_an_approximate_index_which_is_the_same_in_any_order(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled(list(range(60)), head).approximate is None
    monkeypatch.setattr(router.compiling, "LEAST_ROWS", 50)
    found = compiled(list(range(60)), head)
    assert found.approximate is not None
    assert compiled(list(range(59, -1, -1)), head).to_bytes() == found.to_bytes()
    read = Head.from_bytes(found.to_bytes())
    assert read.approximate is not None
    queries, _ = found.queries(np.eye(DIMENSION, dtype=np.float32))
    np.testing.assert_array_equal(
        read.approximate.candidates(queries), found.approximate.candidates(queries)
    )
    scores, tasks = Snapshot.build(1, read, {}).index.search(queries, 2)
    expected = np.sort(found.scores(np.eye(DIMENSION, dtype=np.float32)), axis=1)[:, ::-1][:, :2]
    offsets = found.queries(np.eye(DIMENSION, dtype=np.float32))[1]
    np.testing.assert_allclose(scores + offsets[:, None], expected, atol=1e-4)
    assert tasks.shape == (DIMENSION, 2)


def test_an_index_that_is_not_of_the_heads_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router.compiling, "LEAST_ROWS", 50)
    found = compiled(list(range(60)), "nearest-mean")
    assert found.approximate is not None
    assert not found.approximate.fits(61, DIMENSION + 1)
    assert not found.approximate.fits(60, DIMENSION)
    with pytest.raises(CorruptArtifactError, match="approximate index"):
        ApproximateIndex(found.approximate.projection, found.approximate.content[:100])
