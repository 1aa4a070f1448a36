"""The probability that a decision is right: calibrated, monotone, and sound for few rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.calibrating import fit_probability
from router.compiling import HEAD_KINDS, compile_head
from router.cross_fitting import HeldOutScores
from router.decision import decide
from router.head import Head
from router.interfaces import Embeddings
from router.pooled_moments import PooledMoments
from router.probability import MatchProbability
from router.snapshot import Snapshot
from router.tasks import Policy
from tests.catalogs import random_task, wide_background
from trainer.metrics import reliability

DIMENSION = 12
Reals = st.floats(-1e6, 1e6)


def held_out(margins: np.ndarray, right: np.ndarray, scores: np.ndarray) -> HeldOutScores:
    """Rows of task 0 that are won by it where they are `right`, by task 1 otherwise."""
    count = len(margins)
    best = scores.astype(np.float32)
    second = (scores - margins).astype(np.float32)
    return HeldOutScores(
        np.zeros(count, np.int64),
        np.where(right, best, second),
        np.where(right, 0, 1),
        best,
        second,
    )


def a_head(kind: str, tasks: int = 12, rows: int = 60, spread: float = 1.6, seed: int = 0) -> Head:
    rng = np.random.default_rng(seed)
    pool = PooledMoments(DIMENSION)
    pool.update(
        random_task(f"task-{n:02}", rng, rows=rows, dimension=DIMENSION, spread=spread)
        for n in range(tasks)
    )
    return compile_head(
        pool,
        policy=Policy(head=kind),
        encoder="numbers:1",
        dimension=DIMENSION,
        background=wide_background(DIMENSION),
    )


def test_what_the_rows_say_is_found_again() -> None:
    rng = np.random.default_rng(0)
    margins, scores = rng.exponential(3.0, 20_000), rng.normal(10, 4, 20_000)
    true = MatchProbability(-2.0, 0.8, 0.15)
    chance = np.array([true.of(s, m) for s, m in zip(scores, margins, strict=True)])
    found = fit_probability(held_out(margins, rng.random(20_000) < chance, scores))
    assert found is not None
    assert found.margin_slope == pytest.approx(0.8, rel=0.1)
    assert found.score_slope == pytest.approx(0.15, rel=0.1)
    for score, margin in ((10, 1), (5, 0.1), (15, 4)):
        assert found.of(score, margin) == pytest.approx(true.of(score, margin), abs=0.02)


def test_a_probability_never_falls_where_score_or_margin_rise() -> None:
    rng = np.random.default_rng(1)
    # Rows that say the opposite: the wider the margin and the higher the score, the worse.
    margins, scores = rng.exponential(1.0, 500), rng.normal(0, 1, 500)
    right = rng.random(500) < np.exp(-margins) / (1 + np.exp(scores))
    found = fit_probability(held_out(margins, right, scores))
    assert found is not None
    assert (found.margin_slope, found.score_slope) == (0, 0)
    assert found.of(0, 0) == pytest.approx(right.mean(), abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_few_rows_without_an_error_are_no_certainty(count: int) -> None:
    margins = np.linspace(1, 2, count)
    found = fit_probability(held_out(margins, np.ones(count, bool), margins))
    assert found is not None
    assert 0.6 < found.of(1.5, 1.5) < 1 - 0.1 / (count + 2)
    assert found.of(1.5, 1.5) >= found.of(1.0, 0.0)


def test_rows_that_cannot_be_right_are_left_out() -> None:
    margins = np.ones(40)
    scores = held_out(margins, np.ones(40, bool), margins)
    alone = np.full(40, -np.inf, np.float32)
    lonely = HeldOutScores(scores.task, alone, np.ones(40, np.int64), scores.best, scores.runner_up)
    both = HeldOutScores(
        *(
            np.concatenate([getattr(part, name) for part in (scores, lonely)])
            for name in ("task", "own", "winner", "best", "runner_up")
        )
    )
    assert fit_probability(both) == fit_probability(scores)
    assert fit_probability(lonely) is None


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1e4), st.booleans(), st.floats(-1e4, 1e4)), min_size=1))
def test_any_rows_give_a_function_or_none(rows: list[tuple[float, bool, float]]) -> None:
    margins, right, scores = (np.array(column) for column in zip(*rows, strict=True))
    found = fit_probability(held_out(margins, right, scores))
    assert found is not None
    assert 0 <= found.of(0.0, 1.0) <= 1


@given(Reals, Reals, st.floats(0, 1e3), st.floats(0, 1e3))
def test_a_probability_is_one_of_any_score_and_margin(
    intercept: float, score: float, slope: float, margin: float
) -> None:
    probability = MatchProbability(intercept, slope, slope)
    assert 0 <= probability.of(score, 0.0) <= probability.of(score, margin) <= 1
    assert probability.of(score, margin) <= probability.of(score + 1, margin)


@pytest.mark.parametrize("values", [(math.nan, 1, 1), (0, math.inf, 1), (0, -0.1, 1), (0, 1, -1)])
def test_what_is_no_probability_is_refused(values: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="no probability"):
        MatchProbability(*values)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_a_head_knows_how_often_it_is_right(kind: str) -> None:
    head = a_head(kind)
    # Other rows of the same tasks, which the head never saw.
    fresh = np.random.default_rng(99)
    rng = np.random.default_rng(0)
    vectors, truth = [], []
    for n in range(12):
        center = rng.normal(size=DIMENSION)
        rng.normal(size=(60, DIMENSION))  # the rows that the task was made of
        rows = center / np.linalg.norm(center)
        rows = rows + 1.6 / DIMENSION**0.5 * fresh.normal(size=(200, DIMENSION))
        vectors.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        truth += [f"task-{n:02}"] * 200
    stacked = np.concatenate(vectors).astype(np.float32)
    embeddings = Embeddings(stacked, np.zeros(len(stacked), np.bool_))
    decisions = Snapshot.build(1, head, {}).decide(embeddings, top_k=1)
    right = np.array(
        [d.candidates[0].task.name == t for d, t in zip(decisions, truth, strict=True)]
    )
    assert 0.5 < right.mean() < 0.95  # neither trivial nor hopeless
    probabilities = np.array([decision.probability for decision in decisions], np.float64)
    figures = reliability(probabilities, right)
    assert figures.expected_calibration_error < 0.05
    # It says more than the mean does: what it calls sure is surer.
    sure = probabilities > np.median(probabilities)
    assert right[sure].mean() > right[~sure].mean() + 0.2


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_the_probability_is_part_of_the_head_and_survives_with_it(kind: str) -> None:
    head = a_head(kind, tasks=4, rows=12)
    assert head.probability is not None
    assert Head.from_bytes(head.to_bytes()).probability == head.probability


def test_a_single_task_has_no_probability_and_no_decision_has_one_then() -> None:
    head = a_head("lda", tasks=1)
    assert head.probability is None
    assert Head.from_bytes(head.to_bytes()).probability is None
    assert decide((), ambiguity_margin=0.0, revision=1).probability is None
    vectors = np.eye(DIMENSION, dtype=np.float32)[:1]
    [decision] = Snapshot.build(1, head, {}).decide(Embeddings(vectors, np.zeros(1, np.bool_)))
    assert decision.probability is None
