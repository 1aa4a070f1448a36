"""Turns evaluations of answers and of streams into reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from trainer import metrics, plots
from trainer.evaluate_answers import AnswerEvaluation, AnswerFigures
from trainer.evaluate_orders import OrdersEvaluation
from trainer.evaluate_routing import RoutedText
from trainer.evaluate_stream import AnswersOverTime, StreamEvaluation
from trainer.metrics import Spread
from trainer.report import Picture, Report, Table
from trainer.report_words import interval_in_words, percent, points, summary_table
from trainer.routing_report import (
    REPORT_FORMAT,
    map_pictures,
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


def orders_report(evaluation: OrdersEvaluation, source: str) -> Report:
    """The report of `evaluate stream` in several orders: the first one's, and all beside it."""
    report = stream_report(evaluation.first, source)
    summary, *others = report.tables
    count, alike = len(evaluation.orders), evaluation.ends_alike
    figures = (
        ("average_accuracy", "mean of tasks at the end"),
        ("mean_accuracy", "accuracy, mean over arrivals"),
        ("forgetting", "forgetting"),
        ("backward_transfer", "backward transfer"),
        ("unknown_before_arrival", "unknown before they arrive"),
    )
    spreads = {name: evaluation.spread(name) for name, _ in figures}
    rows = [[f"{label}, {count} orders", *_spread(spreads[name])] for name, label in figures]
    ending = "the same head, bit for bit" if alike else "heads that differ"
    picture = Picture(
        "Accuracy over arrivals, all orders",
        f"Routing accuracy on the test rows of all tasks that had arrived, in {count} random "
        "orders; the first one, which the rest of this report is about, is dark.",
        plots.orders_picture([each.accuracy_after_each for each in evaluation.orders]),
    )
    return replace(
        report,
        facts=(
            *report.facts,
            f"{count} random orders, of which the first is reported in full. All of them end with "
            f"{ending}.",
        ),
        document={
            **report.document,
            "orders": evaluation.orders,
            "over_orders": {**spreads, "ends_alike": alike},
        },
        tables=(summary_table([*summary.rows, *rows]), *others, _orders_table(evaluation)),
        pictures=(picture, *report.pictures),
    )


def _spread(spread: Spread) -> list[str]:
    between = f"{percent(spread.least)} to {percent(spread.greatest)}"
    return [percent(spread.mean), f"deviation {points(spread.deviation)[1:]} points; {between}"]


def _orders_table(evaluation: OrdersEvaluation) -> Table:
    return Table(
        "Orders",
        (
            *("", "at the end", "mean of tasks", "mean over arrivals", "forgetting"),
            *("backward transfer", "unknown before", "seconds"),
        ),
        [
            [
                *(str(number), percent(each.accuracy), percent(each.average_accuracy)),
                *(percent(each.mean_accuracy), points(each.forgetting)),
                *(points(each.backward_transfer), percent(each.unknown_before_arrival)),
                f"{each.seconds_registering:.1f}",
            ]
            for number, each in enumerate(evaluation.orders, start=1)
        ],
        "Unknown before: of a task's test rows just before it arrives. Seconds: of registering; "
        "texts are embedded once.",
    )


def stream_report(evaluation: StreamEvaluation, source: str) -> Report:
    """The report of `evaluate stream`."""
    stream, figures, continual = evaluation.stream, evaluation.routing, evaluation.continual
    registrations, answers = evaluation.registrations, evaluation.answers
    over_time = evaluation.answers_over_time
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
            "forward_transfer": continual.forward_transfer,
            "accuracy_after_each": evaluation.accuracy_after_each,
            "unknown_before_arrival": evaluation.unknown_before_arrival,
            "matrix": evaluation.matrix,
        },
        **({"reject": evaluation.reject} if evaluation.reject else {}),
        **({"answers": answers} if answers else {}),
        **({"answers_over_time": over_time} if over_time else {}),
        "registrations": registrations,
        "task_map": evaluation.places,
        "timing": {"seconds": evaluation.seconds, "seconds_registering": registering},
    }
    summary = [
        *routing_summary(figures, evaluation.reject),
        ["forgetting", points(continual.forgetting), "mean loss from a task's best, in points"],
        ["backward transfer", points(continual.backward_transfer), "mean change since arrival"],
        [
            "forward transfer",
            points(continual.forward_transfer),
            "0 by construction: nothing is routed to a task that is not there",
        ],
        [
            "unknown before they arrive",
            percent(metrics.mean(evaluation.unknown_before_arrival)),
            "of a task's test rows, just before it arrives; mean of tasks",
        ],
        *(_answers_summary(answers) if answers else []),
        *(_over_time_summary(over_time) if over_time else []),
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
            _registrations_table(evaluation),
        ),
        pictures=(
            *_stream_pictures(evaluation),
            *routing_pictures(evaluation.decisions, sorted(stream.order), figures),
            *map_pictures(evaluation.places, figures),
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


def _registrations_table(evaluation: StreamEvaluation) -> Table:
    arrivals = zip(
        evaluation.registrations,
        evaluation.unknown_before_arrival,
        evaluation.accuracy_after_each,
        strict=True,
    )
    return Table(
        "Arrivals",
        (
            *("", "task", "rows", "seconds", "KB", "KB of head", "changed"),
            *("unknown before", "accuracy after"),
        ),
        [
            [
                str(number),
                arrival.task,
                str(arrival.rows),
                f"{arrival.seconds:.2f}",
                f"{arrival.bytes / 1e3:.0f}",
                f"{arrival.head_bytes / 1e3:.0f}",
                str(arrival.changed_decisions),
                percent(unknown),
                percent(accuracy),
            ]
            for number, (arrival, unknown, accuracy) in enumerate(arrivals, start=1)
        ],
        "Changed: held-out training rows of older tasks that are decided differently now. "
        "Unknown before: test rows of the task that were called unknown just before it arrived.",
        in_files=True,
    )


def _answers_summary(answers: AnswerEvaluation) -> list[list[str]]:
    mean, rows = answers.mean, answers.over_rows
    interval = interval_in_words(answers.over_rows_routed_interval)
    return [
        [
            "answers, routed",
            percent(mean.routed),
            f"mean of tasks; right over rows {percent(rows.routed)}, {interval}",
        ],
        [
            "answers, with rejection",
            percent(mean.routed_with_rejection),
            "a rejected row is wrong",
        ],
        ["answers, right task given", percent(mean.oracle), "the oracle's task"],
        ["answers, prompt alone", percent(mean.prompt_alone), "right task, no label classifier"],
        ["answers, no prompt", percent(mean.no_prompt), ""],
        ["routing loss", points(answers.routing_loss), "right task given less routed, in points"],
    ]


def _over_time_summary(over_time: AnswersOverTime) -> list[list[str]]:
    words = "mean change of a task's score since its arrival"
    return [
        ["answers, backward transfer", points(over_time.routed_transfer), f"{words}, routed"],
        [
            "answers, backward transfer, right task given",
            points(over_time.oracle_transfer),
            f"{words}, with the oracle's task",
        ],
    ]


def _answers_table(answers: AnswerEvaluation) -> Table:
    def cells(name: str, figures: AnswerFigures) -> list[str]:
        return [
            name,
            figures.metric,
            percent(figures.routed),
            percent(figures.routed_with_rejection),
            percent(figures.oracle),
            percent(figures.prompt_alone),
            percent(figures.no_prompt),
            str(figures.rows),
        ]

    tasks = sorted(answers.per_task.items(), key=lambda item: (item[1].routed, item[0]))
    return Table(
        "Answers by task, the worst first",
        (
            "task",
            "metric",
            "routed",
            "with rejection",
            "right task given",
            "prompt alone",
            "no prompt",
            "rows",
        ),
        [cells(name, figures) for name, figures in tasks],
    )
