"""What a server serves at one catalog revision. Built beside the current one, never mutated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from router.challengers import Challenge
from router.decision import Candidate, Decision, decide
from router.errors import TaskNotFoundError, TaskOutOfServiceError
from router.head import Head
from router.index import CentroidIndex
from router.interfaces import Embeddings
from router.rejection import ABSTAIN, RejectionPolicy
from router.tasks import ServedTask

if TYPE_CHECKING:
    from router.cascade import Cascade

# The best task's score and margin need two candidates, whatever a caller wants listed.
_LEAST_CANDIDATES = 2


@dataclass(frozen=True, slots=True)
class Challenger:
    """A challenger, and the snapshot in which it stands in for the current revision."""

    challenge: Challenge
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Head, index, tasks and rejection policy of one catalog revision.

    `challengers` are those that can be tried, by task; `broken_challengers` those that could not be
    loaded, and why. `cascade` decides what it is sure of before this snapshot is asked.
    """

    revision: int
    head: Head
    index: CentroidIndex
    tasks: Mapping[str, ServedTask]
    rejection: RejectionPolicy = ABSTAIN
    challengers: Mapping[str, Challenger] = field(default_factory=dict)
    broken_challengers: Mapping[Challenge, str] = field(default_factory=dict)
    cascade: Cascade | None = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        revision: int,
        head: Head,
        tasks: Mapping[str, ServedTask],
        rejection: RejectionPolicy = ABSTAIN,
        challengers: Mapping[str, Challenger] | None = None,
        broken_challengers: Mapping[Challenge, str] | None = None,
    ) -> Snapshot:
        """Build the index over the head's rows."""
        index = CentroidIndex(head.rows, head.row_task, head.closeness(), head.approximate)
        return cls(
            revision, head, index, tasks, rejection, challengers or {}, broken_challengers or {}
        )

    def task(self, name: str) -> ServedTask:
        """The task of that name.

        Raises:
            TaskNotFoundError: this revision has no such task.
        """
        try:
            return self.tasks[name]
        except KeyError:
            raise TaskNotFoundError(
                "task", name, "list the tasks with `promptyard list` or ListTasks"
            ) from None

    def task_at(self, name: str, revision: int) -> ServedTask:
        """The task of that name at a revision that is served: the current one, or its challenger's.

        Raises:
            TaskNotFoundError: it is served at no such revision.
            TaskOutOfServiceError: the challenger of that revision could not be loaded.
        """
        current = self.task(name)
        if revision == current.record.revision:
            return current
        challenger = self.challengers.get(name)
        if challenger is not None and challenger.challenge.revision == revision:
            return challenger.snapshot.task(name)
        for challenge, problem in self.broken_challengers.items():
            if (challenge.task, challenge.revision) == (name, revision):
                raise TaskOutOfServiceError("challenger", f"{challenge.key} ({problem})", "end it")
        raise TaskNotFoundError(
            "revision",
            f"{name}@{revision}",
            "name the current one (0), or that of a challenger; GetStatus lists them",
        )

    def answering(self, decision: Decision) -> Snapshot:
        """The snapshot that made `decision`: this one, or that of a challenger."""
        side = decision.side
        if side is None or not side.by_challenger:
            return self
        return self.challengers[side.challenger.name].snapshot

    def decide(self, embeddings: Embeddings, top_k: int = 0) -> list[Decision]:
        """One decision per row of `embeddings` `[B, D]`. `top_k` candidates are listed in each.

        No challenger is asked (`router.challenging` does), and no rejection policy applied: see
        `apply`.
        """
        wanted = min(max(top_k, _LEAST_CANDIDATES), len(self.head.tasks))
        if not wanted:
            return [
                decide((), ambiguity_margin=0.0, revision=self.revision, truncated=bool(truncated))
                for truncated in embeddings.truncated
            ]
        queries, offsets = self.head.queries(embeddings.vectors)
        found, tasks = self.index.search(queries, wanted)
        scores = (found.astype(np.float64) + offsets[:, None]).tolist()
        return [
            decide(
                [
                    Candidate(self.head.tasks[task], score, self.head.thresholds[task])
                    for score, task in zip(row_scores, row_tasks, strict=True)
                ],
                ambiguity_margin=self.head.ambiguity_margin,
                revision=self.revision,
                truncated=truncated,
                top_k=top_k,
                calibration=self.head.probability,
            )
            for row_scores, row_tasks, truncated in zip(
                scores, tasks.tolist(), embeddings.truncated.tolist(), strict=True
            )
        ]

    def apply(self, decision: Decision, policy: RejectionPolicy) -> Decision:
        """`decision`, which lists a candidate, with the task that `policy` uses for it."""
        best = decision.candidates[0].task if decision.candidates else None
        fallback = self.answering(decision).tasks.get(policy.fallback_task)
        return policy.apply(decision, best, None if fallback is None else fallback.record.key)
