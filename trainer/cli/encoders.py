"""Commands about encoders: encoders, encoders use."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router.errors import PromptyardError
from router.settings import DEFAULT_ENCODER, FAST_ENCODER
from trainer.cli.console import (
    AsJson,
    Home,
    err,
    error_fields,
    errors_for_people,
    home_folder,
    out,
    print_error,
    print_json,
    print_table,
    progress_bars,
)

if TYPE_CHECKING:
    from trainer.encoder_figures import EncoderFigures

app = typer.Typer()


@app.callback(invoke_without_command=True)
def encoders(
    context: typer.Context,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            envvar="PROMPTYARD_ENCODER",
            help="Measure this one, too: a sentence-transformers model by hub name or folder. May "
            "be repeated.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled rows: say also how well they are routed when they are held out "
            "(cross-fitted)."
        ),
    ] = None,
    input_field: Annotated[str, typer.Option(help="Name of the column with inputs.")] = "input",
    task_field: Annotated[str, typer.Option(help="Name of the column with the rows' tasks.")] = (
        "task"
    ),
    oos_label: Annotated[
        str, typer.Option(help="The label of rows that belong to no task: left out.")
    ] = "oos",
    head: Annotated[str, typer.Option(help="The head to route with.")] = "auto",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """List the encoders, measure them here, and say which one the home's catalog was made with.

    \b
    promptyard encoders
    promptyard encoders --data rows.jsonl --encoder sentence-transformers/all-mpnet-base-v2

    Texts a second are embedded in batches; ms is the time of one short text. Both are of this
    machine, now. With --data, rows whose split is `test` are left out: once an encoder is chosen by
    them, nothing is left to judge the choice by.
    """  # noqa: D301 - \b keeps click from joining the lines
    if context.invoked_subcommand is not None:
        return
    with errors_for_people(as_json):
        from router.bootstrap import load_encoder
        from router.compiling import HEAD_KINDS
        from router.errors import InvalidInputError
        from router.threads import one_blas_thread
        from trainer.encoder_figures import measure_encoder, routing_rows
        from trainer.evaluation_rows import TEST_SPLIT, EvaluationFields, read_texts

        if head not in HEAD_KINDS:
            raise InvalidInputError("--head", head, f"choose one of {', '.join(HEAD_KINDS)}")
        rows = []
        if data is not None:
            read = read_texts(data, EvaluationFields(input_field, task_field), oos_label)
            rows = routing_rows(data, [row for row in read if row.split != TEST_SPLIT])
        own = _fingerprint_of_home(home)
        measured: list[EncoderFigures] = []
        failures: dict[str, PromptyardError] = {}
        for name in dict.fromkeys([DEFAULT_ENCODER, FAST_ENCODER, *(encoder or ())]):
            try:
                with one_blas_thread(), progress_bars() as progress:
                    measured.append(measure_encoder(load_encoder(name), rows, head, progress))
            except PromptyardError as error:
                failures[name] = error
        if as_json:
            print_json(
                {
                    "home_encoder": own,
                    "encoders": [
                        {**asdict(each), "of_home": each.fingerprint == own} for each in measured
                    ],
                    "failures": {name: error_fields(each) for name, each in failures.items()},
                }
            )
        else:
            _print(measured, own)
            for name, failure in failures.items():
                print_error(f"encoder {name}", failure)
    if failures:
        raise typer.Exit(1)


@app.command()
def use(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="all-MiniLM-L6-v2, fast, a hub name or a folder.")
    ],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Embed the catalog's tasks again with another encoder, and publish that.

    promptyard encoders use fast

    Every live task gets a next revision with the same prompt. Needs the texts of all of them
    (register --keep-text), and refuses where those of any were not kept. From then on name the
    encoder with --encoder or PROMPTYARD_ENCODER; a server that runs the other one goes on with the
    revision that it has.
    """
    with errors_for_people(as_json):
        from router.bootstrap import load_encoder
        from router.catalog import CatalogReader
        from router.threads import one_blas_thread
        from trainer.cli.published import print_published
        from trainer.switching import switch_encoder
        from trainer.workshop import Workshop

        folder = home_folder(home)
        CatalogReader(folder).close()
        with (
            Workshop(folder, load_encoder(name)) as workshop,
            one_blas_thread(),
            progress_bars() as progress,
        ):
            print_published(switch_encoder(workshop, progress), as_json)


def _fingerprint_of_home(home: Path | None) -> str | None:
    """What the newest revision of the home's catalog was made with; None where there is none."""
    from router.catalog import CatalogReader, has_catalog

    folder = home_folder(home)
    if not has_catalog(folder):
        return None
    with CatalogReader(folder) as catalog:
        newest = catalog.newest_revision()
        return catalog.revision(newest).encoder if newest else None


def _print(measured: list[EncoderFigures], own: str | None) -> None:
    columns = ["encoder", "dimensions", "window", "texts/s", "ms a short text", "home"]
    routed = any(each.routing for each in measured)
    print_table(
        [*columns, *(["routed rightly"] if routed else [])],
        [
            [
                each.name,
                each.dimension,
                each.window,
                round(each.texts_per_second),
                round(each.short_text_ms, 3),
                "yes" if each.fingerprint == own else "",
                *([f"{each.routing.accuracy:.1%}"] if each.routing else []),
            ]
            for each in measured
        ],
    )
    for each in measured:
        out.print(f"{each.name}: {each.fingerprint}", markup=False, highlight=False, soft_wrap=True)
    first = next((each.routing for each in measured if each.routing), None)
    if first is not None:
        out.print(f"{first.rows} rows of {first.tasks} tasks, held out in turn", highlight=False)
    if own is not None and own not in {each.fingerprint for each in measured}:
        err.print(
            f"the home's catalog was made with {own}: name it with --encoder to measure it",
            markup=False,
            highlight=False,
        )
