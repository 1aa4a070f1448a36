"""Compares two catalog revisions by their decisions on the same texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import binomtest

from router.background import when_needed
from router.catalog import CatalogReader
from router.decision import Decision, Outcome
from router.errors import InvalidInputError
from router.interfaces import Encoder
from router.loading import ServedModels, SnapshotLoader
from router.snapshot import Snapshot
from trainer import metrics
from trainer.data import MAX_INPUT_BYTES, read_cell, read_rows
from trainer.metrics import Interval

_MAX_LABEL_BYTES = 1024


@dataclass(frozen=True, slots=True)
class ComparedText:
    """One row of a file. `label` is as it stands there, or None where the row has none."""

    number: int
    text: str
    label: str | None


@dataclass(frozen=True, slots=True)
class ChangedDecision:
    """A row that is decided differently. `text` is empty unless it was asked for.

    A task is None for unknown. `label` is the right answer as the file has it, None where the row
    has none.
    """

    number: int
    text: str
    label: str | None
    kind: str
    outcome_a: Outcome
    task_a: str | None
    outcome_b: Outcome
    task_b: str | None


@dataclass(frozen=True, slots=True)
class McNemar:
    """McNemar's exact test on the rows that are right at one revision only.

    `p_value` is two-sided: how likely at least so uneven a split is if neither revision is better.
    """

    right_only_at_a: int
    right_only_at_b: int
    p_value: float


@dataclass(frozen=True, slots=True)
class LabelledComparison:
    """How often each revision is right on rows labelled with a task. A rejected row is wrong.

    `difference` is the accuracy at B less that at A, with its 95 % interval.
    """

    rows: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    difference_interval: Interval
    mcnemar: McNemar


@dataclass(frozen=True, slots=True)
class OutOfScopeComparison:
    """The share of the out-of-scope rows that each revision calls unknown."""

    rows: int
    rejected_a: float
    rejected_b: float


@dataclass(frozen=True, slots=True)
class RevisionComparison:
    """What differs between two revisions.

    `kinds` counts the changed rows by kind of change. `labelled` and `out_of_scope` are None where
    no row is of that sort. `unknown_labels` counts rows by labels that are a task of neither
    revision; they are not scored.
    """

    revision_a: int
    revision_b: int
    rows: int
    kinds: Mapping[str, int]
    labelled: LabelledComparison | None
    out_of_scope: OutOfScopeComparison | None
    unknown_labels: Mapping[str, int]
    changed: tuple[ChangedDecision, ...]


def read_compared_texts(path: Path, input_field: str, label_field: str) -> list[ComparedText]:
    """The rows of `path`, in its order. A row whose label is missing or empty has none.

    Raises:
        InvalidInputError: missing, unreadable, no rows, or a field that is malformed; the message
            names the file and the row.
    """
    texts = []
    for number, row in read_rows(path):
        value = row.get(label_field)
        has_label = value is not None and bool(str(value).strip())
        texts.append(
            ComparedText(
                number,
                read_cell(path, number, row, input_field, MAX_INPUT_BYTES),
                read_cell(path, number, row, label_field, _MAX_LABEL_BYTES) if has_label else None,
            )
        )
    if not texts:
        raise InvalidInputError(f"{path}", "no rows", "give a file with inputs")
    return texts


def check_revisions(home: Path, revisions: Mapping[str, int]) -> None:
    """Refuse revisions that the catalog of `home` does not have; the keys name the arguments.

    Raises:
        InvalidInputError: there is no such revision.
        CatalogError: there is no catalog, or it cannot be read.
    """
    with CatalogReader(home) as catalog:
        newest = catalog.newest_revision()
    for argument, revision in revisions.items():
        if not 1 <= revision <= newest:
            remedy = f"give a catalog revision from 1 to {newest}"
            raise InvalidInputError(argument, revision, remedy)


def load_revisions(home: Path, encoder: Encoder, a: int, b: int) -> tuple[Snapshot, Snapshot]:
    """The snapshots of two revisions, without prompts: those do not route.

    Raises:
        PromptyardError: a revision is not there, was made with another encoder, or is damaged.
    """
    models = ServedModels(encoder.fingerprint, encoder.dimension, when_needed(encoder))
    loader = SnapshotLoader(home, models)
    with CatalogReader(home) as catalog:
        at_a = loader.load(catalog, a, None)
        return at_a, at_a if a == b else loader.load(catalog, b, at_a)


def compare_decisions(
    texts: Sequence[ComparedText],
    at_a: Sequence[Decision],
    at_b: Sequence[Decision],
    *,
    revisions: tuple[int, int],
    tasks: Collection[str],
    out_of_scope_label: str,
    with_text: bool = False,
) -> RevisionComparison:
    """Compare two decisions on each text; all three sequences are `[B]`, in the same order.

    `tasks` are those of either revision. A label that is a task of one of them only is scored: at
    the other one the row is wrong.

    Raises:
        ValueError: the sequences differ in length.
    """
    changed: list[ChangedDecision] = []
    right: list[tuple[bool, bool]] = []
    rejected: list[tuple[bool, bool]] = []
    unknown_labels: Counter[str] = Counter()
    for text, a, b in zip(texts, at_a, at_b, strict=True):
        task_a, task_b = _task(a), _task(b)
        kind = kind_of_change(a, b)
        if kind is not None:
            changed.append(
                ChangedDecision(
                    *(text.number, text.text if with_text else "", text.label, kind),
                    *(a.outcome, task_a, b.outcome, task_b),
                )
            )
        if text.label is None:
            continue
        if text.label == out_of_scope_label:
            rejected.append((task_a is None, task_b is None))
        elif text.label in tasks:
            right.append((task_a == text.label, task_b == text.label))
        else:
            unknown_labels[text.label] += 1
    kinds = Counter(change.kind for change in changed)
    return RevisionComparison(
        *revisions,
        rows=len(texts),
        kinds=dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0]))),
        labelled=_labelled(right) if right else None,
        out_of_scope=OutOfScopeComparison(len(rejected), *_shares(rejected)) if rejected else None,
        unknown_labels=dict(sorted(unknown_labels.items())),
        changed=tuple(changed),
    )


def kind_of_change(a: Decision, b: Decision) -> str | None:
    """What became of a decision, such as `matched -> other task`; None where it is the same.

    Tasks are compared by name: another revision of the same task is no change.
    """
    before, after = _task(a), _task(b)
    if a.outcome is b.outcome and before == after:
        return None
    became = b.outcome.value
    if before is not None and after is not None and before != after:
        became = "other task" if b.outcome is Outcome.MATCHED else f"{became}, other task"
    return f"{a.outcome.value} -> {became}"


def mcnemar(right_only_at_a: int, right_only_at_b: int) -> McNemar:
    """McNemar's test (1947) in its exact form: a two-sided binomial test with probability 1/2.

    No discordant row says nothing against equality: the p-value is 1.
    """
    rows = right_only_at_a + right_only_at_b
    p_value = float(binomtest(right_only_at_a, rows, 0.5).pvalue) if rows else 1.0
    return McNemar(right_only_at_a, right_only_at_b, p_value)


def _labelled(right: Sequence[tuple[bool, bool]]) -> LabelledComparison:
    pairs = Counter(right)
    both, neither = pairs[True, True], pairs[False, False]
    only_a, only_b = pairs[True, False], pairs[False, True]
    return LabelledComparison(
        len(right),
        *_shares(right),
        (only_b - only_a) / len(right),
        metrics.paired_difference_interval(both, only_a, only_b, neither),
        mcnemar(only_a, only_b),
    )


def _shares(pairs: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    return (
        metrics.share(sum(at_a for at_a, _ in pairs), len(pairs)),
        metrics.share(sum(at_b for _, at_b in pairs), len(pairs)),
    )


def _task(decision: Decision) -> str | None:
    return None if decision.task is None else decision.task.name
