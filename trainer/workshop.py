"""The place where tasks are made: one home folder, its writers and the models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from router.bootstrap import load_fast_model
from router.cascade import FastHeads, FastModel
from router.catalog import ARTIFACTS_FOLDER, HEADS_FOLDER, StoredChallenger
from router.challengers import Challenge
from router.compiling import UNSCORED, changed_decisions, compile_head
from router.errors import (
    CatalogBusyError,
    CorruptArtifactError,
    IncompatibleModelError,
    InvalidInputError,
    StorageError,
    TaskNotFoundError,
)
from router.fitting import Background
from router.head import Head, empty_head
from router.interfaces import Encoder
from router.loading import check_encoder, statistics_of
from router.pooled_moments import PooledMoments
from router.rejection import RejectionPolicy
from router.sample_scores import SampleScores
from router.statistics import TaskStatistics
from router.tasks import Policy, TaskKey, TaskRecord
from trainer.artifact_writer import ArtifactWriter
from trainer.catalog_writer import CatalogWriter, Publication
from trainer.challenge_rules import standing_challenges
from trainer.commands import PolicyChange
from trainer.gate import GateReport, check, measure
from trainer.head_writer import HeadWriter, block_starts
from trainer.kept_background import kept_background
from trainer.kept_sums import KeptSums
from trainer.policies import changed_policy

_KEPT_HEADS = 16


@dataclass(frozen=True, slots=True)
class Published:
    """What a publish did: the new catalog revision, its head, and the decisions that changed.

    `gate` is what new tasks did to the others, where that was asked for; of a challenger, what it
    would do in the place of the current revision. `head_bytes` is the size of the head's files.
    `challenges` are those that there are now, and `ended` those that there are no more.
    """

    revision: int
    head: Head
    report: Mapping[str, float]
    changed_decisions: Mapping[str, int]
    gate: GateReport | None = None
    head_bytes: int = 0
    challenges: tuple[Challenge, ...] = ()
    ended: tuple[Challenge, ...] = ()


class Workshop:
    """Publishes to one home folder. Everything that is live is a function of the records.

    Statistics of tasks and the newest head are kept in memory: many registrations in one process
    read each task once, and no head that this process has compiled.
    """

    def __init__(
        self, home: Path, encoder: Encoder, load_fast: Callable[[], FastModel] = load_fast_model
    ) -> None:
        """`load_fast` gives the fast encoder, where the policy has a cascade."""
        self.home = home
        self.encoder = encoder
        self.catalog = CatalogWriter(home)
        self.artifacts = ArtifactWriter(home / ARTIFACTS_FOLDER)
        self._heads = HeadWriter(home / HEADS_FOLDER)
        self._background: Background | None = None
        self._pool = PooledMoments(encoder.dimension)
        self._kept_sums = KeptSums(home)
        # The digests of the tasks' stored rows.
        self._contents: dict[TaskKey, str] = {}
        self._sample_scores = SampleScores()
        self._statistics: dict[TaskKey, TaskStatistics] = {}
        self._rows = _RowCounts(self._count_rows)
        self._live: tuple[int, Mapping[str, TaskKey]] = (0, {})
        self._load_fast = load_fast
        self._fast_heads: FastHeads | None = None
        self._compiled: tuple[str, Head] | None = None

    def close(self) -> None:
        """Close the catalog."""
        self.catalog.close()

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check_encoder(self) -> None:
        """Refuse a home whose newest revision was made with another encoder.

        Raises:
            IncompatibleModelError: the fingerprints differ.
        """
        newest = self.catalog.newest_revision()
        if newest:
            check_encoder(self.catalog.revision(newest).encoder, self.encoder.fingerprint)

    def policy(self, change: PolicyChange | None = None) -> Policy:
        """The policy of the newest revision, with `change` applied.

        Raises:
            InvalidInputError: no such head, or a rate outside of [0, 0.5].
        """
        newest = self.catalog.newest_revision()
        policy = self.catalog.revision(newest).policy if newest else Policy()
        return policy if change is None else changed_policy(policy, change)

    def newest_head(self) -> Head:
        """The compiled head of the newest revision; an empty one where there is none.

        Raises:
            CorruptArtifactError: its file is damaged.
        """
        return self._read_head(self.catalog.newest_revision())

    def publish(
        self,
        action: str,
        *,
        records: tuple[TaskRecord, ...] = (),
        live: Mapping[str, int | None],
        change: PolicyChange | None = None,
        gate_limit: float | None = None,
        force: str = "",
        challenge: Challenge | None = None,
        ended: str = "",
        other_encoder: bool = False,
    ) -> Published:
        """Compile the head for what will be live, store it, and append to the catalog.

        `challenge` begins a challenge, or changes its share; nothing becomes live then. `ended`
        names the task whose challenger goes.

        With a `gate_limit`, tasks that were not live, and take more than that share of one that
        was, are refused; not so where `force` or a new record gives a reason, which is recorded.

        `other_encoder`: the catalog goes over to the workshop's encoder, by new records of all
        tasks.

        All of it happens while other writers are held off, so that registrations at the same time
        cannot miss each other. A crash anywhere before the commit leaves only orphan files.

        Raises:
            InterferenceError: a task takes too much of another one, and is not forced.
            TaskNotFoundError: `change` falls back to a task that would not be live, or `challenge`
                is of a task that is not.
            InvalidInputError: `challenge` cannot be (`trainer.challenges`), or there is to be a
                cascade, and a task keeps no texts.
            IncompatibleModelError: what would be live was embedded by another encoder.
            CatalogBusyError: of `other_encoder`, a task came meanwhile.
        """
        try:
            return self._publish(
                action, records, live, change, gate_limit, force, challenge, ended, other_encoder
            )
        except BaseException:
            self._forget(records)
            raise

    def _publish(
        self,
        action: str,
        records: tuple[TaskRecord, ...],
        live: Mapping[str, int | None],
        change: PolicyChange | None,
        gate_limit: float | None,
        force: str,
        challenge: Challenge | None,
        ended: str,
        other_encoder: bool,
    ) -> Published:
        catalog = self.catalog
        with catalog.appending():
            parent = catalog.newest_revision()
            if not other_encoder:
                self.check_encoder()
            policy = self.policy(change)
            new = {record.key: record for record in records}
            for record in records:
                catalog.refuse_existing(record)
            old = self._live_at(parent)
            tasks = {**old}
            for name, revision in live.items():
                tasks.pop(name, None)
                if revision is not None:
                    tasks[name] = TaskKey(name, revision)
            if change is not None and change.on_unknown is not None:
                _check_fallback(change.on_unknown, tasks)
            if other_encoder and set(tasks.values()) != new.keys():
                raise CatalogBusyError(
                    "encoder", self.encoder.name, "tasks changed meanwhile; run it again"
                )
            stood = [stored.challenge for stored in catalog.challengers(parent)]
            stand = standing_challenges(stood, tasks, challenge, ended)
            before = self._read_head_if_whole(parent)
            head = self._compile(tasks.values(), new, policy, before)
            challengers = {
                each: self._compile({**tasks, each.task: each.key}.values(), new, policy, before)
                for each in stand
            }
            rows = self._rows
            changed = changed_decisions(before, head, rows) if before is not None else {}
            gate = None
            coming = (tasks[name] for name in live.keys() & tasks.keys())
            arriving, arrived = sorted(key for key in coming if old.get(key.name) != key), head
            if challenge is not None:
                arriving = sorted({challenge.key} - {each.key for each in stood})
                arrived = challengers[challenge]
            if gate_limit is not None and arriving:
                gate = measure(
                    before,
                    arrived,
                    rows,
                    arriving,
                    lambda key: self._task_statistics(key, new).vectors,
                )
                forced = {record.key for record in records if record.forced_reason}
                check(gate, () if force else {*arriving} - forced, gate_limit)
            fast_head = self._compile_fast(tasks.values(), new, policy)
            others = {each: self._heads.write(compiled) for each, compiled in challengers.items()}
            fast_sha256 = self._heads.write(fast_head)[0] if fast_head is not None else None
            # Last, as that is what the next one will be like.
            head_sha256, head_bytes = self._heads.write(head)
            self._keep_sums(head)
            gone = tuple(each for each in stood if each.key not in {left.key for left in stand})
            revision = catalog.append(
                Publication(
                    action,
                    records,
                    live,
                    head_sha256,
                    self.encoder.fingerprint,
                    policy,
                    {
                        **head.summary,
                        "changed_decisions": changed,
                        **_challenges_document(stand, gone),
                        **({"gate": gate.document()} if gate is not None else {}),
                        **({"forced": force} if force else {}),
                        **({"cascade": fast_head.summary} if fast_head is not None else {}),
                    },
                    tuple(StoredChallenger(each, sha256) for each, (sha256, _) in others.items()),
                    fast_sha256,
                )
            )
            self._prune_heads(revision)
            self._compiled = (head_sha256, head)
        self._live = (revision, tasks)
        return Published(revision, head, head.summary, changed, gate, head_bytes, stand, gone)

    def _live_at(self, revision: int) -> Mapping[str, TaskKey]:
        """The tasks that are live at `revision`, by name; they never change once it is there."""
        if self._live[0] != revision:
            self._live = (revision, {key.name: key for key in self.catalog.live(revision)})
        return self._live[1]

    def _compile(
        self,
        keys: Collection[TaskKey],
        new: Mapping[TaskKey, TaskRecord],
        policy: Policy,
        before: Head | None,
    ) -> Head:
        if policy.head != "nearest-mean" and before is not None and not self._pool.tasks:
            self._take_over_sums(before)
        self._pool.hold(set(keys), lambda key: self._task_statistics(key, new))
        return compile_head(
            self._pool,
            policy=policy,
            encoder=self.encoder.fingerprint,
            dimension=self.encoder.dimension,
            background=None if policy.head == "nearest-mean" else self._known_background(),
            sample_scores=self._sample_scores,
            before=before,
        )

    def _take_over_sums(self, before: Head) -> None:
        """Let the pool know the sums that are kept, where the head before needed no others."""
        if _is_sampled(before):
            known = self._kept_sums.read(self.encoder.dimension, self._stored_statistics)
            if known is not None:
                self._pool.know(known)

    def _stored_statistics(self, key: TaskKey, sha256: str) -> TaskStatistics:
        """The task of that key, if these are its stored rows.

        Raises:
            CorruptArtifactError: they are not.
            PromptyardError: there is no such task, or none of this encoder.
        """
        statistics = self._task_statistics(key, {})
        if self._contents[key] != sha256:
            raise CorruptArtifactError(f"kept sums of {key}", "of other rows", "publish again")
        return statistics

    def _keep_sums(self, head: Head) -> None:
        """Keep the sums that `head` was compiled with; where they cannot be, nothing is lost."""
        if head.kind == "nearest-mean" or not _is_sampled(head):
            return
        sums = self._pool.known_sums()
        if sums is not None:
            keys = [task.key for task in sums.tasks]
            with contextlib.suppress(OSError, StorageError):
                self._kept_sums.write(sums, block_starts(keys), self._contents.__getitem__)

    def _compile_fast(
        self, keys: Collection[TaskKey], new: Mapping[TaskKey, TaskRecord], policy: Policy
    ) -> Head | None:
        """The head of the fast encoder, where the policy has a cascade.

        Raises:
            InvalidInputError: a task keeps no texts, or the catalog is of the fast encoder itself.
        """
        if not policy.cascade or not keys:
            return None
        if self._fast_heads is None:
            self._fast_heads = FastHeads(self.artifacts, self._load_fast())
        if self._fast_heads.fast.encoder.fingerprint == self.encoder.fingerprint:
            raise InvalidInputError(
                "cascade",
                f"with the encoder {self.encoder.name}",
                "all is decided fast: `promptyard policy set --no-cascade`",
            )
        return self._fast_heads.compile(
            [new.get(key) or self.catalog.record(key) for key in keys], policy
        )

    def _forget(self, records: tuple[TaskRecord, ...]) -> None:
        """Drop what is cached of records that were not published: their keys are free again."""
        if self._fast_heads is not None:
            self._fast_heads = FastHeads(self.artifacts, self._fast_heads.fast)
        for record in records:
            self._statistics.pop(record.key, None)
            self._contents.pop(record.key, None)
            self._rows.pop(record.key, None)
        unpublished = {record.key for record in records}
        self._pool.update(task for task in self._pool.tasks if task.key not in unpublished)

    def _known_background(self) -> Background:
        if self._background is None:
            self._background = kept_background(self.home, self.encoder)
        return self._background

    def _task_statistics(self, key: TaskKey, new: Mapping[TaskKey, TaskRecord]) -> TaskStatistics:
        if key not in self._statistics:
            record = new.get(key) or self.catalog.record(key)
            if record.encoder != self.encoder.fingerprint:
                raise IncompatibleModelError(
                    f"encoder of {key}",
                    record.encoder,
                    f"the catalog is of {self.encoder.fingerprint} now; register the task again"
                    " with --revise",
                )
            self._statistics[key] = statistics_of(self.artifacts, record)
            self._contents[key] = record.embeddings_sha256
        return self._statistics[key]

    def _count_rows(self, key: TaskKey) -> int:
        """How many rows a task keeps; also of one whose stored rows are damaged, to retire it."""
        statistics = self._statistics.get(key)
        if statistics is not None:
            return statistics.row_count
        record = self.catalog.record(key)
        return 0 if record.statistics_only else record.data.rows

    def _read_head_if_whole(self, revision: int) -> Head | None:
        """The compiled head of a revision; None where its file is damaged."""
        try:
            return self._read_head(revision)
        except CorruptArtifactError:
            return None

    def _read_head(self, revision: int) -> Head:
        if not revision:
            return empty_head(self.encoder.fingerprint, self.encoder.dimension)
        sha256 = self.catalog.revision(revision).head_sha256
        if self._compiled is not None and self._compiled[0] == sha256:
            return self._compiled[1]
        return self._heads.read(sha256)

    def _prune_heads(self, newest: int) -> None:
        """Remove heads that only old revisions use: they can be compiled again from the records.

        While other writers are held off: none can be about to use a part of such a head again.
        """
        last = newest - _KEPT_HEADS
        if last > 0:
            recent = self.catalog.head_digests(last + 1, newest)
            self._heads.remove(self.catalog.head_digests(last, last) - recent, recent)


def _is_sampled(head: Head) -> bool:
    """Whether a head was calibrated on some of the rows alone: then it needs sums over the rest."""
    return bool((head.held_out == UNSCORED).any())


class _RowCounts(dict[TaskKey, int]):
    """How many rows tasks keep; each is counted when it is asked for first."""

    def __init__(self, count: Callable[[TaskKey], int]) -> None:
        super().__init__()
        self._count = count

    def __missing__(self, key: TaskKey) -> int:
        self[key] = self._count(key)
        return self[key]


def _challenges_document(
    stand: tuple[Challenge, ...], ended: tuple[Challenge, ...]
) -> dict[str, object]:
    """What is recorded of challengers with the catalog revision."""
    document: dict[str, object] = {}
    if stand:
        document["challengers"] = {str(each.key): each.share_text for each in stand}
    if ended:
        document["ended_challengers"] = [str(each.key) for each in ended]
    return document


def _check_fallback(policy: RejectionPolicy, live: Mapping[str, TaskKey]) -> None:
    if not policy.is_served(live):
        raise TaskNotFoundError(
            "fallback task", policy.fallback_task, "name a live task; `promptyard list` has them"
        )
