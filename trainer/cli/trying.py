"""The command that compares variants of a task: try."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from router.errors import InvalidInputError
from router.settings import DEFAULT_BASE_MODEL, DEFAULT_ENCODER
from trainer.cli.console import (
    AsJson,
    BaseModel,
    EncoderName,
    GateLimit,
    Home,
    errors_for_people,
    home_folder,
    out,
    print_json,
    print_table,
    progress_bars,
)
from trainer.cli.registered import leave_if_failed, print_registered, registered_document

if TYPE_CHECKING:
    from trainer.metrics import Interval
    from trainer.trials import Trials, TriedVariant


def add_to(app: typer.Typer) -> None:
    """Mount the command."""
    app.command("try")(try_)


def try_(
    name: Annotated[str, typer.Argument(help="The task's name, new or not.")],
    data: Annotated[Path, typer.Option(help="Labelled rows, as for register.")],
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,...",
            help="A variant: template, instruction, or any setting of docs/prompts.md. Repeat it.",
        ),
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A YAML file that lists variants under that key."),
    ] = None,
    description: Annotated[str, typer.Option(help="What the task is, for people.")] = "",
    instruction: Annotated[str, typer.Option(help="Of the variants that give none.")] = "",
    template: Annotated[str, typer.Option(help="Of the variants that give none.")] = "",
    metric: Annotated[str, typer.Option(help="What answers are scored by, as for register.")] = "",
    input_field: Annotated[str, typer.Option(help="Name of the column with inputs.")] = "input",
    output_field: Annotated[str, typer.Option(help="Name of the column with outputs.")] = "output",
    context_field: Annotated[
        str, typer.Option(help="Name of the column with passages.")
    ] = "context",
    free_text: Annotated[
        bool, typer.Option("--free-text", help="Outputs are text to generate, not a closed set.")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep the first of repeated inputs.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Tuning steps at most, of all.")] = None,
    publish: Annotated[
        Literal["best"] | None,
        typer.Option(help="Register the best variant as the task's first or next revision."),
    ] = None,
    force: Annotated[
        str, typer.Option(metavar="REASON", help="For --publish, as for register.")
    ] = "",
    gate_limit: GateLimit = None,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    as_json: AsJson = False,
) -> None:
    """Tune variants of a task on the same rows and compare them, without publishing.

    \b
    promptyard try refunds --data refunds.jsonl --variant length=20 --variant length=40
    promptyard try refunds --data refunds.jsonl --variants variants.yaml --publish best

    Scores are on the validation rows, with 95 % intervals; differences are to the first variant.
    What is published is tuned again as register does it, and passes the same gate.
    """  # noqa: D301 - \b keeps click from joining the lines
    with errors_for_people(as_json):
        from trainer.admission import check_writable
        from trainer.commands import RegisterTask
        from trainer.data import Fields
        from trainer.trials import (
            check_variants,
            parse_variant,
            read_variants,
            try_variants,
            with_variant,
        )

        chosen = [parse_variant(text) for text in variant or ()]
        chosen += read_variants(variants) if variants is not None else []
        check_variants(chosen)
        given = {} if steps is None else {"steps": steps}
        request = RegisterTask(
            name=name,
            data=data,
            description=description,
            instruction=instruction,
            fields=Fields(input_field, output_field, context_field),
            free_text=free_text,
            drop_duplicates=drop_duplicates,
            force=force,
            metric=metric,
            template=template,
        )
        for each in chosen:  # before any model is loaded
            with_variant(request, each, given)
        folder = home_folder(home)
        check_writable(folder)

        from router.bootstrap import load_base_model, load_encoder
        from trainer.gate import DEFAULT_GATE_LIMIT
        from trainer.register import register
        from trainer.workshop import Workshop

        with Workshop(folder, load_encoder(encoder)) as workshop, progress_bars() as progress:
            request = replace(request, revise=workshop.catalog.newest_record(name) > 0)
            model = load_base_model(base_model)
            if model is None:
                raise InvalidInputError("--base-model", None, "give a base model to tune")
            trials = try_variants(workshop, request, chosen, model, given, progress)
            registered = None
            if publish is not None and trials.best is not None:
                winner, settings = with_variant(request, chosen[trials.best], given)
                limit = DEFAULT_GATE_LIMIT if gate_limit is None else gate_limit
                registered = register(
                    workshop, [winner], model, settings, progress=progress, gate_limit=limit
                )
        if as_json:
            published = None if registered is None else registered_document(registered)
            print_json({**asdict(trials), "published": published})
        else:
            _print_trials(trials)
            if registered is not None:
                print_registered(registered)
        if registered is not None:
            leave_if_failed(registered)


def _print_trials(trials: Trials) -> None:
    print_table(
        ["", "variant", trials.metric, "95 % interval", "difference to 1", "loss", "seconds"],
        [_cells(number, each) for number, each in enumerate(trials.tried, start=1)],
        title=f"{len(trials.tried)} variants on {trials.rows} validation rows",
    )
    if trials.best is None:
        out.print("no variant could be tuned")
    else:
        out.print(f"the best: variant {trials.best + 1}")


def _cells(number: int, each: TriedVariant) -> list[object]:
    words = ", ".join(f"{key}={value}" for key, value in each.variant.items())
    if each.score is None:
        return [number, f"{words}: {each.problem}", "-", "-", "-", "-", "-"]
    difference = "-"
    if each.difference is not None:
        difference = f"{each.difference * 100:+.1f} points, {_interval(each.difference_interval)}"
    return [
        *(number, words, f"{each.score:.1%}", _interval(each.interval), difference),
        *(f"{each.loss:.3f}", f"{each.seconds:.1f}"),
    ]


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low * 100:.1f} to {interval.high * 100:.1f}"
