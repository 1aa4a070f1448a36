"""The report of how rows were routed: which figures, tables and pictures, in which words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from trainer import metrics, plots
from trainer.evaluate_routing import (
    CascadeFigures,
    RejectFigures,
    RoutedText,
    RoutingEvaluation,
    RoutingFigures,
)
from trainer.metrics import CoverageRisk, Reliability
from trainer.report import Picture, Report, Table
from trainer.report_words import interval_in_words, number, percent, summary_table
from trainer.task_map import TaskMap

REPORT_FORMAT = 1

_SHOWN_COVERAGES = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


def routing_report(evaluation: RoutingEvaluation, source: str) -> Report:
    """The report of `evaluate routing`; `source` says what was evaluated."""
    figures, reject, latency = (
        evaluation.routing,
        evaluation.reject,
        evaluation.milliseconds_per_decision,
    )
    document: dict[str, object] = {
        "format": REPORT_FORMAT,
        "kind": "routing",
        "source": source,
        "catalog_revision": evaluation.catalog_revision,
        "encoder": evaluation.encoder,
        "head": evaluation.head,
        "tasks": evaluation.tasks,
        "routing": asdict(figures),
        **({"reject": reject} if reject else {}),
        "coverage_risk": evaluation.coverage_risk,
        "task_map": evaluation.places,
        "timing": {"milliseconds_per_decision": latency},
    }
    if evaluation.cascade is not None:
        document["cascade"] = asdict(evaluation.cascade)
    speed = f"p90 {latency.p90:.1f}, p99 {latency.p99:.1f}; one text at a time, in process"
    summary = [
        *routing_summary(figures, reject),
        _area_row(evaluation.coverage_risk),
        ["milliseconds a decision, median", f"{latency.p50:.1f}", speed],
        *([] if evaluation.cascade is None else _cascade_rows(evaluation.cascade)),
    ]
    return Report(
        title=f"Routing of {source}",
        facts=(
            f"{figures.rows} in-scope and {reject.rows if reject else 0} out-of-scope rows against "
            f"{len(evaluation.tasks)} tasks at catalog revision {evaluation.catalog_revision}, "
            f"head {evaluation.head}.",
            f"Encoder {evaluation.encoder}.",
        ),
        document=document,
        tables=(
            summary_table(summary),
            *routing_tables(figures),
            _coverage_table(evaluation.coverage_risk),
        ),
        pictures=(
            *routing_pictures(evaluation.decisions, evaluation.tasks, figures),
            *map_pictures(evaluation.places, figures),
        ),
        decisions=evaluation.decisions,
    )


def _cascade_rows(cascade: CascadeFigures) -> list[list[str]]:
    """What the cascade saves and costs; the rows above are of the full encoder alone."""
    outside = ""
    if cascade.out_of_scope_fast is not None and cascade.out_of_scope_rejected is not None:
        outside = (
            f"; of those out of scope {percent(cascade.out_of_scope_fast)}, and "
            f"{percent(cascade.out_of_scope_rejected)} are rejected"
        )
    return [
        [
            "cascade: decided by the fast encoder",
            percent(cascade.decided_fast),
            f"{percent(cascade.differing)} of all rows are decided otherwise{outside}",
        ],
        [
            "cascade: routing accuracy",
            percent(cascade.accuracy),
            f"with rejection {percent(cascade.accuracy_with_rejection)}",
        ],
        [
            "cascade: milliseconds a decision, median",
            f"{cascade.milliseconds_per_decision.p50:.1f}",
            f"p90 {cascade.milliseconds_per_decision.p90:.1f}",
        ],
    ]


def routing_summary(figures: RoutingFigures, reject: RejectFigures | None) -> list[list[str]]:
    """The rows of a summary that are about routing."""
    kept = figures.accuracy_with_rejection_interval
    outcomes = ", ".join(f"{rows} {name}" for name, rows in figures.outcomes.items())
    rows = [
        [
            *("routing accuracy", percent(figures.accuracy)),
            interval_in_words(figures.accuracy_interval),
        ],
        ["with rejection", percent(figures.accuracy_with_rejection), interval_in_words(kept)],
        [
            "mean of tasks (macro)",
            percent(figures.macro_accuracy),
            interval_in_words(figures.macro_accuracy_interval),
        ],
        ["in-scope rows", str(figures.rows), outcomes],
        ["cut to the encoder's window", str(figures.truncated), "rows"],
    ]
    if (calibration := figures.calibration) is not None:
        error = percent(calibration.expected_calibration_error)
        brier = f"of the probability of being right; Brier score {calibration.brier_score:.4f}"
        rows.insert(3, ["expected calibration error", error, brier])
    if reject is not None:
        by_threshold = reject.over_threshold
        outcomes = ", ".join(f"{rows} {name}" for name, rows in reject.outcomes.items())
        rows += [
            ["out-of-scope rows", str(reject.rows), outcomes],
            [
                "reject AUROC",
                percent(reject.auroc),
                f"over threshold: {percent(by_threshold.auroc)}",
            ],
            [
                "reject FPR at 95 % TPR",
                percent(reject.fpr_at_95_tpr),
                f"over threshold: {percent(by_threshold.fpr_at_95_tpr)}",
            ],
            ["out-of-scope rows rejected", percent(reject.out_of_scope_rejected), ""],
            ["in-scope rows rejected", percent(reject.in_scope_rejected), ""],
        ]
        if (accepted := reject.accepted_calibration) is not None:
            error = percent(accepted.expected_calibration_error)
            note = "of all accepted rows; one that is out of scope is wrong"
            rows.append(["calibration error, accepted", error, note])
    return rows


def routing_tables(figures: RoutingFigures) -> tuple[Table, ...]:
    """The tasks (worst first), the pairs that are confused, and the worst errors."""
    tasks = sorted(
        figures.per_task.items(),
        key=lambda item: (math.isnan(item[1].accuracy), item[1].accuracy, item[0]),
    )
    return (
        Table(
            "Tasks, the worst first",
            ("task", "accuracy", "precision", "rows", "routed here"),
            [
                [name, percent(t.accuracy), percent(t.precision), str(t.rows), str(t.routed)]
                for name, t in tasks
            ],
            "Accuracy: the share of the task's rows that were routed to it (recall). "
            "Precision: the share of the rows routed to it that are its own. Before rejection.",
        ),
        Table(
            "Tasks that are confused",
            ("true task", "best-scoring task", "rows"),
            [[pair.task, pair.taken_for, str(pair.rows)] for pair in figures.confused_pairs],
        ),
        Table(
            "Worst errors",
            (
                *("row", "input", "true task", "best task", "outcome"),
                *("probability", "score", "margin", "threshold"),
            ),
            [
                [
                    str(error.number),
                    error.text,
                    error.task,
                    error.best,
                    error.outcome,
                    "-" if error.probability is None else f"{error.probability:.3f}",
                    number(error.score),
                    number(error.margin),
                    number(error.threshold),
                ]
                for error in figures.worst_errors
            ],
            "Wrong rows of the highest score over the threshold: the router was surest of them.",
        ),
        *_reliability_tables(figures.calibration),
    )


def _reliability_tables(calibration: Reliability | None) -> tuple[Table, ...]:
    if calibration is None:
        return ()
    return (
        Table(
            "Reliability",
            ("probability", "mean", "right", "rows"),
            [
                [
                    f"{100 * each.low:.0f} to {100 * each.high:.0f} %",
                    *(percent(each.mean_probability), percent(each.right), str(each.rows)),
                ]
                for each in calibration.bins
            ],
            "In-scope rows by the probability that was given for their best-scoring task.",
            in_files=True,
        ),
    )


def _area_row(curve: CoverageRisk) -> list[str]:
    return ["area under coverage-risk", percent(curve.area), "mean risk over all coverages"]


def _coverage_table(curve: CoverageRisk) -> Table:
    shown = [
        min(range(len(curve.coverage)), key=lambda k: abs(curve.coverage[k] - wanted))
        for wanted in (_SHOWN_COVERAGES if curve.coverage else ())
    ]
    return Table(
        "Coverage and risk",
        ("answered", "wrong among them"),
        [[percent(curve.coverage[k]), percent(curve.risk[k])] for k in dict.fromkeys(shown)],
        "If only the rows of the highest scores over the threshold are answered. An out-of-scope "
        "row that is answered is wrong.",
        in_files=True,
    )


def _reliability_pictures(calibration: Reliability | None) -> tuple[Picture, ...]:
    if calibration is None or not calibration.bins:
        return ()
    return (
        Picture(
            "Reliability",
            "Share of in-scope rows whose best-scoring task is right, by the probability that was "
            "given for it, in 15 bins, with 95 % intervals; below: how many rows each bin has. "
            "On the line it is as good as its word; above it, better.",
            plots.reliability_picture(calibration.bins),
        ),
    )


def routing_pictures(
    decisions: Sequence[RoutedText], tasks: Sequence[str], figures: RoutingFigures
) -> tuple[Picture, ...]:
    """The pictures of how rows were routed."""
    known = [routed for routed in decisions if routed.row.task is not None]
    number = {name: n for n, name in enumerate(tasks)}
    matrix = metrics.confusion(
        np.array([number[str(routed.row.task)] for routed in known], np.int64),
        np.array([number[routed.best] for routed in known], np.int64),
        len(tasks),
    )
    over = np.array([routed.score - routed.threshold for routed in decisions])
    in_scope = np.array([routed.row.task is not None for routed in decisions])
    curve = metrics.coverage_and_risk(over, np.array([routed.is_right for routed in decisions]))
    return (
        Picture(
            "Confusion",
            "Errors as a share of the true task's rows, before rejection. "
            + numbering(tasks, "in the order of their names"),
            plots.confusion_picture(matrix, tasks),
        ),
        *_reliability_pictures(figures.calibration),
        Picture(
            "Scores",
            "How far the best task's score is over that task's threshold.",
            plots.score_picture(over[in_scope], over[~in_scope]),
        ),
        Picture(
            "Coverage and risk",
            "What is wrong among the rows that are answered, if only those of the highest scores "
            "over the threshold are. An out-of-scope row that is answered is wrong.",
            plots.risk_picture(*curve),
        ),
    )


def map_pictures(places: TaskMap, figures: RoutingFigures) -> tuple[Picture, ...]:
    """The map of the tasks, where there are any."""
    if not places.places:
        return ()
    pairs = [(pair.task, pair.taken_for, pair.rows) for pair in figures.confused_pairs]
    picture = Picture(
        "Map of the tasks",
        "The mean embedding of each task's rows, in the plane in which these differ most: it shows "
        f"{100 * places.shown_variance:.0f} % of the variance between tasks. Lines join tasks that "
        "are confused.",
        plots.map_picture(
            places.places, {name: t.accuracy for name, t in figures.per_task.items()}, pairs
        ),
    )
    return (picture,)


def numbering(tasks: Sequence[str], how: str) -> str:
    """How tasks are numbered in pictures that have no room for their names."""
    return "" if len(tasks) <= plots.NAMED_TASKS else f"Tasks are numbered {how}."
