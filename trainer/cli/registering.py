"""The command that adds tasks: register."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router.errors import InvalidInputError
from router.settings import DEFAULT_BASE_MODEL, DEFAULT_ENCODER
from trainer.cli.console import (
    AsJson,
    BaseModel,
    EncoderName,
    Home,
    error_fields,
    errors_for_people,
    exit_code,
    home_folder,
    out,
    print_error,
    print_json,
    print_table,
    progress_bars,
)
from trainer.cli.published import print_effect, summary
from trainer.commands import Initialisation

if TYPE_CHECKING:
    from router.tasks import TaskRecord
    from trainer.admission import Registered, SuspectInput
    from trainer.commands import PolicyChange, RegisterTask
    from trainer.gate import GateReport

TaskName = Annotated[str, typer.Argument(metavar="NAME", help="The task's name.")]


@dataclass(frozen=True, slots=True)
class _Tuning:
    """What the user said about tuning; None leaves the default."""

    steps: int | None
    length: int | None
    learning_rate: float | None
    initialisation: Initialisation | None
    seed: int | None


def add_to(app: typer.Typer) -> None:
    """Mount the command."""
    app.command("register")(register)


def register(
    name: Annotated[str | None, typer.Argument(help="The new task's name.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled rows: .jsonl, .jsonl.gz, .csv or .parquet.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="A YAML file that lists several tasks, tuned together.")
    ] = None,
    description: Annotated[str, typer.Option(help="What the task is, for people.")] = "",
    instruction: Annotated[
        str, typer.Option(help="What the model should do. The soft prompt starts from it.")
    ] = "",
    input_field: Annotated[str, typer.Option(help="Name of the column with inputs.")] = "input",
    output_field: Annotated[str, typer.Option(help="Name of the column with outputs.")] = "output",
    revise: Annotated[
        bool, typer.Option("--revise", help="Add the next revision of a task that exists.")
    ] = False,
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="Register for routing only; outputs are not read.")
    ] = False,
    free_text: Annotated[
        bool, typer.Option("--free-text", help="Outputs are text to generate, not a closed set.")
    ] = False,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep the first of repeated inputs.")
    ] = False,
    force: Annotated[
        str,
        typer.Option(
            metavar="REASON",
            help="Publish a prompt that beats no baseline, or a task that takes too much of others",
        ),
    ] = "",
    gate_limit: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of an old task's held-out rows that a new one may take. Default: 0.05.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Tuning steps at most.")] = None,
    length: Annotated[int | None, typer.Option(help="Virtual tokens of the prompt.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the tuning.")] = None,
    initialisation: Annotated[
        Initialisation | None, typer.Option(help="What the soft prompt starts from.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the tuning.")] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Set the catalog's head: auto (terms weighed on held-out rows), lda (the same "
            "without stored rows) or nearest-mean."
        ),
    ] = None,
    false_reject_rate: Annotated[
        float | None,
        typer.Option(help="Share of the tasks' own inputs that may be unknown or ambiguous."),
    ] = None,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    as_json: AsJson = False,
) -> None:
    """Add a task (or several) from labelled rows, without touching the old ones.

    \b
    promptyard register refunds --data refunds.jsonl --instruction "Approve or reject?"
    promptyard register --manifest tasks.yaml
    promptyard register refunds --revise --data more.jsonl

    Rows are {"input": ..., "output": ...}. Running servers pick the new task up by themselves.
    """  # noqa: D301 - \b keeps click from joining the lines
    with errors_for_people(as_json):
        from trainer.commands import PolicyChange, RegisterTask
        from trainer.data import Fields
        from trainer.manifest import read_manifest

        if (manifest is None) == (name is None):
            raise InvalidInputError(
                "NAME",
                "missing" if name is None else f"{name}, and --manifest",
                "give either a task's NAME and --data, or --manifest",
            )
        if manifest is not None:
            requests: Sequence[RegisterTask] = read_manifest(manifest)
        else:
            if data is None or name is None:
                raise InvalidInputError("--data", "missing", "give a file of labelled rows")
            requests = [
                RegisterTask(
                    name=name,
                    data=data,
                    description=description,
                    instruction=instruction,
                    fields=Fields(input_field, output_field),
                    with_prompt=not no_prompt,
                    free_text=free_text,
                    drop_duplicates=drop_duplicates,
                    revise=revise,
                    force=force,
                )
            ]
        result = _register(
            home,
            encoder,
            base_model,
            requests,
            PolicyChange(head=head, false_reject_rate=false_reject_rate),
            _Tuning(steps, length, learning_rate, initialisation, seed),
            gate_limit,
        )
        _print_registered(result, as_json)


def _register(
    home: Path | None,
    encoder: str,
    base_model: str | None,
    requests: Sequence[RegisterTask],
    change: PolicyChange,
    tuning: _Tuning,
    gate_limit: float | None,
) -> Registered:
    from trainer.admission import Registered, check_writable, refused_at_once

    folder = home_folder(home)
    refused = refused_at_once(folder, requests)
    if len(refused) == len(requests):
        return Registered((), refused, None)
    check_writable(folder)

    from router.bootstrap import load_base_model, load_encoder
    from trainer.gate import DEFAULT_GATE_LIMIT
    from trainer.register import register as register_tasks
    from trainer.tuning import TuningSettings
    from trainer.workshop import Workshop

    default = TuningSettings()
    settings = TuningSettings(
        steps=default.steps if tuning.steps is None else tuning.steps,
        length=default.length if tuning.length is None else tuning.length,
        learning_rate=(
            default.learning_rate if tuning.learning_rate is None else tuning.learning_rate
        ),
        initialisation=tuning.initialisation or default.initialisation,
        seed=default.seed if tuning.seed is None else tuning.seed,
    )
    wants_prompts = any(request.with_prompt for request in requests)
    with Workshop(folder, load_encoder(encoder)) as workshop:
        model = load_base_model(base_model) if wants_prompts else None
        with progress_bars() as progress:
            return register_tasks(
                workshop,
                requests,
                model,
                settings,
                change,
                progress,
                DEFAULT_GATE_LIMIT if gate_limit is None else gate_limit,
            )


def _print_registered(result: Registered, as_json: bool) -> None:
    from trainer.gate import InterferenceError

    failures = result.failures
    refused = [error for error in failures.values() if isinstance(error, InterferenceError)]
    gate = result.published.gate if result.published else None
    if gate is None and refused:
        gate = refused[0].report
    if as_json:
        print_json(
            {
                "revision": result.published.revision if result.published else None,
                "registered": [summary(record) for record in result.records],
                "failed": {name: error_fields(error) for name, error in failures.items()},
                "report": result.published.report if result.published else None,
                "gate": gate.document() if gate else None,
                "suspects": [asdict(suspect) for suspect in result.suspects],
            }
        )
    else:
        if result.published is not None:
            print_table(
                ["task", "revision", "rows", "prompt", "majority", "instruction", "no prompt"],
                [_scores(record) for record in result.records],
                title=f"published catalog revision {result.published.revision}",
            )
            print_effect(result.published)
        if gate is not None:
            _print_gate(gate, result.suspects)
        for name, error in failures.items():
            print_error(f"{name} was not registered", error)
    if failures:
        raise typer.Exit(max(exit_code(error) for error in failures.values()))


def _print_gate(gate: GateReport, suspects: Sequence[SuspectInput]) -> None:
    """What the new tasks do to the old ones, and which of their rows look wrong."""
    if gate.accuracy_before is not None and gate.accuracy_after is not None:
        out.print(
            "right on the held-out rows of old tasks: "
            f"{gate.accuracy_before:.1%} before, {gate.accuracy_after:.1%} with the new one"
        )
    if gate.taken:
        print_table(
            ["old task", "taken by", "rows", "share"],
            [[t.task, t.by, f"{t.taken} of {t.rows}", f"{t.share:.1%}"] for t in gate.taken[:10]],
            title="held-out rows of old tasks that go to the new one",
        )
    for new, old in gate.near_duplicates:
        out.print(f"{new} is nearly the same as {old}: a fifth of their rows or more is mixed up")
    if suspects:
        print_table(
            ["new task", "input", "goes to"],
            [[s.task, s.input, s.decided or "none (outlier?)"] for s in suspects[:10]],
            title=f"{len(suspects)} new rows that go elsewhere: mislabelled, or unlike the others?",
        )


def _scores(record: TaskRecord) -> list[object]:
    scores = record.prompt.scores if record.prompt else {}
    columns = ("prompt", "majority", "instruction", "no_prompt")
    shown = [f"{scores[column]:.1%}" if column in scores else "-" for column in columns]
    return [record.name, record.revision, record.data.rows, *shown]
