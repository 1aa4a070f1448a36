"""Explains decisions from the tasks' stored rows, in a thread of its own and within bounds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from router.artifacts import ArtifactReader
from router.decision import Candidate, Decision
from router.errors import CorruptArtifactError, OverloadedError
from router.explanation import (
    ExplainedCandidate,
    Explanation,
    ScoreTerm,
    StoredExample,
    margin_of,
    why,
)
from router.head import Head
from router.interfaces import Encoder, FloatArray, Observer
from router.loading import read_statistics
from router.observing import UNOBSERVED
from router.snapshot import Snapshot

if TYPE_CHECKING:
    from router.fitting import Background
    from router.score_terms import ScoreTerms

LEAST_EXPLAINED = 3
MOST_EXPLAINED = 10
_EXAMPLES = 3
# One is worked on at a time; more than these would wait for longer than their callers do.
_MOST_WAITING = 8
# Heads whose fitted terms are remembered: a challenger's is explained in turn with the current one.
_REMEMBERED = 2
# Terms are fitted again to all rows, once a revision: to so many in a few seconds on one core.
MOST_ROWS_FOR_TERMS = 25_000


class Explainer:
    """Explains decisions. Belongs to one event loop.

    A slow first explanation of a revision, which fits the terms of its scores, holds up other
    explanations and nothing else.
    """

    def __init__(
        self,
        artifacts: ArtifactReader,
        background: Callable[[], Background],
        observer: Observer = UNOBSERVED,
        most_rows_for_terms: int = MOST_ROWS_FOR_TERMS,
    ) -> None:
        self._artifacts = artifacts
        self._background = background
        self._observer = observer
        self._most_rows_for_terms = most_rows_for_terms
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="explaining")
        self._unfinished = 0
        self._fitted: tuple[tuple[Head, ScoreTerms | None, str], ...] = ()

    async def explain(
        self, snapshot: Snapshot, encoder: Encoder, text: str, decision: Decision
    ) -> Explanation:
        """Explain `snapshot`'s decision on `text`; the candidates that it lists are explained.

        Raises:
            OverloadedError: too many explanations are waiting.
        """
        if self._unfinished > _MOST_WAITING:
            raise OverloadedError(
                "explain", f"{self._unfinished} waiting", "come back later", retry_after=1.0
            )
        self._unfinished += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._thread, self._explain, snapshot, encoder, text, decision
            )
        finally:
            self._unfinished -= 1

    def close(self) -> None:
        """Wait for the explanation that is running and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _explain(
        self, snapshot: Snapshot, encoder: Encoder, text: str, decision: Decision
    ) -> Explanation:
        began = time.perf_counter()
        vector = encoder.encode([text]).vectors[0]
        terms, note = self._terms(snapshot)
        notes = [note] if note else []
        explained = []
        for position, candidate in enumerate(decision.candidates[:MOST_EXPLAINED]):
            try:
                examples = self._nearest(snapshot, candidate, vector)
            except CorruptArtifactError as error:
                examples = ()
                notes.append(f"no examples of {candidate.task}: {error}")
            if snapshot.task(candidate.task.name).record.statistics_only:
                notes.append(f"no examples of {candidate.task}: it keeps statistics only")
            explained.append(
                ExplainedCandidate(
                    candidate.task,
                    candidate.score,
                    candidate.threshold,
                    margin_of(decision.candidates, position),
                    () if terms is None else _values(snapshot.head, terms, vector, candidate),
                    examples,
                )
            )
        margin = snapshot.head.ambiguity_margin
        self._observer.stage_ended("explain", time.perf_counter() - began)
        return Explanation(why(decision, margin), tuple(explained), margin, tuple(notes))

    def _nearest(
        self, snapshot: Snapshot, candidate: Candidate, vector: FloatArray
    ) -> tuple[StoredExample, ...]:
        """The stored rows of a task that are nearest to an embedding `[D]`, nearest first."""
        rows = read_statistics(self._artifacts, snapshot.task(candidate.task.name).record).vectors
        similar = rows @ vector
        nearest = np.argsort(-similar, kind="stable")[:_EXAMPLES]
        return tuple(StoredExample(int(row), float(similar[row])) for row in nearest)

    def _terms(self, snapshot: Snapshot) -> tuple[ScoreTerms | None, str]:
        """The terms of the snapshot's scores, or None and why; remembered for the last heads."""
        for fitted in self._fitted:
            if fitted[0] is snapshot.head:
                return fitted[1:]
        terms, note = self._fit_terms(snapshot)
        self._fitted = (*self._fitted, (snapshot.head, terms, note))[-_REMEMBERED:]
        return terms, note

    def _fit_terms(self, snapshot: Snapshot) -> tuple[ScoreTerms | None, str]:
        if not snapshot.head.tasks:
            return None, ""
        records = [snapshot.task(key.name).record for key in snapshot.head.tasks]
        rows = sum(record.data.rows for record in records)
        if rows > self._most_rows_for_terms:
            most = self._most_rows_for_terms
            return None, f"no terms: the tasks have {rows} rows, and more than {most} take too long"
        try:
            tasks = [read_statistics(self._artifacts, record) for record in records]
        except CorruptArtifactError as error:
            return None, f"no terms: {error}"
        from router.score_terms import score_terms  # only the first explanation needs it

        terms = score_terms(snapshot.head, tasks, self._background())
        kind = snapshot.head.kind
        return terms, "" if terms else f"no terms: those of a head of kind {kind} are not known"


def _values(
    head: Head, terms: ScoreTerms, vector: FloatArray, candidate: Candidate
) -> tuple[ScoreTerm, ...]:
    values = terms.of(head, vector, head.tasks.index(candidate.task))
    return tuple(map(ScoreTerm, terms.names, values))
