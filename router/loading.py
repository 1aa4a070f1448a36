"""Loads what a catalog revision serves: head, records, prompts. Every file is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import structlog
from numpy.typing import NDArray

from router.artifacts import ArtifactReader
from router.catalog import (
    ARTIFACTS_FOLDER,
    HEADS_FOLDER,
    CatalogReader,
    CatalogRevision,
    StoredChallenger,
)
from router.challengers import Challenge
from router.errors import (
    CorruptArtifactError,
    IncompatibleModelError,
    PromptyardError,
    TaskOutOfServiceError,
)
from router.head import Head, empty_head
from router.head_files import HeadReader
from router.interfaces import FloatArray, HalfArray
from router.label_classifier import LabelClassifier
from router.pooled_moments import PooledMoments
from router.rejection import RejectionPolicy
from router.snapshot import Challenger, Snapshot
from router.statistics import TaskStatistics, TaskSums, UnreadStatistics
from router.tasks import (
    Policy,
    PromptMethod,
    ServedTask,
    SoftPrompt,
    TaskKey,
    TaskRecord,
)

if TYPE_CHECKING:
    from router.cascade import Cascade, FastModel
    from router.fitting import Background

EMBEDDINGS_TENSOR = "embeddings"
CLUSTERS_TENSOR = "clusters"
COUNTS_TENSOR = "counts"
SUMS_TENSOR = "sums"
GRAM_TENSOR = "second_moments"
CLASSIFIER_TENSOR = "label_rows"
ENCODER_PROMPT_TENSOR = "encoder_prompt"
PROMPT_TENSOR = "prompt_embeddings"
PREFIX_TENSOR = "prefix_keys_and_values"
PROMPT_TENSORS: Mapping[PromptMethod, str] = {"prompt": PROMPT_TENSOR, "prefix": PREFIX_TENSOR}

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModels:
    """What the running models demand of a catalog.

    `base_model` is None where none is loaded, `fast` where there is no cascade. `background` gives
    what the encoder makes of text in general, which not every use needs.
    """

    encoder: str
    dimension: int
    background: Callable[[], Background] = field(repr=False)
    base_model: str | None = None
    fast: FastModel | None = None


class SnapshotLoader:
    """Loads snapshots from a home folder for one set of models."""

    def __init__(self, home: Path, models: ServedModels) -> None:
        self._artifacts = ArtifactReader(home / ARTIFACTS_FOLDER)
        self._heads = HeadReader(home / HEADS_FOLDER)
        self._models = models

    def empty(self) -> Snapshot:
        """The snapshot of a catalog in which nothing was registered yet."""
        return Snapshot.build(0, empty_head(self._models.encoder, self._models.dimension), {})

    def load(self, catalog: CatalogReader, revision: int, previous: Snapshot | None) -> Snapshot:
        """The snapshot of `revision`. Tasks that did not change are taken over from `previous`.

        A task whose prompt cannot be loaded is served without it, with the problem noted; a
        challenger of which anything cannot be loaded is not served at all, with the problem noted.

        Raises:
            IncompatibleModelError: the revision was made for another encoder.
            CorruptArtifactError: the head is damaged and cannot be compiled again.
        """
        if revision == 0:
            return self.empty()
        about = catalog.revision(revision)
        check_encoder(about.encoder, self._models.encoder)
        live = catalog.live(revision)
        known = previous.tasks if previous is not None else {}
        tasks = {key.name: self._task(catalog, key, known) for key in live}
        rejection = RejectionPolicy.parse(about.policy.on_unknown, f"policy of revision {revision}")
        head = self._head(catalog, about, about.head_sha256, live)
        challengers, broken = self._challengers(catalog, about, tasks, rejection, previous)
        snapshot = Snapshot.build(revision, head, tasks, rejection, challengers, broken)
        return replace(snapshot, cascade=self._cascade(catalog, snapshot, about.policy))

    def _cascade(
        self, catalog: CatalogReader, snapshot: Snapshot, policy: Policy
    ) -> Cascade | None:
        """What decides first, where there is a fast encoder; without it all is decided as ever."""
        fast = self._models.fast
        if fast is None or not snapshot.tasks:
            return None
        # Which reads statistics, as this module does, and may compile: a part of a start's imports.
        from router.cascade import Cascade

        if snapshot.challengers:
            _log.warning("no cascade", problem="challengers are tried by the full encoder")
            return None
        try:
            head = self._fast_head(catalog, snapshot, policy, fast)
        except PromptyardError as error:
            _log.warning("no cascade", problem=str(error))
            return None
        tasks = snapshot.tasks
        return Cascade(fast.encoder, Snapshot.build(snapshot.revision, head, tasks))

    def _fast_head(
        self, catalog: CatalogReader, snapshot: Snapshot, policy: Policy, fast: FastModel
    ) -> Head:
        """The head of the fast encoder that was published with the revision, or one like it."""
        from router.cascade import FastHeads

        sha256 = catalog.fast_head(snapshot.revision)
        if sha256 is not None:
            try:
                return self._read_head(sha256, snapshot.head.tasks, fast.encoder.fingerprint)
            except CorruptArtifactError as error:
                problem = str(error)
        else:
            problem = "not published with the revision: see promptyard policy set --cascade"
        _log.warning("compiling the fast head", revision=snapshot.revision, problem=problem)
        records = [task.record for task in snapshot.tasks.values()]
        return FastHeads(self._artifacts, fast).compile(records, policy)

    def _challengers(
        self,
        catalog: CatalogReader,
        about: CatalogRevision,
        tasks: Mapping[str, ServedTask],
        rejection: RejectionPolicy,
        previous: Snapshot | None,
    ) -> tuple[dict[str, Challenger], dict[Challenge, str]]:
        """The challengers that can be served, and what is wrong with the others."""
        known = {}
        if previous is not None:
            known = {name: each.snapshot.task(name) for name, each in previous.challengers.items()}
        found, broken = {}, {}
        for stored in catalog.challengers(about.revision):
            challenge = stored.challenge
            try:
                snapshot = self._stand_in(catalog, about, stored, tasks, rejection, known)
            except PromptyardError as error:
                broken[challenge] = str(error)
                _log.warning(
                    "challenger out of service", task=str(challenge.key), problem=str(error)
                )
            else:
                found[challenge.task] = Challenger(challenge, snapshot)
        return found, broken

    def _stand_in(
        self,
        catalog: CatalogReader,
        about: CatalogRevision,
        stored: StoredChallenger,
        tasks: Mapping[str, ServedTask],
        rejection: RejectionPolicy,
        known: Mapping[str, ServedTask],
    ) -> Snapshot:
        """The snapshot in which a challenger stands in for the current revision of its task."""
        key = stored.challenge.key
        task = self._task(catalog, key, known)
        if task.problem:
            raise TaskOutOfServiceError("challenger", f"{key} ({task.problem})", "end it")
        standing = {**tasks, key.name: task}
        keys = [standing[name].record.key for name in sorted(standing)]
        head = self._head(catalog, about, stored.head_sha256, keys)
        return Snapshot.build(about.revision, head, standing, rejection)

    def _task(
        self, catalog: CatalogReader, key: TaskKey, known: Mapping[str, ServedTask]
    ) -> ServedTask:
        before = known.get(key.name)
        if before is not None and before.record.key == key and not before.problem:
            return before
        record = catalog.record(key)
        try:
            prompt = self._prompt(record)
            classifier = None
            if prompt is not None:
                classifier = read_classifier(self._artifacts, record, self._models.dimension)
            return ServedTask(record, prompt, classifier=classifier)
        except PromptyardError as error:
            _log.warning("task out of service", task=str(key), problem=str(error))
            return ServedTask(record, problem=str(error))

    def _prompt(self, record: TaskRecord) -> SoftPrompt | None:
        prompt = record.prompt
        if prompt is None or self._models.base_model is None:
            return None
        if prompt.base_model != self._models.base_model:
            raise IncompatibleModelError(
                f"base model of {record.key}",
                prompt.base_model_name,
                "serve with that base model (--base-model), or tune the task again with --revise",
            )
        values = read_prompt(self._artifacts, record)
        return SoftPrompt(values, prompt.base_model, prompt.method, prompt.layers)

    def _head(
        self,
        catalog: CatalogReader,
        about: CatalogRevision,
        sha256: str,
        keys: Sequence[TaskKey],
    ) -> Head:
        """The compiled head of that digest for tasks, sorted by name."""
        try:
            return self._read_head(sha256, keys, self._models.encoder)
        except CorruptArtifactError as error:
            # Heads are derived: old ones are pruned, and a damaged one is made again.
            _log.warning("compiling the head again", revision=about.revision, problem=str(error))
        from router.compiling import compile_head  # rarely needed, and a third of a start's imports

        pool = PooledMoments(self._models.dimension)
        pool.update(read_statistics(self._artifacts, catalog.record(key)) for key in keys)
        return compile_head(
            pool,
            policy=about.policy,
            encoder=self._models.encoder,
            dimension=self._models.dimension,
            background=self._models.background(),
        )

    def _read_head(self, sha256: str, keys: Sequence[TaskKey], encoder: str) -> Head:
        head = self._heads.read(sha256)
        if list(head.tasks) != list(keys) or head.encoder != encoder:
            raise CorruptArtifactError(
                "compiled head", "of other tasks or of another encoder", "publish again"
            )
        return head


def check_encoder(catalog: str, running: str) -> None:
    """Refuse a catalog that was made for another encoder.

    Raises:
        IncompatibleModelError: the fingerprints differ.
    """
    if catalog != running:
        raise IncompatibleModelError(
            "encoder", running, f"this catalog was made with {catalog}; choose it with --encoder"
        )


def statistics_of(artifacts: ArtifactReader, record: TaskRecord) -> TaskStatistics:
    """As `read_statistics`, but stored rows are read, or found to be damaged, at first need."""
    if record.statistics_only:
        return _read_sums(artifacts, record)
    return UnreadStatistics(
        record.key, record.data.rows, lambda: read_statistics(artifacts, record)
    )


def read_statistics(artifacts: ArtifactReader, record: TaskRecord) -> TaskStatistics:
    """The stored rows of a task, or the sums over them where that is all that was kept.

    Raises:
        CorruptArtifactError: missing, damaged or inconsistent.
    """
    if record.statistics_only:
        return _read_sums(artifacts, record)
    try:
        tensors = artifacts.read_tensors(record.embeddings_sha256)
        embeddings = tensors.matrix(EMBEDDINGS_TENSOR, np.int16)
        clusters = tensors.matrix(CLUSTERS_TENSOR, np.int16, width=1)[:, 0]
    except CorruptArtifactError as error:
        raise CorruptArtifactError(
            f"routing rows of {record.key}, {error.field}", error.value, error.remedy
        ) from error
    if (
        not len(embeddings)
        or not len(embeddings) == len(clusters) == record.data.rows
        or int(clusters.min()) < 0
    ):
        raise CorruptArtifactError(
            f"routing rows of {record.key}", "inconsistent", "register the task again"
        )
    return TaskStatistics(
        record.key, cast("NDArray[np.int16]", embeddings), cast("NDArray[np.int16]", clusters)
    )


def _read_sums(artifacts: ArtifactReader, record: TaskRecord) -> TaskStatistics:
    try:
        tensors = artifacts.read_tensors(record.embeddings_sha256)
        sums = tensors.matrix(SUMS_TENSOR, np.int64)
        counts = tensors.matrix(COUNTS_TENSOR, np.int64, width=1)[:, 0]
        dimension = sums.shape[1]
        width = dimension * (dimension + 1) // 2
        triangle = tensors.matrix(GRAM_TENSOR, np.int64, width)
    except CorruptArtifactError as error:
        raise CorruptArtifactError(
            f"routing sums of {record.key}, {error.field}", error.value, error.remedy
        ) from error
    if len(sums) != len(counts) or len(triangle) != 1 or int(counts.sum()) != record.data.rows:
        raise CorruptArtifactError(
            f"routing sums of {record.key}", "inconsistent", "register the task again"
        )
    gram = np.zeros((dimension, dimension))
    gram[np.triu_indices(dimension)] = triangle[0]
    gram += np.triu(gram, 1).T
    return TaskStatistics(
        record.key,
        np.zeros((0, dimension), np.int16),
        np.zeros(0, np.int16),
        TaskSums(counts.astype(np.float64), sums.astype(np.float64), gram),
    )


def read_prompt(artifacts: ArtifactReader, record: TaskRecord) -> FloatArray:
    """The soft prompt `[P, W]` of a task that has one; the array cannot be written to.

    Raises:
        CorruptArtifactError: missing, damaged, of another shape, or of a method that this version
            does not know.
    """
    prompt = record.prompt
    if prompt is None:
        raise CorruptArtifactError(f"prompt of {record.key}", "none", "tune it with --revise")
    if prompt.method not in PROMPT_TENSORS:
        raise CorruptArtifactError(
            f"method of the prompt of {record.key}", prompt.method, "upgrade promptyard to serve it"
        )
    name = PROMPT_TENSORS[prompt.method]
    values = artifacts.read_tensor(prompt.sha256, name, np.float32, prompt.width)
    if len(values) != prompt.tokens:
        raise CorruptArtifactError(
            f"prompt of {record.key}", f"{len(values)} tokens, not {prompt.tokens}", "restore it"
        )
    values.setflags(write=False)  # so that what was computed from it can be kept
    return cast("FloatArray", values)


def read_classifier(
    artifacts: ArtifactReader, record: TaskRecord, dimension: int
) -> LabelClassifier | None:
    """The label classifier of a task, for embeddings `[D]`; None where it has none.

    Raises:
        CorruptArtifactError: missing, damaged, or not for as many dimensions or labels.
    """
    about = record.classifier
    if about is None:
        return None
    rows = artifacts.read_tensor(about.sha256, CLASSIFIER_TENSOR, np.float32, dimension + 1)
    if len(rows) != len(record.outputs or ()):
        raise CorruptArtifactError(
            f"label classifier of {record.key}", f"{len(rows)} labels", "register the task again"
        )
    prompt: HalfArray | None = None
    if about.encoder_prompt_tokens:
        read = artifacts.read_tensor(about.sha256, ENCODER_PROMPT_TENSOR, np.float16)
        prompt = cast("HalfArray", read)
        if len(prompt) != about.encoder_prompt_tokens:
            raise CorruptArtifactError(
                f"encoder prompt of {record.key}",
                f"{len(prompt)} tokens",
                "register the task again",
            )
    return LabelClassifier(cast("FloatArray", rows), about.prompt_weight, prompt)
