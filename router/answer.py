"""What an answer is made of: the decision first, then pieces of text, then a summary."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from router.decision import Decision


class FinishReason(enum.Enum):
    """Why an answer ended: see `FinishReason` in router_service.proto."""

    STOP = "stop"
    LENGTH = "length"
    LABEL = "label"
    NO_TASK = "no_task"


@dataclass(frozen=True, slots=True)
class AnswerSummary:
    """The end of an answer. `prompt_tokens` are virtual, and not part of `input_tokens`."""

    finish_reason: FinishReason
    input_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    truncated: bool = False


AnswerEvent = Decision | str | AnswerSummary
