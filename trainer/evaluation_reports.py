"""Turns evaluations into reports: which figures, tables and pictures, in which words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from trainer import metrics, plots
from trainer.evaluate_answers import AnswerEvaluation, AnswerFigures
from trainer.evaluate_routing import RejectFigures, RoutedText, RoutingEvaluation, RoutingFigures
from trainer.evaluate_stream import Registration, StreamEvaluation
from trainer.metrics import Interval, Reliability
from trainer.report import Picture, Report, Table

REPORT_FORMAT = 1


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
        "timing": {"milliseconds_per_decision": latency},
    }
    speed = f"p90 {latency.p90:.1f}, p99 {latency.p99:.1f}; one text at a time, in process"
    summary = [
        *_routing_summary(figures, reject),
        ["milliseconds a decision, median", f"{latency.p50:.1f}", speed],
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
        tables=(_summary(summary), *_routing_tables(figures)),
        pictures=_routing_pictures(evaluation.decisions, evaluation.tasks, figures),
        decisions=evaluation.decisions,
    )


def answers_report(
    evaluation: AnswerEvaluation, decisions: Sequence[RoutedText], source: str
) -> Report:
    """The report of `evaluate answers`."""
    return Report(
        title=f"Answers to {source}",
        facts=(
            f"{evaluation.over_rows.rows} rows of {len(evaluation.per_task)} tasks, "
            f"base model {evaluation.base_model}.",
        ),
        document={
            "format": REPORT_FORMAT,
            "kind": "answers",
            "source": source,
            "answers": evaluation,
        },
        tables=(_summary(_answers_summary(evaluation)), _answers_table(evaluation)),
        pictures=(),
        decisions=decisions,
    )


def stream_report(evaluation: StreamEvaluation, source: str) -> Report:
    """The report of `evaluate stream`."""
    stream, figures, continual = evaluation.stream, evaluation.routing, evaluation.continual
    registrations, answers = evaluation.registrations, evaluation.answers
    registering = sum(registration.seconds for registration in registrations)
    train_rows = sum(registration.rows for registration in registrations)
    size = sum(registration.bytes for registration in registrations)
    document: dict[str, object] = {
        "format": REPORT_FORMAT,
        "kind": "stream",
        "source": source,
        "encoder": evaluation.encoder,
        "head": evaluation.head,
        "order": stream.order,
        "labels": stream.labels,
        "rows": {
            "train": train_rows,
            "train_out_of_scope_dropped": stream.out_of_scope_dropped,
            "train_duplicates_dropped": sum(r.duplicates_dropped for r in registrations),
            "test_in_scope": figures.rows,
            "test_out_of_scope": evaluation.reject.rows if evaluation.reject else 0,
            "test_texts_in_train": stream.test_texts_in_train,
        },
        "routing": {
            **asdict(figures),
            "average_accuracy": continual.accuracy,
            "forgetting": continual.forgetting,
            "backward_transfer": continual.backward_transfer,
            "accuracy_after_each": evaluation.accuracy_after_each,
            "matrix": evaluation.matrix,
        },
        **({"reject": evaluation.reject} if evaluation.reject else {}),
        **({"answers": answers} if answers else {}),
        "registrations": registrations,
        "timing": {"seconds": evaluation.seconds, "seconds_registering": registering},
    }
    summary = [
        *_routing_summary(figures, evaluation.reject),
        ["forgetting", _points(continual.forgetting), "mean loss from a task's best, in points"],
        ["backward transfer", _points(continual.backward_transfer), "mean change since arrival"],
        *(_answers_summary(answers) if answers else []),
        ["seconds", f"{evaluation.seconds:.0f}", f"of them registering: {registering:.0f}"],
    ]
    overlap = stream.test_texts_in_train
    return Report(
        title=f"Stream of {len(stream.order)} tasks from {source}",
        facts=(
            f"{train_rows} training rows; {figures.rows} in-scope and "
            f"{evaluation.reject.rows if evaluation.reject else 0} out-of-scope test rows; "
            f"head {evaluation.head}. Tasks arrived one after the other, and all that had arrived "
            "were scored after each.",
            f"Left out of the training rows: {stream.out_of_scope_dropped} out of scope, "
            f"{sum(r.duplicates_dropped for r in registrations)} repeated in their task. "
            f"Test texts that are also training texts: {overlap}.",
            f"Encoder {evaluation.encoder}. The tasks added {size / 1e6:.1f} MB.",
        ),
        document=document,
        tables=(
            _summary(summary),
            *_routing_tables(figures),
            *((_answers_table(answers),) if answers else ()),
            _registrations_table(registrations, evaluation.accuracy_after_each),
        ),
        pictures=(
            *_stream_pictures(evaluation),
            *_routing_pictures(evaluation.decisions, sorted(stream.order), figures),
        ),
        decisions=evaluation.decisions,
    )


def _summary(rows: Sequence[Sequence[str]]) -> Table:
    return Table("Summary", ("figure", "value", ""), rows)


def _routing_summary(figures: RoutingFigures, reject: RejectFigures | None) -> list[list[str]]:
    kept = figures.accuracy_with_rejection_interval
    outcomes = ", ".join(f"{rows} {name}" for name, rows in figures.outcomes.items())
    rows = [
        ["routing accuracy", _percent(figures.accuracy), _interval(figures.accuracy_interval)],
        ["with rejection", _percent(figures.accuracy_with_rejection), _interval(kept)],
        ["mean of tasks (macro)", _percent(figures.macro_accuracy), "before rejection"],
        ["in-scope rows", str(figures.rows), outcomes],
        ["cut to the encoder's window", str(figures.truncated), "rows"],
    ]
    if (calibration := figures.calibration) is not None:
        error = _percent(calibration.expected_calibration_error)
        brier = f"of the probability of being right; Brier score {calibration.brier_score:.4f}"
        rows.insert(3, ["expected calibration error", error, brier])
    if reject is not None:
        by_threshold = reject.over_threshold
        outcomes = ", ".join(f"{rows} {name}" for name, rows in reject.outcomes.items())
        rows += [
            ["out-of-scope rows", str(reject.rows), outcomes],
            [
                "reject AUROC",
                _percent(reject.auroc),
                f"over threshold: {_percent(by_threshold.auroc)}",
            ],
            [
                "reject FPR at 95 % TPR",
                _percent(reject.fpr_at_95_tpr),
                f"over threshold: {_percent(by_threshold.fpr_at_95_tpr)}",
            ],
            ["out-of-scope rows rejected", _percent(reject.out_of_scope_rejected), ""],
            ["in-scope rows rejected", _percent(reject.in_scope_rejected), ""],
        ]
    return rows


def _routing_tables(figures: RoutingFigures) -> tuple[Table, ...]:
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
                [name, _percent(t.accuracy), _percent(t.precision), str(t.rows), str(t.routed)]
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
                    _number(error.score),
                    _number(error.margin),
                    _number(error.threshold),
                ]
                for error in figures.worst_errors
            ],
            "Wrong rows of the highest score over the threshold: the router was surest of them.",
        ),
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


def _routing_pictures(
    decisions: Sequence[RoutedText], tasks: Sequence[str], figures: RoutingFigures
) -> tuple[Picture, ...]:
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
            + _numbering(tasks, "in the order of their names"),
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


def _stream_pictures(evaluation: StreamEvaluation) -> tuple[Picture, ...]:
    order = evaluation.stream.order
    macro = [metrics.mean(row) for row in evaluation.matrix]
    return (
        Picture(
            "Accuracy over arrivals",
            "Routing accuracy on the test rows of all tasks that had arrived, before rejection.",
            plots.arrivals_picture(evaluation.accuracy_after_each, macro),
        ),
        Picture(
            "R matrix",
            "Routing accuracy on the test rows of each task (column) after each arrival (row). "
            + _numbering(order, "in the order of their arrival"),
            plots.matrix_picture(evaluation.matrix, order),
        ),
    )


def _numbering(tasks: Sequence[str], how: str) -> str:
    return "" if len(tasks) <= plots.NAMED_TASKS else f"Tasks are numbered {how}."


def _registrations_table(
    registrations: Sequence[Registration], accuracies: Sequence[float]
) -> Table:
    return Table(
        "Arrivals",
        ("", "task", "rows", "seconds", "KB", "KB of head", "changed", "accuracy after"),
        [
            [
                str(number),
                arrival.task,
                str(arrival.rows),
                f"{arrival.seconds:.2f}",
                f"{arrival.bytes / 1e3:.0f}",
                f"{arrival.head_bytes / 1e3:.0f}",
                str(arrival.changed_decisions),
                _percent(accuracy),
            ]
            for number, (arrival, accuracy) in enumerate(
                zip(registrations, accuracies, strict=True), start=1
            )
        ],
        "Changed: held-out training rows of older tasks that are decided differently now.",
        in_files=True,
    )


def _answers_summary(answers: AnswerEvaluation) -> list[list[str]]:
    mean, rows = answers.mean, answers.over_rows
    interval = _interval(answers.over_rows_routed_interval)
    return [
        [
            "answers, routed",
            _percent(mean.routed),
            f"mean of tasks; over rows {_percent(rows.routed)}, {interval}",
        ],
        [
            "answers, with rejection",
            _percent(mean.routed_with_rejection),
            "a rejected row is wrong",
        ],
        ["answers, right task given", _percent(mean.oracle), "the oracle's task"],
        ["answers, no prompt", _percent(mean.no_prompt), ""],
        ["routing loss", _points(answers.routing_loss), "right task given less routed, in points"],
    ]


def _answers_table(answers: AnswerEvaluation) -> Table:
    def cells(name: str, figures: AnswerFigures) -> list[str]:
        return [
            name,
            _percent(figures.routed),
            _percent(figures.routed_with_rejection),
            _percent(figures.oracle),
            _percent(figures.no_prompt),
            str(figures.rows),
        ]

    tasks = sorted(answers.per_task.items(), key=lambda item: (item[1].routed, item[0]))
    return Table(
        "Answers by task, the worst first",
        ("task", "routed", "with rejection", "right task given", "no prompt", "rows"),
        [cells(name, figures) for name, figures in tasks],
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f} %"


def _points(difference: float) -> str:
    return "-" if math.isnan(difference) else f"{100 * difference:+.2f}"


def _interval(interval: Interval) -> str:
    if math.isnan(interval.low):
        return ""
    return f"95 % interval {100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
