"""Which configurations of a search go on, and which are stopped early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from trainer.prompt_quality import Quality


class Tried(Protocol):
    """One configuration of a task that is being tuned."""

    @property
    def tries(self) -> int:
        """How often the validation rows were tried, before the first step apart."""

    @property
    def is_running(self) -> bool:
        """Whether it takes more steps."""

    def quality_after(self, tries: int) -> Quality:
        """The best of the first `tries` tries, and of that before the first step."""


T = TypeVar("T", bound=Tried)


def survivors(tried: Sequence[T], validations: int) -> list[T]:
    """Those that go on, or have come to their end: the better half at each of the `rungs`.

    Successive halving (Jamieson and Talwalkar 2016, algorithm 1). What they spend is a share of
    their own steps: compared is how they were after the same number of tries of the validation
    rows, so that all are equally far in their schedules, whatever their steps. Where several are
    equal, the first goes on. It depends on nothing but what was measured: the same at every call.
    """
    left = list(tried)
    for rung in rungs(len(tried), validations):
        if any(each.is_running and each.tries < rung for each in left):
            break
        order = sorted(left, key=lambda each: each.quality_after(rung), reverse=True)
        best = order[: math.ceil(len(left) / 2)]
        left = [each for each in left if each in best]
    return left


def rungs(count: int, validations: int) -> list[int]:
    """After how many of the validations `count` configurations are halved, until one is left.

    The last time is in the middle at the latest, and each time before at half of the next: half of
    the steps that a configuration makes at all are made by the one that is chosen.
    """
    times = math.ceil(math.log2(count)) if count > 1 else 0
    found: list[int] = []
    for before_last in reversed(range(times)):
        least = found[-1] + 1 if found else 1
        found.append(max(least, validations >> (before_last + 1)))
    return [rung for rung in found if rung < validations]
