"""The pure function that decides."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.decision import Candidate, Outcome, decide
from router.tasks import TaskKey

Scores = st.floats(-1e6, 1e6, width=32)


@st.composite
def rankings(draw: st.DrawFn) -> list[Candidate]:
    scores = sorted(draw(st.lists(Scores, min_size=1, max_size=6)), reverse=True)
    return [
        Candidate(TaskKey(f"task-{number}", 1), score, draw(Scores))
        for number, score in enumerate(scores)
    ]


def candidate(name: str, score: float, threshold: float = 0.0) -> Candidate:
    return Candidate(TaskKey(name, 1), score, threshold)


def test_without_any_candidate_the_input_is_unknown() -> None:
    decision = decide((), ambiguity_margin=0.5, revision=7, truncated=True)
    assert decision.outcome is Outcome.UNKNOWN
    assert decision.task is None
    assert decision.score == -math.inf
    assert decision.threshold == math.inf
    assert (decision.revision, decision.truncated, decision.candidates) == (7, True, ())


@settings(max_examples=60)
@given(rankings(), st.floats(0, 10), st.integers(0, 8))
def test_a_decision_follows_from_threshold_and_margin(
    candidates: list[Candidate], ambiguity_margin: float, top_k: int
) -> None:
    decision = decide(candidates, ambiguity_margin=ambiguity_margin, revision=1, top_k=top_k)
    best = candidates[0]
    margin = best.score - candidates[1].score if len(candidates) > 1 else math.inf
    assert (decision.outcome is Outcome.UNKNOWN) == (best.score < best.threshold)
    if best.score >= best.threshold:
        assert (decision.outcome is Outcome.AMBIGUOUS) == (margin < ambiguity_margin)
    assert (decision.task is None) == (decision.outcome is Outcome.UNKNOWN)
    assert decision.task in (None, best.task)
    assert (decision.score, decision.threshold, decision.margin) == (
        best.score,
        best.threshold,
        margin,
    )
    assert decision.candidates == tuple(candidates[:top_k])


@settings(max_examples=30)
@given(rankings(), st.floats(0, 10))
def test_the_number_of_candidates_listed_does_not_change_the_decision(
    candidates: list[Candidate], ambiguity_margin: float
) -> None:
    few = decide(candidates, ambiguity_margin=ambiguity_margin, revision=1, top_k=0)
    many = decide(candidates, ambiguity_margin=ambiguity_margin, revision=1, top_k=99)
    assert (few.outcome, few.task, few.margin) == (many.outcome, many.task, many.margin)


def test_a_score_on_the_threshold_is_enough_and_a_margin_on_the_limit_too() -> None:
    on_it = [candidate("a", 1.0, 1.0), candidate("b", 0.5)]
    assert decide(on_it, ambiguity_margin=0.5, revision=1).outcome is Outcome.MATCHED
    assert decide(on_it, ambiguity_margin=0.51, revision=1).outcome is Outcome.AMBIGUOUS


def test_an_input_under_its_threshold_is_unknown_even_where_the_second_would_fit() -> None:
    candidates = [candidate("a", 1.0, 2.0), candidate("b", 0.9, 0.0)]
    decision = decide(candidates, ambiguity_margin=5.0, revision=1)
    assert decision.outcome is Outcome.UNKNOWN


@pytest.mark.parametrize("broken", [(math.nan, 0.0), (0.0, math.nan)])
def test_a_score_or_threshold_that_is_no_number_is_never_a_match(
    broken: tuple[float, float],
) -> None:
    decision = decide([candidate("a", *broken)], ambiguity_margin=0.0, revision=1)
    assert decision.outcome is Outcome.UNKNOWN
