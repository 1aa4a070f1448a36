"""What a snapshot decides: the same for a text alone and among any others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.compiling import HEAD_KINDS, compile_head
from router.decision import Decision, Outcome
from router.errors import TaskNotFoundError
from router.head import Head, empty_head
from router.interfaces import Embeddings
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.tasks import Policy
from tests.catalogs import random_task, wide_background
from tests.fakes import make_snapshot

DIMENSION = 12


def a_head(kind: str = "auto", tasks: int = 30) -> Head:
    rng = np.random.default_rng(0)
    pool = PooledMoments(DIMENSION)
    pool.update(
        random_task(f"task-{n:02}", rng, rows=20, dimension=DIMENSION, clusters=1 + n % 3)
        for n in range(tasks)
    )
    return compile_head(
        pool,
        policy=Policy(head=kind, ambiguous_rate=0.1),
        encoder="numbers:1",
        dimension=DIMENSION,
        background=wide_background(DIMENSION),
    )


SNAPSHOTS = {kind: Snapshot.build(5, a_head(kind), {}) for kind in HEAD_KINDS}


def unit_vectors(seed: int, count: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def embeddings(vectors: np.ndarray) -> Embeddings:
    return Embeddings(vectors, np.zeros(len(vectors), np.bool_))


def near_a_boundary(decision: Decision) -> bool:
    """Whether rounding in float32 alone could have decided."""
    boundaries = (decision.score - decision.threshold, decision.margin, decision.margin - MARGIN)
    return min(map(abs, boundaries)) < 1e-3


MARGIN = min(snapshot.head.ambiguity_margin for snapshot in SNAPSHOTS.values())


@settings(max_examples=30)
@given(
    kind=st.sampled_from(HEAD_KINDS),
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 70),
    data=st.data(),
)
def test_a_decision_does_not_depend_on_the_other_rows_of_its_batch(
    kind: str, seed: int, batch: int, data: st.DataObject
) -> None:
    snapshot = SNAPSHOTS[kind]
    vectors = unit_vectors(seed, batch)
    order = np.array(data.draw(st.permutations(range(batch))))
    together = snapshot.decide(embeddings(vectors[order]))
    for row, decision in zip(order[:10], together, strict=False):
        [alone] = snapshot.decide(embeddings(vectors[row : row + 1]))
        assert decision.score == pytest.approx(alone.score, abs=1e-4, rel=1e-5)
        if not near_a_boundary(alone):
            assert (decision.outcome, decision.task) == (alone.outcome, alone.task)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_scores_and_tasks_are_those_of_the_head_without_the_index(kind: str) -> None:
    snapshot = SNAPSHOTS[kind]
    vectors = unit_vectors(1, 50)
    scores = snapshot.head.scores(vectors)
    for row, decision in enumerate(snapshot.decide(embeddings(vectors), top_k=30)):
        order = np.argsort(-scores[row], kind="stable")
        assert [c.task for c in decision.candidates] == [snapshot.head.tasks[n] for n in order]
        np.testing.assert_allclose(
            [c.score for c in decision.candidates], scores[row][order], rtol=1e-4, atol=1e-4
        )
        assert [c.threshold for c in decision.candidates] == [
            snapshot.head.thresholds[n] for n in order
        ]


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_the_number_of_candidates_asked_for_changes_nothing_else(kind: str) -> None:
    snapshot = SNAPSHOTS[kind]
    vectors = unit_vectors(2, 20)
    plain = snapshot.decide(embeddings(vectors))
    for top_k in (1, 2, 7, 30, 1000):
        for decision, expected in zip(
            snapshot.decide(embeddings(vectors), top_k), plain, strict=True
        ):
            assert len(decision.candidates) == min(top_k, 30)
            assert (decision.outcome, decision.task) == (expected.outcome, expected.task)
            assert decision.margin == pytest.approx(expected.margin, abs=1e-4)


def test_every_decision_names_the_revision_and_whether_its_text_was_cut() -> None:
    vectors = unit_vectors(3, 3)
    cut = np.array([False, True, False])
    decisions = SNAPSHOTS["auto"].decide(Embeddings(vectors, cut))
    assert [decision.truncated for decision in decisions] == [False, True, False]
    assert {decision.revision for decision in decisions} == {5}


def test_an_empty_catalog_knows_nothing() -> None:
    snapshot = Snapshot.build(0, empty_head("numbers:1", DIMENSION), {})
    cut = np.array([True, False])
    decisions = snapshot.decide(Embeddings(unit_vectors(0, 2), cut), top_k=3)
    assert [decision.outcome for decision in decisions] == [Outcome.UNKNOWN] * 2
    assert [decision.truncated for decision in decisions] == [True, False]
    assert [decision.candidates for decision in decisions] == [(), ()]


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_a_single_task_is_never_ambiguous(kind: str) -> None:
    snapshot = Snapshot.build(1, a_head(kind, tasks=1), {})
    near = snapshot.head.rows[:1, :-1] + snapshot.head.center
    near /= np.linalg.norm(near)
    decisions = snapshot.decide(
        embeddings(np.concatenate([near, unit_vectors(4, 100)]).astype(np.float32)), top_k=5
    )
    assert {d.outcome for d in decisions} == {Outcome.MATCHED, Outcome.UNKNOWN}
    assert all(len(d.candidates) == 1 for d in decisions)


def test_deciding_about_nothing_gives_nothing() -> None:
    assert SNAPSHOTS["auto"].decide(embeddings(unit_vectors(0, 0))) == []


def test_a_task_that_is_not_served_is_not_found() -> None:
    snapshot = make_snapshot()
    assert snapshot.task("weather").record.name == "weather"
    with pytest.raises(TaskNotFoundError, match="task: wether; list the tasks"):
        snapshot.task("wether")
