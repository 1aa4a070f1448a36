"""When things happen while a prompt is tuned: rates, validations, the order of the rows."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from trainer.commands import Schedule

_MAX_WARMUP_SHARE = 0.1


def share_of_rate(step: int, steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """The share of the learning rate at `step` of `steps`: a rise, then what the schedule says."""
    warmup = min(warmup_steps, math.ceil(steps * _MAX_WARMUP_SHARE))
    done = step / steps
    decay = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
    }[schedule]
    return min(1.0, (step + 1) / warmup) * decay if warmup else decay


def validation_steps(steps: int, validations: int) -> set[int]:
    """After which steps to validate: evenly spread, the last one among them."""
    count = min(validations, steps)
    return {round(steps * (k + 1) / count) - 1 for k in range(count)}


def passes(rows: int, per_step: int, generator: random.Random) -> Iterator[list[int]]:
    """Row numbers for each step: pass after pass through all rows, each in a new order."""
    waiting: list[int] = []
    while True:
        while len(waiting) < per_step:
            order = list(range(rows))
            generator.shuffle(order)
            waiting += order
        yield waiting[:per_step]
        waiting = waiting[per_step:]
