"""What tuning is told: the settings, and the jobs."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from router.errors import InvalidInputError
from router.tasks import PromptMethod
from trainer.answer_metrics import Metric
from trainer.commands import (
    GradientPrecision,
    Initialisation,
    Refit,
    Reparametrisation,
    Schedule,
)

if TYPE_CHECKING:
    # With torch, which a task without a prompt does not need.
    from trainer.initialisation import Start
    from trainer.prompt_quality import LabelledRow

_CHOICES = {
    "method": PromptMethod,
    "initialisation": Initialisation,
    "schedule": Schedule,
    "refit": Refit,
    "reparametrisation": Reparametrisation,
    "precision": GradientPrecision,
}


@dataclass(frozen=True, slots=True)
class TuningSettings:
    """How to tune.

    `method` is where the base model reads the prompt: `prompt`, before the input embeddings, or
    `prefix`, as keys and values of every layer. `length` is P, the virtual tokens.
    `rows_per_step` are per task (0: 4 where there are fewer than 400 rows and a closed set of
    outputs, else 8); the learning rate rises over `warmup_steps` (at most a tenth of all steps) and
    falls to zero along a cosine. The validation rows are tried `validations` times, evenly spread;
    a task stops after `patience` of them in a row without a better result, and its best prompt is
    kept.

    With few rows, those for validation are worth more as examples: `refit` `auto` tunes the prompt
    once more on all of them, where the steps go through the training rows more than once: for as
    many steps as were best, or for all of them where the rows are fewer than 400. What is reported
    was measured before that.

    A task is tuned with each of `seeds` seeds from `seed` on, and the best on the validation rows
    is kept. `schedule` is how the rate falls. `reparametrisation` `residual` tunes P + MLP(P) with
    that `bottleneck`, and keeps the sum. A task's gradient is cut to the length `clip_norm` (0: it
    is not), and added up in micro-batches of at most `micro_batch_positions` (0: what suits the
    device). It is computed in `precision`: `auto` is bfloat16 where the processor multiplies that
    itself, as GPUs do, and prompts are always kept in float32. `rejected_weight` is how much the
    unlikelihood of rejected outputs counts beside the loss of the right ones.
    """

    length: int = 20
    learning_rate: float = 0.01
    steps: int = 60
    rows_per_step: int = 0
    warmup_steps: int = 50
    initialisation: Initialisation = "examples"
    validations: int = 6
    patience: int = 4
    refit: Refit = "auto"
    seed: int = 0
    method: PromptMethod = "prompt"
    seeds: int = 1
    schedule: Schedule = "cosine"
    reparametrisation: Reparametrisation = "none"
    bottleneck: int = 64
    clip_norm: float = 0.0
    micro_batch_positions: int = 0
    precision: GradientPrecision = "auto"
    rejected_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TuningJob:
    """A task to tune a prompt for: rows are (input, output).

    `labels` is the closed set of outputs, or None where the outputs are free text. `starts` are
    prompts that `nearest` and `best` may start from. `metric` is what the validation rows are
    scored by; prompts of equal score are told apart by the loss. `rejected` are the undesired
    outputs of each training row, `validation_rejected` of each validation row; empty for none.
    """

    name: str
    instruction: str
    labels: tuple[str, ...] | None
    train: Sequence[LabelledRow]
    validation: Sequence[LabelledRow]
    starts: tuple[Start, ...] = ()
    metric: Metric = "accuracy"
    rejected: Sequence[tuple[str, ...]] = ()
    validation_rejected: Sequence[tuple[str, ...]] = ()

    @property
    def identity(self) -> list[object]:
        """What its result depends on, as values of JSON."""
        starts = [hashlib.sha256(start.values.tobytes()).hexdigest() for start in self.starts]
        return [
            *(self.name, self.instruction, self.labels, starts, self.metric),
            *(list(map(list, self.train)), list(map(list, self.validation))),
            *(list(map(list, rows)) for rows in (self.rejected, self.validation_rejected)),
        ]


def check_tuning(jobs: Sequence[TuningJob], settings: TuningSettings) -> None:
    """Refuse settings that cannot be used, and two jobs of one name.

    Raises:
        InvalidInputError: says which.
    """
    for field in ("length", "steps", "validations", "patience", "seeds", "bottleneck"):
        if getattr(settings, field) < 1:
            raise InvalidInputError(field, getattr(settings, field), "give at least 1")
    if not 0 < settings.learning_rate < math.inf:
        raise InvalidInputError("learning rate", settings.learning_rate, "give a positive number")
    for field, choices in _CHOICES.items():
        if getattr(settings, field) not in get_args(choices):
            raise InvalidInputError(
                field, getattr(settings, field), f"choose one of {', '.join(get_args(choices))}"
            )
    for field in (
        *("rows_per_step", "warmup_steps", "clip_norm", "micro_batch_positions"),
        *("rejected_weight",),
    ):
        if not 0 <= getattr(settings, field) < math.inf:
            raise InvalidInputError(field, getattr(settings, field), "give 0 or more")
    repeated = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if repeated:
        raise InvalidInputError("task name", repeated[0], "name every task once")
