"""Evaluates routing: decides labelled texts with a snapshot, and counts what became of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from router.background import when_needed
from router.cascade import Cascade, FastModel
from router.catalog import CatalogReader
from router.decision import Decision, Outcome
from router.errors import InvalidInputError, shorten
from router.interfaces import Embeddings, Encoder
from router.loading import ServedModels, SnapshotLoader
from router.snapshot import Snapshot
from trainer import metrics
from trainer.evaluation_rows import LabelledText
from trainer.metrics import (
    CoverageRisk,
    Interval,
    Percentiles,
    Reliability,
    Separation,
    TaskFigures,
)
from trainer.register import Progress
from trainer.task_map import TaskMap, task_map

_EMBED_ROWS = 512
_TIMED_ROWS = 200
_LISTED_PAIRS = 50
_LISTED_ERRORS = 50


@dataclass(frozen=True, slots=True)
class RoutedText:
    """A labelled text and the decision on it. `best` is the best-scoring task, also if rejected."""

    row: LabelledText
    best: str
    outcome: Outcome
    score: float
    margin: float
    threshold: float
    truncated: bool
    probability: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether the best-scoring task is the row's own: before rejection."""
        return self.best == self.row.task

    @property
    def is_rejected(self) -> bool:
        """Whether the outcome is unknown. An ambiguous row still goes to its best task."""
        return self.outcome is Outcome.UNKNOWN


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """How many rows of `task` have `taken_for` as their best-scoring task."""

    task: str
    taken_for: str
    rows: int


@dataclass(frozen=True, slots=True)
class RoutingError:
    """An in-scope row whose best-scoring task is wrong. `text` is shortened."""

    number: int
    text: str
    task: str
    best: str
    outcome: str
    score: float
    margin: float
    threshold: float
    probability: float | None


@dataclass(frozen=True, slots=True)
class RoutingFigures:
    """How well in-scope rows were routed. Shares are fractions.

    `accuracy` is before rejection; `accuracy_with_rejection` counts a rejected row as wrong. The
    intervals are 95 % intervals after Wilson. `outcomes` counts rows by outcome. `worst_errors`
    have the highest score over their threshold: the router was surest of them. `calibration`
    compares the probability of being right, before rejection, with being so; None where the head
    knows none.
    """

    rows: int
    accuracy: float
    accuracy_interval: Interval
    accuracy_with_rejection: float
    accuracy_with_rejection_interval: Interval
    macro_accuracy: float
    macro_accuracy_interval: Interval
    per_task: Mapping[str, TaskFigures]
    confused_pairs: tuple[ConfusedPair, ...]
    outcomes: Mapping[str, int]
    truncated: int
    worst_errors: tuple[RoutingError, ...]
    calibration: Reliability | None


@dataclass(frozen=True, slots=True)
class RejectFigures:
    """How well the score tells in-scope rows from those that belong to no task.

    `auroc` and `fpr_at_95_tpr` are of the best task's score, `over_threshold` of how far that is
    over the task's threshold, which is what decides. `*_rejected` are the shares of rows that were
    called unknown. `outcomes` counts the out-of-scope rows by outcome. `accepted_calibration` is
    that of all rows that were not called unknown, where an out-of-scope one is wrong whatever its
    probability: the probability is one of rows that belong to a task.
    """

    rows: int
    auroc: float
    fpr_at_95_tpr: float
    over_threshold: Separation
    in_scope_rejected: float
    out_of_scope_rejected: float
    outcomes: Mapping[str, int]
    accepted_calibration: Reliability | None


@dataclass(frozen=True, slots=True)
class CascadeFigures:
    """What a cascade saves and what it costs, beside the full encoder alone on the same rows.

    `decided_fast` is the share of all rows that the fast encoder decides, `out_of_scope_fast` that
    of the rows out of scope, which it should leave alone (None without such rows). `differing` is
    the share of all rows whose outcome or best task is another one. The other figures are as in
    `RoutingFigures` and `RejectFigures`.
    """

    decided_fast: float
    out_of_scope_fast: float | None
    differing: float
    accuracy: float
    accuracy_with_rejection: float
    out_of_scope_rejected: float | None
    milliseconds_per_decision: Percentiles


@dataclass(frozen=True, slots=True)
class RoutingEvaluation:
    """What `evaluate_routing` found. `reject` is None where no row is out of scope.

    `coverage_risk` is over all rows, by their score over the threshold; an out-of-scope row that is
    answered is wrong. `places` are the tasks on a map, see `trainer.task_map`.
    """

    catalog_revision: int
    head: str
    encoder: str
    tasks: tuple[str, ...]
    routing: RoutingFigures
    reject: RejectFigures | None
    coverage_risk: CoverageRisk
    milliseconds_per_decision: Percentiles
    places: TaskMap
    decisions: tuple[RoutedText, ...]
    cascade: CascadeFigures | None = None


def load_snapshot(
    home: Path,
    encoder: Encoder,
    base_model: str | None = None,
    revision: int | None = None,
    fast: FastModel | None = None,
) -> Snapshot:
    """A snapshot of a home, the newest by default, as a server with these models would serve it.

    Raises:
        PromptyardError: there is no catalog, no such revision, no live task in it, or it was made
            for other models.
    """
    models = ServedModels(
        encoder.fingerprint, encoder.dimension, when_needed(encoder), base_model, fast
    )
    with CatalogReader(home) as catalog:
        newest = catalog.newest_revision()
        if revision is not None and not 1 <= revision <= newest:
            raise InvalidInputError("--revision", revision, f"give 1 to {newest}")
        at = newest if revision is None else revision
        snapshot = SnapshotLoader(home, models).load(catalog, at, None)
    if not snapshot.tasks:
        raise InvalidInputError("home", home, f"no task is live at revision {at}: register one")
    return snapshot


def evaluate_routing(
    snapshot: Snapshot,
    encoder: Encoder,
    rows: Sequence[LabelledText],
    progress: Progress = lambda *_: None,
) -> RoutingEvaluation:
    """Decide `rows`, whose tasks are all the snapshot's, and measure the decisions."""
    embeddings = embed_texts(encoder, [row.text for row in rows], progress)
    decisions = decide(snapshot, rows, embeddings)
    cascade = None
    if snapshot.cascade is not None:
        cascade = cascade_figures(snapshot.cascade, snapshot, encoder, decisions, progress)
    tasks = tuple(key.name for key in snapshot.head.tasks)
    return RoutingEvaluation(
        snapshot.revision,
        snapshot.head.kind,
        encoder.fingerprint,
        tasks,
        routing_figures(decisions, tasks),
        reject_figures(decisions),
        coverage_risk(decisions),
        time_decisions(snapshot, encoder, rows, progress),
        task_map([row.task for row in rows], embeddings.vectors),
        tuple(decisions),
        cascade,
    )


def cascade_figures(
    cascade: Cascade,
    snapshot: Snapshot,
    encoder: Encoder,
    full: Sequence[RoutedText],
    progress: Progress = lambda *_: None,
) -> CascadeFigures:
    """Decide rows by `cascade`, of which `full` are the decisions of `snapshot` alone."""
    texts = [routed.row.text for routed in full]
    found = cascade.decide(texts, top_k=1)
    both = [
        alone if decision is None else _routed(alone.row, decision)
        for alone, decision in zip(full, found, strict=True)
    ]
    fast = np.array([decision is not None for decision in found])
    outside = np.array([routed.row.task is None for routed in full])
    reject = reject_figures(both)
    figures = routing_figures(both, [key.name for key in snapshot.head.tasks])
    differing = [
        (one.outcome, one.best) != (other.outcome, other.best)
        for one, other in zip(full, both, strict=True)
    ]

    def decide_one(text: str) -> None:
        if cascade.decide([text])[0] is None:
            snapshot.decide(encoder.encode([text]))

    return CascadeFigures(
        float(fast.mean()),
        float(fast[outside].mean()) if outside.any() else None,
        float(np.mean(differing)),
        figures.accuracy,
        figures.accuracy_with_rejection,
        None if reject is None else reject.out_of_scope_rejected,
        _timed(decide_one, texts, progress),
    )


def embed_texts(encoder: Encoder, texts: Sequence[str], progress: Progress) -> Embeddings:
    """Embed `texts` `[B]`, in pieces, with progress."""
    vectors = np.zeros((len(texts), encoder.dimension), np.float32)
    truncated = np.zeros(len(texts), np.bool_)
    for start in range(0, len(texts), _EMBED_ROWS):
        piece = slice(start, start + _EMBED_ROWS)
        progress("test rows", "embed", start, len(texts))
        embedded = encoder.encode(texts[piece])
        vectors[piece], truncated[piece] = embedded.vectors, embedded.truncated
    progress("test rows", "embed", len(texts), len(texts))
    return Embeddings(vectors, truncated)


def decide(
    snapshot: Snapshot, rows: Sequence[LabelledText], embeddings: Embeddings
) -> list[RoutedText]:
    """The snapshot's decision on every row."""
    decisions = snapshot.decide(embeddings, top_k=1)
    return [_routed(row, decision) for row, decision in zip(rows, decisions, strict=True)]


def _routed(row: LabelledText, decision: Decision) -> RoutedText:
    return RoutedText(
        row,
        decision.candidates[0].task.name,
        decision.outcome,
        decision.score,
        decision.margin,
        decision.threshold,
        decision.truncated,
        decision.probability,
    )


def routing_figures(decisions: Sequence[RoutedText], tasks: Sequence[str]) -> RoutingFigures:
    """Count the in-scope decisions. `tasks` are those of the snapshot."""
    in_scope = [routed for routed in decisions if routed.row.task is not None]
    number = {name: n for n, name in enumerate(tasks)}
    truth = np.array([number[str(routed.row.task)] for routed in in_scope], np.int64)
    best = np.array([number[routed.best] for routed in in_scope], np.int64)
    matrix = metrics.confusion(truth, best, len(tasks))
    per_task = metrics.per_task(matrix)
    right = sum(routed.is_right for routed in in_scope)
    right_and_kept = sum(routed.is_right and not routed.is_rejected for routed in in_scope)
    wrong = [routed for routed in in_scope if not routed.is_right]
    wrong.sort(key=lambda routed: (routed.threshold - routed.score, routed.row.number))
    return RoutingFigures(
        rows=len(in_scope),
        accuracy=metrics.accuracy(truth, best),
        accuracy_interval=metrics.wilson_interval(right, len(in_scope)),
        accuracy_with_rejection=metrics.share(right_and_kept, len(in_scope)),
        accuracy_with_rejection_interval=metrics.wilson_interval(right_and_kept, len(in_scope)),
        macro_accuracy=metrics.macro_accuracy(per_task),
        macro_accuracy_interval=metrics.macro_interval(per_task),
        per_task=dict(zip(tasks, per_task, strict=True)),
        confused_pairs=tuple(
            ConfusedPair(tasks[i], tasks[j], rows)
            for i, j, rows in metrics.confused_pairs(matrix, _LISTED_PAIRS)
        ),
        outcomes=_outcomes(in_scope),
        truncated=sum(routed.truncated for routed in decisions),
        worst_errors=tuple(_error(routed) for routed in wrong[:_LISTED_ERRORS]),
        calibration=_calibration(in_scope),
    )


def reject_figures(decisions: Sequence[RoutedText]) -> RejectFigures | None:
    """Compare in-scope with out-of-scope decisions; None where there are none of the latter."""
    known = [routed for routed in decisions if routed.row.task is not None]
    unknown = [routed for routed in decisions if routed.row.task is None]
    if not unknown:
        return None
    by_score = metrics.separation([r.score for r in known], [r.score for r in unknown])
    return RejectFigures(
        rows=len(unknown),
        auroc=by_score.auroc,
        fpr_at_95_tpr=by_score.fpr_at_95_tpr,
        over_threshold=metrics.separation(
            [r.score - r.threshold for r in known], [r.score - r.threshold for r in unknown]
        ),
        in_scope_rejected=metrics.share(sum(r.is_rejected for r in known), len(known)),
        out_of_scope_rejected=metrics.share(sum(r.is_rejected for r in unknown), len(unknown)),
        outcomes=_outcomes(unknown),
        accepted_calibration=_calibration([r for r in decisions if not r.is_rejected]),
    )


def coverage_risk(decisions: Sequence[RoutedText]) -> CoverageRisk:
    """What answering only those decisions costs that are highest over their threshold."""
    return metrics.coverage_risk(
        [routed.score - routed.threshold for routed in decisions],
        np.array([routed.is_right for routed in decisions], np.bool_),
    )


def time_decisions(
    snapshot: Snapshot, encoder: Encoder, rows: Sequence[LabelledText], progress: Progress
) -> Percentiles:
    """How long a decision on one text takes in this process, from text to outcome.

    Measured on the first rows, one at a time, after a warm-up. A server adds the network, and
    shares batches between calls.
    """
    texts = [row.text for row in rows]
    return _timed(lambda text: snapshot.decide(encoder.encode([text])), texts, progress)


def _timed(
    decide_one: Callable[[str], object], texts: Sequence[str], progress: Progress
) -> Percentiles:
    timed = texts[:_TIMED_ROWS]
    decide_one(timed[0])
    seconds = []
    for done, text in enumerate(timed, start=1):
        began = time.perf_counter()
        decide_one(text)
        seconds.append(time.perf_counter() - began)
        progress("one at a time", "decide", done, len(timed))
    return metrics.percentiles(seconds)


def _outcomes(decisions: Sequence[RoutedText]) -> dict[str, int]:
    counts = Counter(routed.outcome for routed in decisions)
    return {outcome.value: counts[outcome] for outcome in Outcome}


def _calibration(decisions: Sequence[RoutedText]) -> Reliability | None:
    known = [r for r in decisions if r.probability is not None]
    if not known:
        return None
    right = np.array([routed.is_right for routed in known])
    return metrics.reliability([r.probability or 0.0 for r in known], right)


def _error(routed: RoutedText) -> RoutingError:
    return RoutingError(
        routed.row.number,
        shorten(routed.row.text),
        str(routed.row.task),
        routed.best,
        routed.outcome.value,
        routed.score,
        routed.margin,
        routed.threshold,
        routed.probability,
    )
