"""Commands that measure: evaluate routing, answers and stream."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router.errors import InvalidInputError, StorageError
from router.settings import DEFAULT_BASE_MODEL, DEFAULT_ENCODER, FAST_ENCODER
from trainer.answer_metrics import Metric
from trainer.cli.console import (
    AsJson,
    BaseModel,
    EncoderName,
    Home,
    errors_for_people,
    home_folder,
    out,
    print_table,
    progress_bars,
)

if TYPE_CHECKING:
    from trainer.report import Report

_SHOWN_ROWS = 10

app = typer.Typer(
    help="Measure routing and answers on labelled files. Nothing that is registered is changed.",
    no_args_is_help=True,
)

Data = Annotated[
    Path, typer.Option(help="Labelled rows to score: .jsonl, .jsonl.gz, .csv or .parquet.")
]
ReportFolder = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="DIR",
        help="Write report.json, report.md, report.html and decisions.csv to this folder.",
    ),
]
InputField = Annotated[str, typer.Option(help="Name of the column with inputs.")]
TaskField = Annotated[str, typer.Option(help="Name of the column with the rows' tasks.")]
OutputField = Annotated[str, typer.Option(help="Name of the column with outputs.")]
OosLabel = Annotated[
    str, typer.Option(help="The label of rows that belong to no task: out of scope.")
]
UnknownAsOos = Annotated[
    bool,
    typer.Option(
        "--unknown-as-oos", help="Rows of tasks that are not there count as out of scope."
    ),
]
RowsPerTask = Annotated[
    int | None, typer.Option(min=1, help="Score only the first so many rows of each task.")
]
OutputTokens = Annotated[
    int, typer.Option(min=1, max=512, help="Longest answer of a free-text task, in tokens.")
]
WithText = Annotated[
    bool, typer.Option("--with-text", help="Write the inputs to decisions.csv, too.")
]


@app.command()
def routing(
    data: Data,
    report: ReportFolder = None,
    input_field: InputField = "input",
    task_field: TaskField = "task",
    oos_label: OosLabel = "oos",
    unknown_as_oos: UnknownAsOos = False,
    rows_per_task: RowsPerTask = None,
    with_text: WithText = False,
    revision: Annotated[
        int | None, typer.Option(help="Catalog revision to route with. Default: the newest.")
    ] = None,
    cascade: Annotated[
        bool,
        typer.Option(
            "--cascade",
            help="Measure also what letting the fast encoder decide first saves and costs. Needs "
            "the texts of all tasks (register --keep-text).",
        ),
    ] = False,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Route labelled rows with a catalog revision, and compare with their tasks.

    promptyard evaluate routing --data held-out.jsonl --report out
    """
    with errors_for_people(as_json):
        from router.bootstrap import load_encoder, load_fast_model, log_to_stderr
        from trainer.evaluate_routing import evaluate_routing, load_snapshot
        from trainer.evaluation_rows import (
            EvaluationFields,
            first_of_each_task,
            match_tasks,
            read_texts,
        )
        from trainer.routing_report import routing_report

        log_to_stderr("warning")
        if cascade and encoder == FAST_ENCODER:
            raise InvalidInputError(
                "--cascade", f"with --encoder {encoder}", "name the full encoder"
            )
        make_folder(report)
        rows = read_texts(data, EvaluationFields(input_field, task_field), oos_label)
        loaded = load_encoder(encoder)
        fast = load_fast_model() if cascade else None
        snapshot = load_snapshot(home_folder(home), loaded, revision=revision, fast=fast)
        if cascade and snapshot.cascade is None:
            raise InvalidInputError(
                "--cascade", "not for this catalog", "see the warning on stderr for why"
            )
        rows = match_tasks(data, rows, snapshot.tasks, unknown_as_oos=unknown_as_oos)
        with progress_bars() as progress:
            evaluation = evaluate_routing(
                snapshot, loaded, first_of_each_task(rows, rows_per_task), progress
            )
        _deliver(routing_report(evaluation, data.name), report, as_json, with_text)


@app.command()
def answers(
    data: Data,
    report: ReportFolder = None,
    input_field: InputField = "input",
    output_field: OutputField = "output",
    task_field: TaskField = "task",
    oos_label: OosLabel = "oos",
    unknown_as_oos: UnknownAsOos = False,
    rows_per_task: RowsPerTask = None,
    context_field: Annotated[
        str, typer.Option(help="Name of the column with passages: a text, or a list of them.")
    ] = "context",
    max_output_tokens: OutputTokens = 64,
    metric: Annotated[
        Metric | None,
        typer.Option(help="Score all tasks by this. Default: each by what its record names."),
    ] = None,
    with_text: WithText = False,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    as_json: AsJson = False,
) -> None:
    """Answer labelled rows: as they are routed, under the right task, and without a prompt.

    promptyard evaluate answers --data held-out.jsonl --report out

    A task with a closed set of outputs gets the most probable one; other answers are generated, and
    must match but for case and white space, or are scored by ROUGE-L and the like where the task's
    metric says so. A list of labels is an output like any. Passages
    are placed by the task's template. Out-of-scope rows are not answered.
    """
    with errors_for_people(as_json):
        from router.bootstrap import load_base_model, load_encoder, log_to_stderr
        from router.interfaces import prompted_encoder
        from trainer.evaluate_answers import evaluate_answers
        from trainer.evaluate_routing import decide, embed_texts, load_snapshot
        from trainer.evaluation_reports import answers_report
        from trainer.evaluation_rows import (
            EvaluationFields,
            first_of_each_task,
            match_tasks,
            read_texts,
        )

        log_to_stderr("warning")
        make_folder(report)
        fields = EvaluationFields(input_field, task_field, output_field, context=context_field)
        rows = read_texts(data, fields, oos_label)
        loaded, model = load_encoder(encoder), load_base_model(base_model)
        if model is None:
            raise InvalidInputError("--base-model", None, "give a base model that answers")
        snapshot = load_snapshot(home_folder(home), loaded, model.fingerprint)
        rows = match_tasks(data, rows, snapshot.tasks, unknown_as_oos=unknown_as_oos)
        rows = first_of_each_task(rows, rows_per_task)
        with progress_bars() as progress:
            embeddings = embed_texts(loaded, [row.text for row in rows], progress)
            decisions = decide(snapshot, rows, embeddings)
            evaluation = evaluate_answers(
                snapshot,
                model,
                decisions,
                embeddings.vectors,
                max_output_tokens,
                progress,
                metric,
                prompted_encoder(loaded),
            )
        _deliver(answers_report(evaluation, decisions, data.name), report, as_json, with_text)


@app.command()
def stream(
    train: Annotated[Path, typer.Option(help="Labelled rows that the tasks are made of.")],
    test: Annotated[Path, typer.Option(help="Labelled rows to score. May be the same file.")],
    report: ReportFolder = None,
    text_field: InputField = "text",
    task_field: TaskField = "label",
    output_field: OutputField = "output",
    instruction_field: Annotated[
        str | None,
        typer.Option(help="Name of the column with instructions, which prompts start from."),
    ] = None,
    order: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The order of the tasks: a JSON list, or one a line. Default: by name.",
        ),
    ] = None,
    orders: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100,
            metavar="N",
            help="Evaluate N random orders, the same on every run. Needs --no-prompt: a prompt "
            "does not depend on the order.",
        ),
    ] = None,
    oos_label: OosLabel = "oos",
    unknown_as_oos: UnknownAsOos = False,
    test_rows_per_task: RowsPerTask = None,
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="Register for routing only; outputs are not read.")
    ] = False,
    head: Annotated[str | None, typer.Option(help="The head: lda or nearest-mean.")] = None,
    steps: Annotated[int | None, typer.Option(help="Tuning steps at most.")] = None,
    max_output_tokens: OutputTokens = 64,
    with_text: WithText = False,
    encoder: EncoderName = DEFAULT_ENCODER,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    as_json: AsJson = False,
) -> None:
    """Register the tasks of a labelled file one after the other, and score all after each.

    promptyard evaluate stream --train clinc150.jsonl.gz --test clinc150.jsonl.gz --report out

    Works in a scratch home: no catalog of yours is touched. Test rows are only read for scoring.
    Where rows have a field `split`, rows of the split `test` are the test rows, and all others are
    training rows, so that one file can be given for both. Training rows that are out of scope, and
    inputs that are repeated within a task, are left out.
    """
    with errors_for_people(as_json):
        from router.bootstrap import load_base_model, load_encoder
        from router.memory import keep_freed_memory
        from trainer.commands import PolicyChange
        from trainer.evaluate_orders import evaluate_orders
        from trainer.evaluate_stream import StreamFiles, evaluate_stream, read_stream
        from trainer.evaluation_reports import orders_report, stream_report
        from trainer.evaluation_rows import EvaluationFields
        from trainer.tuning_settings import TuningSettings

        if orders is not None and (order is not None or not no_prompt):
            other = "--order" if order is not None else "prompts"
            remedy = "leave out one of the two" if order is not None else "add --no-prompt"
            raise InvalidInputError("--orders", f"{orders}, and {other}", remedy)
        make_folder(report)
        if no_prompt:
            keep_freed_memory()
        fields = EvaluationFields(
            text_field, task_field, None if no_prompt else output_field, instruction_field
        )
        files = StreamFiles(
            train, test, fields, oos_label, order, unknown_as_oos, test_rows_per_task
        )
        tasks = read_stream(files, with_prompt=not no_prompt)
        with (
            tempfile.TemporaryDirectory(prefix="promptyard-stream-") as scratch,
            progress_bars() as progress,
        ):
            # Texts are embedded beside the registration of others: more threads would only spin.
            loaded, change = load_encoder(encoder, threads=1), PolicyChange(head=head)
            source = train.name if train == test else f"{train.name} and {test.name}"
            if orders is not None:
                found = evaluate_orders(tasks, orders, Path(scratch), loaded, change, progress)
                written = orders_report(found, source)
            else:
                evaluation = evaluate_stream(
                    tasks,
                    Path(scratch),
                    loaded,
                    None if no_prompt else load_base_model(base_model),
                    TuningSettings() if steps is None else TuningSettings(steps=steps),
                    change,
                    max_output_tokens,
                    progress,
                )
                written = stream_report(evaluation, source)
        _deliver(written, report, as_json, with_text)


def make_folder(folder: Path | None) -> None:
    """Make the report's folder before the work, so that the work is not done in vain."""
    if folder is None:
        return
    remedy = "give a writable one with --report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"report folder {folder}", error.strerror or error, remedy) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"report folder {folder}", "may not be written", remedy)


def _deliver(report: Report, folder: Path | None, as_json: bool, with_text: bool) -> None:
    """Write the report where that was asked for, and print it."""
    from trainer.report import to_json, write_report

    written = [] if folder is None else write_report(folder, report, with_text=with_text)
    if as_json:
        typer.echo(to_json(report.document), nl=False)
        return
    out.print(report.title, style="bold", markup=False, highlight=False)
    for fact in report.facts:
        out.print(fact, markup=False, highlight=False)
    summary, *others = report.tables
    print_table(summary.columns, summary.rows)
    for table in others:
        if table.rows and not table.in_files:
            more = len(table.rows) - _SHOWN_ROWS
            title = f"{table.title} ({more} more in the report)" if more > 0 else table.title
            print_table(table.columns, table.rows[:_SHOWN_ROWS], title=title)
    for path in written:
        out.print(f"written: {path}", markup=False, highlight=False)
