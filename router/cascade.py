"""The cascade: a text is decided with the fast encoder, and with the full one where that is unsure.

The fast head is compiled from the tasks' kept texts, and calibrated on held-out rows as every head
is: when a revision is published, where the catalog's policy has a cascade, and otherwise in every
process that loads it. It decides alone where a task matches with a probability of being
right, by margin and score, of 0.99 or more: what may be unknown or ambiguous is the full encoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from router.artifacts import ArtifactReader
from router.compiling import compile_head
from router.decision import Decision, Outcome
from router.errors import InvalidInputError
from router.fitting import Background
from router.head import Head
from router.interfaces import Encoder
from router.kept_texts import kept_texts
from router.loading import read_statistics
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import Policy, TaskRecord

LEAST_PROBABILITY = 0.99


@dataclass(frozen=True, slots=True)
class FastModel:
    """The fast encoder, and what it makes of text in general."""

    encoder: Encoder
    background: Background = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Cascade:
    """The fast encoder, and the snapshot of a catalog revision as it sees it."""

    encoder: Encoder
    snapshot: Snapshot

    def decide(self, texts: Sequence[str], top_k: int = 0) -> list[Decision | None]:
        """The decision on each text, None where the full encoder must decide.

        Scores, thresholds and margins are those of the fast head. `top_k` candidates are listed.
        """
        found = self.snapshot.decide(self.encoder.encode(texts), top_k)
        return [decision if _is_sure(decision) else None for decision in found]


class FastHeads:
    """Compiles heads of the fast encoder, and embeds the texts of each task once."""

    def __init__(self, artifacts: ArtifactReader, fast: FastModel) -> None:
        self.fast = fast
        self._artifacts = artifacts
        self._pool = PooledMoments(fast.encoder.dimension)

    def compile(self, records: Sequence[TaskRecord], policy: Policy) -> Head:
        """The head for the tasks of `records`.

        Raises:
            InvalidInputError: a task keeps no texts.
            CorruptArtifactError: texts or rows are damaged.
        """
        without = sorted(record.name for record in records if not record.texts_sha256)
        if without:
            raise InvalidInputError(
                "cascade",
                f"no texts of {', '.join(without)}",
                "register them again with --revise --keep-text, or serve without --cascade"
                " (and `promptyard policy set --no-cascade`)",
            )
        known = {task.key: task for task in self._pool.tasks}
        self._pool.update(known.get(record.key) or self._seen_fast(record) for record in records)
        return compile_head(
            self._pool,
            policy=policy,
            encoder=self.fast.encoder.fingerprint,
            dimension=self.fast.encoder.dimension,
            background=self.fast.background,
        )

    def _seen_fast(self, record: TaskRecord) -> TaskStatistics:
        """The rows of a task as the fast encoder embeds them, in the clusters that they are in."""
        texts = [text.input for text in kept_texts(self._artifacts, record)]
        stored = read_statistics(self._artifacts, record)
        vectors = self.fast.encoder.encode(texts).vectors
        return replace(stored, embeddings=to_fixed_point(vectors))


def _is_sure(decision: Decision) -> bool:
    return (
        decision.outcome is Outcome.MATCHED
        and decision.probability is not None
        and decision.probability >= LEAST_PROBABILITY
    )
