"""An observer for where nobody looks."""

from __future__ import annotations

from router.decision import Decision
from router.interfaces import ComparedSide
from router.tasks import TaskKey


class Unobserved:
    """Forgets everything that it is told."""

    def of(self, tenant: str) -> Unobserved:  # noqa: ARG002 - it knows none
        """See `router.interfaces.Observer`."""
        return self

    def forget(self) -> None:
        """See `router.interfaces.Observer`."""

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """See `router.interfaces.Observer`."""

    def stage_ended(self, stage: str, seconds: float) -> None:
        """See `router.interfaces.Observer`."""

    def batch_ended(self, queue: str, items: int) -> None:
        """See `router.interfaces.Observer`."""

    def cache_used(self, *, hits: int, misses: int) -> None:
        """See `router.interfaces.Observer`."""

    def decided(self, decision: Decision) -> None:
        """See `router.interfaces.Observer`."""

    def compared(self, side: ComparedSide, revision: TaskKey, decision: Decision) -> None:
        """See `router.interfaces.Observer`."""

    def shadow_differed(self, challenger: TaskKey) -> None:
        """See `router.interfaces.Observer`."""


UNOBSERVED = Unobserved()
