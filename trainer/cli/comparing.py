"""The command that compares two catalog revisions: evaluate compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from router.settings import DEFAULT_ENCODER
from trainer.cli.console import (
    AsJson,
    EncoderName,
    Home,
    errors_for_people,
    home_folder,
    out,
    print_table,
    progress_bars,
)
from trainer.cli.evaluation import InputField, OosLabel, make_folder

_SHOWN_ROWS = 10


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compare)


def compare(
    revision_a: Annotated[
        int, typer.Argument(metavar="REV_A", help="A catalog revision, such as the one served.")
    ],
    revision_b: Annotated[
        int, typer.Argument(metavar="REV_B", help="The catalog revision to compare it with.")
    ],
    data: Annotated[Path, typer.Option(help="Rows to route: .jsonl, .jsonl.gz, .csv or .parquet.")],
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="DIR", help="Write report.json and changed.csv to this folder."
        ),
    ] = None,
    input_field: InputField = "input",
    task_field: Annotated[
        str, typer.Option(help="Name of the column with the rows' tasks. Rows may lack it.")
    ] = "task",
    oos_label: OosLabel = "oos",
    with_text: Annotated[
        bool,
        typer.Option(
            "--with-text", help="Show and write the inputs, too. Else rows go by their number."
        ),
    ] = False,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Route the same rows with two catalog revisions, and show whose decision changed.

    promptyard evaluate compare 7 8 --data traffic.jsonl --report out

    Labels are optional. Rows labelled with a task of either revision give the accuracy at both (a
    rejected row is wrong), the difference with its 95 % interval, and McNemar's exact two-sided
    test: a small p-value says that one revision is better by more than chance.
    """
    with errors_for_people(as_json):
        from router.bootstrap import load_encoder, log_to_stderr
        from trainer.compare_revisions import (
            check_revisions,
            compare_decisions,
            load_revisions,
            read_compared_texts,
        )
        from trainer.comparison_report import (
            changed_table,
            comparison_document,
            comparison_facts,
            summary_table,
            write_comparison,
        )
        from trainer.evaluate_routing import embed_texts
        from trainer.report import to_json

        log_to_stderr("warning")
        make_folder(report)
        texts = read_compared_texts(data, input_field, task_field)
        folder = home_folder(home)
        check_revisions(folder, {"REV_A": revision_a, "REV_B": revision_b})
        loaded = load_encoder(encoder)
        a, b = load_revisions(folder, loaded, revision_a, revision_b)
        with progress_bars() as progress:
            embeddings = embed_texts(loaded, [text.text for text in texts], progress)
            comparison = compare_decisions(
                texts,
                a.decide(embeddings),
                b.decide(embeddings),
                revisions=(revision_a, revision_b),
                tasks={*a.tasks, *b.tasks},
                out_of_scope_label=oos_label,
                with_text=with_text,
            )
        written = write_comparison(report, comparison, data.name) if report is not None else []
        if as_json:
            typer.echo(to_json(comparison_document(comparison, data.name)), nl=False)
            return
        title = f"Catalog revisions {revision_a} and {revision_b} on {data.name}"
        out.print(title, style="bold", markup=False, highlight=False)
        for fact in comparison_facts(comparison):
            out.print(fact, markup=False, highlight=False)
        summary, changed = summary_table(comparison), changed_table(comparison)
        if summary.rows:
            print_table(summary.columns, summary.rows)
        if changed.rows:
            more = len(changed.rows) - _SHOWN_ROWS
            shown = f"{changed.title} ({more} more with --report)" if more > 0 else changed.title
            print_table(changed.columns, changed.rows[:_SHOWN_ROWS], title=shown)
        for path in written:
            out.print(f"written: {path}", markup=False, highlight=False)
