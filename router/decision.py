"""What the router decides about one text, and the pure function that decides."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router.tasks import TaskKey


class Outcome(enum.Enum):
    """The verdict: one task fits, several fit about equally well, or none does."""

    MATCHED = "matched"
    AMBIGUOUS = "ambiguous"
    UNKNOWN = "unknown"


class Use(enum.Enum):
    """Why a task is used for an input, or why none is."""

    MATCHED = "matched"
    BEST_OF_AMBIGUOUS = "best_of_ambiguous"
    FALLBACK = "fallback"
    BEST_ANYWAY = "best_anyway"
    NAMED = "named"
    ABSTAINED = "abstained"
    FALLBACK_MISSING = "fallback_missing"
    NO_TASKS = "no_tasks"


USE_WITHOUT_POLICY = {
    Outcome.MATCHED: Use.MATCHED,
    Outcome.AMBIGUOUS: Use.BEST_OF_AMBIGUOUS,
    Outcome.UNKNOWN: Use.ABSTAINED,
}
"""What a decision says before any rejection policy is applied to it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One task that was considered. A higher score is a better fit."""

    task: TaskKey
    score: float
    threshold: float


@dataclass(frozen=True, slots=True)
class Side:
    """Which of two revisions of a task decided: the current one, or its challenger."""

    current: TaskKey
    challenger: TaskKey
    by_challenger: bool


@dataclass(frozen=True, slots=True)
class ShadowDecision:
    """What a shadow decided on the text, and whether by outcome or task it differs.

    `challenger` is the revision that would take the place of the current one. What it is compared
    with is the current revision's decision.
    """

    challenger: TaskKey
    outcome: Outcome
    task: TaskKey | None
    score: float
    differs: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on one text at one catalog revision.

    `score`, `threshold` and `margin` are those of the best candidate, also where the outcome is
    `UNKNOWN`; `task` is None then. `candidates` are best first. `used` is the task to answer
    under, for the reason `use`: `task`, unless a rejection policy names one for an unknown input.
    `probability` is that of the best candidate to be right, if the text belongs to a task at all;
    None where the head knows none: it has a single task, or is of an older version.
    `side` says which revision decided, of a task whose challenger shares its texts; None where the
    text is in no such split. `shadows` are what shadows of the text's task decided.
    """

    outcome: Outcome
    task: TaskKey | None
    score: float
    margin: float
    threshold: float
    revision: int
    truncated: bool
    candidates: tuple[Candidate, ...] = ()
    used: TaskKey | None = None
    use: Use = Use.ABSTAINED
    probability: float | None = None
    side: Side | None = None
    shadows: tuple[ShadowDecision, ...] = ()


class Calibration(Protocol):
    """What a head knows of how often it is right."""

    def of(self, score: float, margin: float) -> float:
        """The probability that a best task of this score and margin is the right one."""


def decide(
    candidates: Sequence[Candidate],
    *,
    ambiguity_margin: float,
    revision: int,
    truncated: bool = False,
    top_k: int = 0,
    calibration: Calibration | None = None,
) -> Decision:
    """Decide from `candidates`, best first.

    Unknown where there is no candidate or the best one is under its threshold; ambiguous where the
    second best is less than `ambiguity_margin` behind; matched otherwise.
    """
    if not candidates:
        return Decision(Outcome.UNKNOWN, None, -math.inf, 0.0, math.inf, revision, truncated)
    best = candidates[0]
    margin = best.score - candidates[1].score if len(candidates) > 1 else math.inf
    if not best.score >= best.threshold:
        outcome = Outcome.UNKNOWN
    elif margin < ambiguity_margin:
        outcome = Outcome.AMBIGUOUS
    else:
        outcome = Outcome.MATCHED
    task = None if outcome is Outcome.UNKNOWN else best.task
    return Decision(
        outcome,
        task,
        best.score,
        margin,
        best.threshold,
        revision,
        truncated,
        tuple(candidates[:top_k]),
        task,
        USE_WITHOUT_POLICY[outcome],
        None if calibration is None else calibration.of(best.score, margin),
    )
