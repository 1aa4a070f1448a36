"""The cascade: a text is decided with the fast encoder, and with the full one where that is unsure.

The fast head is compiled from the tasks' kept texts when a revision is loaded, and calibrated on
held-out rows as every head is. It decides alone where a task matches with a probability of being
right, by margin and score, of 0.99 or more: what may be unknown or ambiguous is the full encoder's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from router.artifacts import ArtifactReader
from router.compiling import compile_head
from router.decision import Decision, Outcome
from router.errors import InvalidInputError
from router.fitting import Background
from router.interfaces import Encoder
from router.kept_texts import kept_texts
from router.loading import read_statistics
from router.snapshot import Snapshot
from router.statistics import PooledMoments, TaskStatistics, to_fixed_point
from router.tasks import Policy, ServedTask, TaskRecord

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


def build_cascade(
    artifacts: ArtifactReader,
    tasks: Mapping[str, ServedTask],
    revision: int,
    policy: Policy,
    fast: FastModel,
) -> Cascade:
    """The cascade for the tasks of a catalog revision.

    Raises:
        InvalidInputError: a task keeps no texts.
        CorruptArtifactError: texts or rows are damaged.
    """
    records = [task.record for task in tasks.values()]
    without = sorted(record.name for record in records if not record.texts_sha256)
    if without:
        raise InvalidInputError(
            "cascade",
            f"no texts of {', '.join(without)}",
            "register them again with --revise --keep-text, or serve without --cascade",
        )
    pool = PooledMoments(fast.encoder.dimension)
    pool.update(_seen_fast(artifacts, record, fast.encoder) for record in records)
    head = compile_head(
        pool,
        policy=policy,
        encoder=fast.encoder.fingerprint,
        dimension=fast.encoder.dimension,
        background=fast.background,
    )
    return Cascade(fast.encoder, Snapshot.build(revision, head, tasks))


def _seen_fast(artifacts: ArtifactReader, record: TaskRecord, encoder: Encoder) -> TaskStatistics:
    """The rows of a task as the fast encoder embeds them, in the clusters that they are in."""
    texts = [text.input for text in kept_texts(artifacts, record)]
    stored = read_statistics(artifacts, record)
    return replace(stored, embeddings=to_fixed_point(encoder.encode(texts).vectors))


def _is_sure(decision: Decision) -> bool:
    return (
        decision.outcome is Outcome.MATCHED
        and decision.probability is not None
        and decision.probability >= LEAST_PROBABILITY
    )
