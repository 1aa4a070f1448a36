"""Commands about base models: base show, base check."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from router.settings import DEFAULT_BASE_MODEL
from trainer.cli.console import (
    EXIT_FAILED,
    AsJson,
    errors_for_people,
    out,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from router.interfaces import LanguageModel
    from trainer.base_facts import BaseFacts

app = typer.Typer(help="Look at a base model before prompts are tuned on it.", no_args_is_help=True)

Model = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL]",
        envvar="PROMPTYARD_BASE_MODEL",
        show_default=False,
        help="A folder or hub name of any Hugging Face seq2seq or causal model. Default: the one "
        "that comes with the install.",
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, ...")]


@app.command()
def show(
    model: Model = DEFAULT_BASE_MODEL, device: Device = "auto", as_json: AsJson = False
) -> None:
    """Show what a base model is: architecture, size, window, methods that it allows, fingerprint.

    promptyard base show google/flan-t5-small

    A prompt belongs to one base model, by its fingerprint: the digest of configuration, weights and
    tokenizer. It is loaded for this; a hub name is downloaded once.
    """
    with errors_for_people(as_json):
        from trainer.base_facts import describe

        facts = describe(_load(model, device))
        if as_json:
            print_json(asdict(facts))
        else:
            _print_facts(facts)


@app.command()
def check(
    model: Model = DEFAULT_BASE_MODEL, device: Device = "auto", as_json: AsJson = False
) -> None:
    """Load a base model, run soft prompts through it, and say what works. Leaves with 1 if not all.

    promptyard base check google/flan-t5-small

    Tried are scoring, writing, cutting of long inputs, and, for each method that the architecture
    allows, reading, tuning, and mixing in one batch. Nothing is registered.
    """
    with errors_for_people(as_json):
        from trainer.base_facts import check as check_model
        from trainer.base_facts import describe

        loaded = _load(model, device)
        facts, checks = describe(loaded), check_model(loaded)
        if as_json:
            print_json({**asdict(facts), "checks": [asdict(each) for each in checks]})
        else:
            _print_facts(facts)
            print_table(
                ["check", "works", "seen"],
                [[each.what, "yes" if each.works else "NO", each.seen] for each in checks],
            )
    if not all(each.works for each in checks):
        raise typer.Exit(EXIT_FAILED)


def _load(name: str, device: str) -> LanguageModel:
    from router.bootstrap import load_base_model
    from router.errors import InvalidInputError

    model = load_base_model(name, device=device)
    if model is None:
        raise InvalidInputError("MODEL", name, "give a folder or a hub name")
    return model


def _print_facts(facts: BaseFacts) -> None:
    rows = [[key.replace("_", " "), value] for key, value in asdict(facts).items()]
    rows = [row for row in rows if row[0] != "methods"]
    for method, size in facts.methods.items():
        text = f"{size:,} bytes a virtual token" if isinstance(size, int) else f"no: {size}"
        rows.append([f"method {method}", text])
    for row in rows:
        row[1] = f"{row[1]:,}" if isinstance(row[1], int) else row[1]
        out.print(f"{row[0]:<16}{row[1]}", highlight=False, markup=False, soft_wrap=True)
