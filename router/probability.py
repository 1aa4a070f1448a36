"""The probability that a decision's best task is the right one.

A score means something else in every catalog; a probability of 0.9 is right nine times in ten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MatchProbability:
    """A logistic function of a best task's margin and score; it falls with neither of them.

    It is the probability that the best task is right *if* the input belongs to one of the tasks:
    it is fitted on held-out rows (`router.calibrating`), and all of those do. Whether it does is
    what the threshold decides.

    Raises:
        ValueError: not finite, or falling.
    """

    intercept: float
    margin_slope: float
    score_slope: float

    def __post_init__(self) -> None:
        values = (self.intercept, self.margin_slope, self.score_slope)
        if not all(math.isfinite(value) for value in values) or min(values[1:]) < 0:
            raise ValueError(f"no probability: {self}")

    def of(self, score: float, margin: float) -> float:
        """The probability for the best task's `score` and its `margin` to the second best."""
        logit = self.intercept + self.margin_slope * margin + self.score_slope * score
        # Beyond this it is 0 or 1 in all digits, and exp would overflow.
        return 1 / (1 + math.exp(-max(min(logit, 40.0), -40.0)))
