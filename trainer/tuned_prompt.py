"""What tuning makes of a task: a prompt with its measurements, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from router.interfaces import FloatArray
from router.tasks import PromptMethod, TrainingCurve, TriedSettings

_MOST_LOSSES = 200


@dataclass(frozen=True, slots=True)
class Validation:
    """The score on the validation rows by the task's metric, and the loss, after so many steps."""

    step: int
    score: float
    loss: float


@dataclass(frozen=True, slots=True)
class TunedPrompt:
    """The best prompt `[P, W]` (float32) of a task, and how it compares on the validation rows.

    `scores` are by the task's metric: `prompt`, `majority` (always the most frequent output),
    `no_prompt`, `instruction` (its plain text as the prompt). `losses` are the training losses of
    each step, `steps` how many there were, `seconds` the task's share of the whole time; `layers`
    counts those of a prefix; `settings` are what it was tuned with, `validations` all that were
    made. `probabilities` are those of desired and rejected outputs (see `PromptSummary`).
    `validation_loss` is the prompt's, `instruction_loss` that of the instruction. `search` are the
    settings that were tried, where there were several.
    """

    name: str
    values: FloatArray
    scores: Mapping[str, float]
    validation_loss: float
    instruction_loss: float
    losses: tuple[float, ...]
    steps: int
    seconds: float
    method: PromptMethod = "prompt"
    layers: int = 0
    settings: Mapping[str, float | int | str] = field(default_factory=dict)
    validations: tuple[Validation, ...] = ()
    probabilities: Mapping[str, float] = field(default_factory=dict)
    search: tuple[TriedSettings, ...] = ()


@dataclass(frozen=True, slots=True)
class TuningFailure:
    """Why a task has no prompt, and what to do about it. The other tasks are not affected."""

    name: str
    reason: str
    remedy: str


def training_curve(tuned: TunedPrompt) -> TrainingCurve:
    """The curve of a tuned prompt as its record keeps it: short."""
    block = -(-len(tuned.losses) // _MOST_LOSSES) or 1
    blocks = [tuned.losses[i : i + block] for i in range(0, len(tuned.losses), block)]
    return TrainingCurve(
        steps_per_loss=block,
        losses=tuple(round(float(np.mean(losses)), 4) for losses in blocks),
        validated_at=tuple(validation.step for validation in tuned.validations),
        validation_scores=tuple(round(v.score, 4) for v in tuned.validations),
        validation_losses=tuple(round(v.loss, 4) for v in tuned.validations),
    )
