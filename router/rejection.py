"""What becomes of an input that fits no task: decided per catalog, or by the request."""

from __future__ import annotations

import enum
from collections.abc import Container
from dataclasses import dataclass, replace

from router.decision import Decision, Outcome, Use
from router.errors import InvalidInputError
from router.tasks import TaskKey, check_task_name

_FALLBACK_TO = "fallback:"


class OnUnknown(enum.Enum):
    """What is done with an input that fits no task."""

    ABSTAIN = "abstain"
    FALLBACK = "fallback"
    BEST = "best"


@dataclass(frozen=True, slots=True)
class RejectionPolicy:
    """Which task is used for an input that fits none. It never changes the outcome.

    ABSTAIN uses none, FALLBACK the task `fallback_task`, BEST the best-scoring task all the same.
    An ambiguous input goes to its best task under each of them.

    Raises:
        InvalidInputError: a fallback without a task's name, or a name without a fallback.
    """

    on_unknown: OnUnknown = OnUnknown.ABSTAIN
    fallback_task: str = ""

    def __post_init__(self) -> None:
        if self.on_unknown is OnUnknown.FALLBACK:
            check_task_name(self.fallback_task)
        elif self.fallback_task:
            raise InvalidInputError(
                "fallback task",
                self.fallback_task,
                f"leave it out, or choose {OnUnknown.FALLBACK.value} instead of "
                f"{self.on_unknown.value}",
            )

    def __str__(self) -> str:
        """`abstain`, `best` or `fallback:TASK`."""
        return self.on_unknown.value + (f":{self.fallback_task}" if self.fallback_task else "")

    @classmethod
    def parse(cls, text: str, field: str = "on_unknown") -> RejectionPolicy:
        """The policy that `str` wrote.

        Raises:
            InvalidInputError: no such policy.
        """
        try:
            if text.startswith(_FALLBACK_TO):
                return cls(OnUnknown.FALLBACK, text.removeprefix(_FALLBACK_TO))
            return cls(OnUnknown(text))
        except (ValueError, InvalidInputError) as error:
            raise InvalidInputError(
                field, repr(text), "give abstain, best or fallback:TASK"
            ) from error

    def apply(self, decision: Decision, best: TaskKey | None, fallback: TaskKey | None) -> Decision:
        """`decision` with the task that is used for it.

        `best` is the best-scoring task, None in an empty catalog; `fallback` is the fallback task
        as it is served, None where it is not.
        """
        if decision.outcome is not Outcome.UNKNOWN or self.on_unknown is OnUnknown.ABSTAIN:
            return decision
        if self.on_unknown is OnUnknown.BEST:
            use = Use.BEST_ANYWAY if best is not None else Use.NO_TASKS
            return replace(decision, used=best, use=use)
        use = Use.FALLBACK if fallback is not None else Use.FALLBACK_MISSING
        return replace(decision, used=fallback, use=use)

    def is_served(self, tasks: Container[str]) -> bool:
        """Whether the fallback, if there is to be one, is among the served tasks' names."""
        return self.on_unknown is not OnUnknown.FALLBACK or self.fallback_task in tasks


ABSTAIN = RejectionPolicy()
