"""Why a decision is what it is: values, and the sentence that says it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from router.decision import Candidate, Decision, Outcome, Use
from router.tasks import TaskKey


@dataclass(frozen=True, slots=True)
class ScoreTerm:
    """One term of a score. The values of all terms add up to the score."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class StoredExample:
    """A stored row of a task that lies near the text; no text is stored.

    `row` counts from 0 in the order in which rows are stored; `similarity` is the cosine.
    """

    row: int
    similarity: float


@dataclass(frozen=True, slots=True)
class ExplainedCandidate:
    """One candidate: `margin` is its score less the best other task's, below 0 for all but one."""

    task: TaskKey
    score: float
    threshold: float
    margin: float
    terms: tuple[ScoreTerm, ...]
    examples: tuple[StoredExample, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a decision is what it is. `notes` say what could not be told, and why."""

    sentence: str
    candidates: tuple[ExplainedCandidate, ...]
    ambiguity_margin: float
    notes: tuple[str, ...] = ()


def margin_of(candidates: tuple[Candidate, ...], position: int) -> float:
    """The score of a candidate less that of the best other one; infinite where there is none."""
    others = [each.score for each in candidates[:2] if each is not candidates[position]]
    return candidates[position].score - others[0] if others else math.inf


def why(decision: Decision, ambiguity_margin: float) -> str:
    """The sentence. The decision lists its two best candidates, where it has as many."""
    if not decision.candidates:
        return "Unknown: the catalog has no task."
    best = decision.candidates[0]
    second = decision.candidates[1] if len(decision.candidates) > 1 else None
    scored = f"{best.task} scores {best.score:.3g}"
    ahead = "" if second is None else f"{decision.margin:.3g} ahead of {second.task}"
    if decision.outcome is Outcome.UNKNOWN:
        sentence = (
            f"Unknown: the best task, {best.task}, scores {best.score:.3g}, less than the "
            f"{best.threshold:.3g} from which on it accepts an input; {_used(decision)}."
        )
    elif decision.outcome is Outcome.AMBIGUOUS:
        sentence = (
            f"Ambiguous: {scored}, over its threshold of {best.threshold:.3g}, but only {ahead}; "
            f"a margin under {ambiguity_margin:.3g} leaves both open."
        )
    else:
        sentence = f"Matched: {scored}, over its threshold of {best.threshold:.3g}" + (
            f" and {ahead}." if ahead else "; it is the only task."
        )
    if decision.truncated:
        sentence += " The text was cut to the encoder's window: its end was not read."
    return sentence


def _used(decision: Decision) -> str:
    match decision.use:
        case Use.FALLBACK:
            return f"by the rejection policy {decision.used} is used"
        case Use.BEST_ANYWAY:
            return f"by the rejection policy {decision.used} is used all the same"
        case Use.FALLBACK_MISSING:
            return "the task that the catalog falls back to is not served, so that none is used"
        case _:
            return "no task is used"
