"""The command that gives a task's soft prompt to other software: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from router.settings import DEFAULT_BASE_MODEL
from trainer.cli.console import (
    AsJson,
    BaseModel,
    Home,
    errors_for_people,
    home_folder,
    out,
    print_json,
)


def add_to(app: typer.Typer) -> None:
    """Mount the command."""
    app.command("export")(export)


def export(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The task's name.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    form: Annotated[
        Literal["peft"], typer.Option("--format", help="What to write it as: a PEFT adapter.")
    ] = "peft",
    revision: Annotated[
        int | None, typer.Option(help="A revision of the task. Default: the live one.")
    ] = None,
    home: Home = None,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    as_json: AsJson = False,
) -> None:
    """Write a task's soft prompt as a folder that PEFT loads.

    promptyard export refunds --format peft refunds-peft

    Prompts become prompt tuning, prefixes of causal models prefix tuning; a prefix of an
    encoder-decoder has no counterpart in PEFT. PEFT answers the same where it is given the same
    token ids: for a causal model, Promptyard ends an input with a line break. `register
    --prompt-from DIR` reads such folders, and those that PEFT wrote.
    """
    with errors_for_people(as_json):
        from router.artifacts import ArtifactReader
        from router.bootstrap import load_base_model
        from router.catalog import ARTIFACTS_FOLDER
        from router.errors import InvalidInputError
        from router.loading import read_prompt
        from trainer.cli.chosen_task import prompted_record
        from trainer.peft_exchange import write_peft

        record, _ = prompted_record(home_folder(home), name, revision)
        values = read_prompt(ArtifactReader(home_folder(home) / ARTIFACTS_FOLDER), record)
        model = load_base_model(base_model, device="cpu")
        if model is None or base_model is None:
            raise InvalidInputError("base model", "none", "give it with --base-model")
        # Where a folder is says nothing elsewhere.
        base_name = model.name if Path(base_model).is_dir() else base_model
        write_peft(folder, record, values, model, base_name)
        document = {
            "task": record.name,
            "task_revision": record.revision,
            "format": form,
            "folder": str(folder),
            "base_model": base_name,
        }
        if as_json:
            print_json(document)
        else:
            out.print(
                f"{record.key} is in {folder}, for {base_name}", highlight=False, markup=False
            )
