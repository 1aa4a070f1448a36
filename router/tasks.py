"""The values that pass between the parts: tasks, records, soft prompts. All frozen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from router.errors import CorruptArtifactError, InvalidInputError

if TYPE_CHECKING:  # a client loads no numpy for these values
    from router.interfaces import FloatArray
    from router.label_classifier import LabelClassifier

MAX_TASK_NAME_CHARACTERS = 100
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

RECORD_FORMAT = 1

# `prompt`: vectors before the input embeddings; `prefix`: keys and values for every layer.
PromptMethod = Literal["prompt", "prefix"]


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Where a task's knowledge came from: the labelled rows, and how they were used."""

    sha256: str
    rows: int
    train_rows: int
    validation_rows: int
    duplicates_dropped: int = 0


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """How the tuning of a prompt went.

    `losses` are training losses, each the mean of `steps_per_loss` steps. After `validated_at[i]`
    steps, the validation rows had the score `validation_scores[i]` and the loss
    `validation_losses[i]`.
    """

    steps_per_loss: int
    losses: tuple[float, ...]
    validated_at: tuple[int, ...]
    validation_scores: tuple[float, ...]
    validation_losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TriedSettings:
    """A configuration that a search of tuning settings tried.

    `settings` are those in which the configurations differ; `steps` is how many it made before it
    was stopped or at its end. `score`, by the task's metric, and `loss` are its best ones on the
    validation rows, None where `problem` says why there are none. `chosen` is the one that is kept.
    """

    settings: Mapping[str, float | int | str]
    steps: int = 0
    score: float | None = None
    loss: float | None = None
    chosen: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PromptSummary:
    """The soft prompt of a task: its file, and what it was tuned on.

    `scores` are by `metric` (`trainer.answer_metrics`) on the validation rows: `prompt`,
    `majority`, `no_prompt`, `instruction`. Of a prefix, `hidden_size` is the width of one layer's
    keys, and `layers` counts the layers. `versions` are those of the software that tuned it.
    `probabilities` are the mean ones of desired and rejected outputs on the validation rows that
    have rejected ones: `desired_before` tuning, under the prompt that it started from,
    `desired_after`, `rejected_before`, `rejected_after`. `search` are the settings that a search
    tried; empty where there was none.
    """

    sha256: str
    tokens: int
    hidden_size: int
    base_model: str
    base_model_name: str
    metric: str
    scores: Mapping[str, float]
    settings: Mapping[str, float | int | str]
    steps: int
    seconds: float
    method: PromptMethod = "prompt"
    layers: int = 0
    curve: TrainingCurve | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)
    search: tuple[TriedSettings, ...] = ()

    @property
    def width(self) -> int:
        """W, the numbers of each virtual token."""
        return self.hidden_size * (2 * self.layers if self.method == "prefix" else 1)


@dataclass(frozen=True, slots=True)
class ClassifierSummary:
    """The label classifier of a task (`router.label_classifier`): its file, and what it is worth.

    `accuracy` is the share of the task's rows that it labels rightly when they are held out;
    `prompt_weight` is what the base model's log-probabilities count beside it;
    `encoder_prompt_tokens` is the length of the task's encoder prompt, 0 where it has none.
    """

    sha256: str
    prompt_weight: float
    accuracy: float
    encoder_prompt_tokens: int = 0


# Fields of later versions. A record that lacks them keeps the digest that it was stored with.
_LATER_FIELDS: Mapping[str, object] = {
    "method": "prompt",
    "layers": 0,
    "curve": None,
    "versions": {},
    "probabilities": {},
    "search": (),
}


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """Everything that is known of one revision of a task. Written once, never changed.

    `template` makes the base model's input of a text and its passages (`router.templates`); empty
    is the default one. `texts_sha256` is the file of the task's texts, where they were kept.
    `statistics_only`: `embeddings_sha256` is a file of sums over the embeddings, which were not.
    """

    name: str
    revision: int
    created_at: str
    description: str
    instruction: str
    outputs: tuple[str, ...] | None
    data: DataSummary
    encoder: str
    embeddings_sha256: str
    prompt: PromptSummary | None = None
    forced_reason: str = ""
    format: int = RECORD_FORMAT
    template: str = ""
    classifier: ClassifierSummary | None = None
    texts_sha256: str = ""
    statistics_only: bool = False

    @property
    def key(self) -> TaskKey:
        """What identifies this record."""
        return TaskKey(self.name, self.revision)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces. Its SHA-256 is the record's digest."""
        document = asdict(self)
        for later in ("template", "classifier", "texts_sha256", "statistics_only"):
            if not document[later]:
                del document[later]
        if self.classifier is not None and not self.classifier.encoder_prompt_tokens:
            del document["classifier"]["encoder_prompt_tokens"]
        if document["prompt"] is not None:
            document["prompt"] = {
                key: value
                for key, value in document["prompt"].items()
                if key not in _LATER_FIELDS or value != _LATER_FIELDS[key]
            }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @property
    def sha256(self) -> str:
        """Digest of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> TaskRecord:
        """The record that `to_json` wrote.

        Raises:
            CorruptArtifactError: not a record, or of a format that this version cannot read.
        """
        try:
            raw = json.loads(text)
            if raw["format"] != RECORD_FORMAT:
                raise CorruptArtifactError(
                    "task record format", raw["format"], "upgrade promptyard to read this catalog"
                )
            prompt = raw.pop("prompt")
            outputs = raw.pop("outputs")
            classifier = raw.pop("classifier", None)
            return cls(
                **{**raw, "data": DataSummary(**raw["data"])},
                outputs=None if outputs is None else tuple(outputs),
                prompt=None if prompt is None else _prompt_summary(prompt),
                classifier=None if classifier is None else ClassifierSummary(**classifier),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptArtifactError(
                "task record", text, "restore the catalog from a backup"
            ) from error


def _prompt_summary(raw: dict[str, Any]) -> PromptSummary:
    curve = raw.pop("curve", None)
    if curve is not None:
        lists = {key: value for key, value in curve.items() if key != "steps_per_loss"}
        curve = TrainingCurve(
            steps_per_loss=curve["steps_per_loss"],
            **{key: tuple(values) for key, values in lists.items()},
        )
    search = tuple(TriedSettings(**tried) for tried in raw.pop("search", ()))
    return PromptSummary(**raw, curve=curve, search=search)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a catalog routes: the kind of head, and how much of its own inputs a task may lose.

    `false_reject_rate` is the share of the tasks' own inputs that may be kept from every task, as
    unknown or as ambiguous; `ambiguous_rate` is the part of it that may be ambiguous. `on_unknown`
    is the rejection policy, as `router.rejection` writes it. `cascade`: every revision has a head
    of the fast encoder, too (`router.cascade`).
    """

    head: str = "auto"
    false_reject_rate: float = 0.05
    ambiguous_rate: float = 0.005
    on_unknown: str = "abstain"
    cascade: bool = False


class TaskKey(NamedTuple):
    """A task at one of its revisions. (A tuple: a publish looks up ten thousands of them.)"""

    name: str
    revision: int

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """A learned matrix `[P, W]` float32, and the fingerprint of the base model it belongs to.

    W is H, or, of a prefix, `layers` times keys and values of one layer, in this order.
    """

    values: FloatArray
    base_model: str
    method: PromptMethod = "prompt"
    layers: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """[P, H], or of a prefix [P, layers, 2 (keys, values), width of one layer's keys]."""
        if self.method == "prompt":
            return self.values.shape
        tokens, width = self.values.shape
        return (tokens, self.layers, 2, width // (2 * self.layers))


@dataclass(frozen=True, slots=True)
class ServedTask:
    """A task as a snapshot serves it: its record, and its prompt or why there is none."""

    record: TaskRecord
    prompt: SoftPrompt | None = field(default=None, repr=False)
    problem: str = ""
    classifier: LabelClassifier | None = field(default=None, repr=False)


def check_task_name(name: str) -> str:
    """`name`, if it can name a task.

    Raises:
        InvalidInputError: empty, too long, or other characters than letters, digits, `.`, `_`, `-`.
    """
    if len(name) > MAX_TASK_NAME_CHARACTERS or not _TASK_NAME.fullmatch(name):
        raise InvalidInputError(
            "task name",
            repr(name),
            "use letters, digits, '.', '_' and '-', starting with a letter or digit, "
            f"at most {MAX_TASK_NAME_CHARACTERS} characters",
        )
    return name
