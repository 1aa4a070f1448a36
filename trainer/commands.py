"""What the trainer can be asked to do. Frozen values, checked before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from router.rejection import RejectionPolicy
from trainer.data import Fields

Initialisation = Literal["examples", "text", "vocabulary", "random"]


@dataclass(frozen=True, slots=True)
class RegisterTask:
    """Add one task (or, with `revise`, its next revision) from a labelled file.

    `force` publishes a prompt that did not beat its baselines, and a task that takes too much of
    another; it is the reason, and is recorded.
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


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What to change in the catalog's policy; None leaves a value as it is."""

    head: str | None = None
    false_reject_rate: float | None = None
    ambiguous_rate: float | None = None
    on_unknown: RejectionPolicy | None = None
