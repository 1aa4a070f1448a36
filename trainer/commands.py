"""What the trainer can be asked to do. Frozen values, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from router.rejection import RejectionPolicy
from trainer.data import Fields

Initialisation = Literal["best", "nearest", "examples", "text", "vocabulary", "random"]
# What of a prompt gradient descent moves: itself, or P + MLP(P), folded away afterwards.
Reparametrisation = Literal["none", "residual"]
# How the learning rate goes on after its rise.
Schedule = Literal["cosine", "linear", "constant"]
# Whether a prompt is tuned once more, with the validation rows as examples.
Refit = Literal["auto", "never"]
GradientPrecision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class RegisterTask:
    """Add one task (or, with `revise`, its next revision) from a labelled file.

    `force` publishes a prompt that did not beat its baselines, and a task that takes too much of
    another; it is the reason, and is recorded. `prompt_from` is a folder of PEFT whose prompt is
    taken instead of tuning one. `metric` is what answers are scored by (`trainer.answer_metrics`);
    empty: what suits the outputs. `template` is stored with the task (`router.templates`).
    `with_classifier`: fit a label classifier beside the prompt, where the outputs are a closed set;
    `encoder_prompt`: of embeddings under an encoder prompt, which is tuned for that; None: where
    the encoder takes one.
    `challenger` is a share (`10%`) or `shadow`, with `revise`: the next revision is tried beside
    the current one (`router.challengers`). `keep_text` stores inputs and outputs in the home, so
    that another encoder can embed them (`trainer.switching`). `statistics_only` stores
    sums over the embeddings, and none of them.
    """

    name: str
    data: Path
    description: str = ""
    instruction: str = ""
    fields: Fields = field(default_factory=Fields)
    with_prompt: bool = True
    free_text: bool = False
    drop_duplicates: bool = False
    revise: bool = False
    force: str = ""
    prompt_from: Path | None = None
    metric: str = ""
    template: str = ""
    with_classifier: bool = True
    encoder_prompt: bool | None = None
    challenger: str = ""
    keep_text: bool = False
    statistics_only: bool = False


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What to change in the catalog's policy; None leaves a value as it is."""

    head: str | None = None
    false_reject_rate: float | None = None
    ambiguous_rate: float | None = None
    on_unknown: RejectionPolicy | None = None
    cascade: bool | None = None
