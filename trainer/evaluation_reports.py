"""Turns evaluations of answers and of streams into reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from trainer import metrics, plots
from trainer.evaluate_answers import AnswerEvaluation, AnswerFigures
from trainer.evaluate_routing import RoutedText
from trainer.evaluate_stream import Registration, StreamEvaluation
from trainer.report import Picture, Report, Table
from trainer.report_words import interval_in_words, percent, points, summary_table
from trainer.routing_report import (
    REPORT_FORMAT,
    numbering,
    routing_pictures,
    routing_summary,
    routing_tables,
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
        tables=(summary_table(_answers_summary(evaluation)), _answers_table(evaluation)),
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
        *routing_summary(figures, evaluation.reject),
        ["forgetting", points(continual.forgetting), "mean loss from a task's best, in points"],
        ["backward transfer", points(continual.backward_transfer), "mean change since arrival"],
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
            summary_table(summary),
            *routing_tables(figures),
            *((_answers_table(answers),) if answers else ()),
            _registrations_table(registrations, evaluation.accuracy_after_each),
        ),
        pictures=(
            *_stream_pictures(evaluation),
            *routing_pictures(evaluation.decisions, sorted(stream.order), figures),
        ),
        decisions=evaluation.decisions,
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
            + numbering(order, "in the order of their arrival"),
            plots.matrix_picture(evaluation.matrix, order),
        ),
    )


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
                percent(accuracy),
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
    interval = interval_in_words(answers.over_rows_routed_interval)
    return [
        [
            "answers, routed",
            percent(mean.routed),
            f"mean of tasks; over rows {percent(rows.routed)}, {interval}",
        ],
        [
            "answers, with rejection",
            percent(mean.routed_with_rejection),
            "a rejected row is wrong",
        ],
        ["answers, right task given", percent(mean.oracle), "the oracle's task"],
        ["answers, no prompt", percent(mean.no_prompt), ""],
        ["routing loss", points(answers.routing_loss), "right task given less routed, in points"],
    ]


def _answers_table(answers: AnswerEvaluation) -> Table:
    def cells(name: str, figures: AnswerFigures) -> list[str]:
        return [
            name,
            percent(figures.routed),
            percent(figures.routed_with_rejection),
            percent(figures.oracle),
            percent(figures.no_prompt),
            str(figures.rows),
        ]

    tasks = sorted(answers.per_task.items(), key=lambda item: (item[1].routed, item[0]))
    return Table(
        "Answers by task, the worst first",
        ("task", "routed", "with rejection", "right task given", "no prompt", "rows"),
        [cells(name, figures) for name, figures in tasks],
    )
