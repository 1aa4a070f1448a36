"""The command that adds tasks: register."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router.errors import InvalidInputError
from router.settings import DEFAULT_BASE_MODEL, DEFAULT_ENCODER
from router.tasks import PromptMethod
from trainer.cli.console import (
    AsJson,
    BaseModel,
    EncoderName,
    GateLimit,
    Home,
    errors_for_people,
    home_folder,
    print_json,
    progress_bars,
)
from trainer.cli.registered import leave_if_failed, print_registered, registered_document
from trainer.commands import Initialisation

if TYPE_CHECKING:
    from trainer.admission import Registered
    from trainer.commands import PolicyChange, RegisterTask
    from trainer.tuning_log import TuningLog

TaskName = Annotated[str, typer.Argument(metavar="NAME", help="The task's name.")]


@dataclass(frozen=True, slots=True)
class _Tuning:
    """What the user said about tuning; None leaves the default."""

    steps: int | None
    length: int | None
    learning_rate: float | None
    initialisation: Initialisation | None
    seed: int | None
    seeds: int | None
    method: PromptMethod | None
    search: bool | None


def add_to(app: typer.Typer) -> None:
    """Mount the command."""
    app.command("register")(register)


def register(
    name: Annotated[str | None, typer.Argument(help="The new task's name.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Labelled rows: .jsonl, .jsonl.gz, .csv or .parquet.")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file that lists several tasks, tuned together; its key `tuning` may hold "
            "any setting of docs/prompts.md."
        ),
    ] = None,
    prompt_from: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Take the prompt of this PEFT folder (prompt tuning; of a causal model, prefix "
            "tuning too) instead of tuning one.",
        ),
    ] = None,
    description: Annotated[str, typer.Option(help="What the task is, for people.")] = "",
    instruction: Annotated[
        str,
        typer.Option(
            help="What the model should do. The soft prompt starts from it; without it, from the "
            "description, or else the words of the name."
        ),
    ] = "",
    input_field: Annotated[str, typer.Option(help="Name of the column with inputs.")] = "input",
    output_field: Annotated[str, typer.Option(help="Name of the column with outputs.")] = "output",
    revise: Annotated[
        bool, typer.Option("--revise", help="Add the next revision of a task that exists.")
    ] = False,
    challenger: Annotated[
        str,
        typer.Option(
            metavar="SHARE|shadow",
            help="With --revise: try that revision beside the current one, on a share of the "
            "request keys (10%), or as a shadow that only decides; see `promptyard challenger`.",
        ),
    ] = "",
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="Register for routing only; outputs are not read.")
    ] = False,
    no_classifier: Annotated[
        bool,
        typer.Option(
            "--no-classifier",
            help="Answer by the soft prompt alone, with no label classifier beside it.",
        ),
    ] = False,
    encoder_prompt: Annotated[
        bool | None,
        typer.Option(
            "--encoder-prompt/--no-encoder-prompt",
            help="Whether to tune a prompt of the sentence encoder, too, by which the label "
            "classifier tells the labels apart better. Costs one more pass of the encoder an "
            "answer. [default: where the encoder takes one]",
            show_default=False,
        ),
    ] = None,
    free_text: Annotated[
        bool, typer.Option("--free-text", help="Outputs are text to generate, not a closed set.")
    ] = False,
    context_field: Annotated[
        str, typer.Option(help="Name of the column with passages: a text, or a list of them.")
    ] = "context",
    template: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="How the base model reads an input and its passages, when tuned and when served, "
            "like '{context} question: {input}'. Default: the input, then the passages.",
        ),
    ] = "",
    metric: Annotated[
        str,
        typer.Option(
            help="What answers are scored by, for early stopping and in the record: accuracy, "
            "macro-f1, exact-match, rouge-l, or label-f1 for lists of labels. Default: what suits "
            "the outputs."
        ),
    ] = "",
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep the first of repeated inputs.")
    ] = False,
    keep_text: Annotated[
        bool,
        typer.Option(
            "--keep-text",
            help="Store inputs and outputs in the home, as they are, so that `promptyard encoders "
            "use` can embed them again. Default: no text is stored.",
        ),
    ] = False,
    statistics_only: Annotated[
        bool,
        typer.Option(
            "--statistics-only",
            help="Keep no embeddings of the rows, but sums over all of them; see "
            "docs/operations.md for what that costs.",
        ),
    ] = False,
    force: Annotated[
        str,
        typer.Option(
            metavar="REASON",
            help="Publish a prompt that beats no baseline, or a task that takes too much of others",
        ),
    ] = "",
    gate_limit: GateLimit = None,
    steps: Annotated[int | None, typer.Option(help="Tuning steps at most.")] = None,
    method: Annotated[
        PromptMethod | None,
        typer.Option(
            help="prompt: vectors before the input (the smallest). prefix: keys and values for "
            "every layer of the base model, where it allows that."
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Virtual tokens of the prompt.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the tuning.")] = None,
    initialisation: Annotated[
        Initialisation | None,
        typer.Option(
            help="What the soft prompt starts from: a similar task's prompt (nearest), the labels "
            "and the mean states of their rows (examples), the words of instruction and labels "
            "(text), random words (vocabulary), or what of these does best at first (best)."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the tuning.")] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Tune with so many seeds, and keep the best on the validation rows."),
    ] = None,
    search: Annotated[
        bool | None,
        typer.Option(
            "--search/--no-search",
            help="Try 8 configurations of learning rate, length, initialisation and steps (those "
            "that no flag and no manifest names), stop the worse ones early, and keep the best on "
            "the validation rows. Takes 3 to 6 times as long.",
            show_default=False,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write event files for TensorBoard here: losses, scores and learning rates of "
            "each task (needs the extra `tensorboard`).",
        ),
    ] = None,
    mlflow: Annotated[
        str,
        typer.Option(
            metavar="URI",
            help="Send the same figures to an MLflow tracking server (needs the extra `mlflow`).",
        ),
    ] = "",
    checkpoint_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Keep the state of tuning so often: the same command after a kill goes on there.",
        ),
    ] = 60.0,
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
    promptyard register refunds --revise --data more.jsonl --challenger 10%

    Rows are {"input": ..., "output": ...}; an output may be a list of labels, `context` retrieved
    passages, `rejected` outputs to make less probable. Running servers pick the new task up by
    themselves.
    """  # noqa: D301 - \b keeps click from joining the lines
    with errors_for_people(as_json):
        from trainer.commands import PolicyChange, RegisterTask
        from trainer.data import Fields
        from trainer.manifest import read_manifest, read_tuning

        if (manifest is None) == (name is None):
            raise InvalidInputError(
                "NAME",
                "missing" if name is None else f"{name}, and --manifest",
                "give either a task's NAME and --data, or --manifest",
            )
        if manifest is not None:
            if challenger:
                raise InvalidInputError(
                    "--challenger", challenger, "give it with a task's NAME, without --manifest"
                )
            requests: Sequence[RegisterTask] = read_manifest(manifest)
            in_manifest = read_tuning(manifest)
        else:
            in_manifest = {}
            if data is None or name is None:
                raise InvalidInputError("--data", "missing", "give a file of labelled rows")
            requests = [
                RegisterTask(
                    name=name,
                    data=data,
                    description=description,
                    instruction=instruction,
                    fields=Fields(input_field, output_field, context_field),
                    with_prompt=not no_prompt,
                    with_classifier=not no_classifier,
                    encoder_prompt=encoder_prompt,
                    free_text=free_text,
                    drop_duplicates=drop_duplicates,
                    revise=revise,
                    force=force,
                    prompt_from=prompt_from,
                    metric=metric,
                    template=template,
                    challenger=challenger,
                    keep_text=keep_text,
                    statistics_only=statistics_only,
                )
            ]
        result = _register(
            home,
            encoder,
            base_model,
            requests,
            PolicyChange(head=head, false_reject_rate=false_reject_rate),
            in_manifest,
            _Tuning(steps, length, learning_rate, initialisation, seed, seeds, method, search),
            gate_limit,
            checkpoint_seconds,
            log_dir,
            mlflow,
        )
        if as_json:
            print_json(registered_document(result))
        else:
            print_registered(result)
        leave_if_failed(result)


def _register(
    home: Path | None,
    encoder: str,
    base_model: str | None,
    requests: Sequence[RegisterTask],
    change: PolicyChange,
    in_manifest: Mapping[str, object],
    tuning: _Tuning,
    gate_limit: float | None,
    checkpoint_seconds: float,
    log_dir: Path | None,
    mlflow: str,
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
    from trainer.search import configurations
    from trainer.tuning_log import MLflow, TensorBoard, TuningLogs
    from trainer.workshop import Workshop

    flags = {key: value for key, value in asdict(tuning).items() if value is not None}
    given = {**in_manifest, **flags}
    if search := given.pop("search", None):
        # True is the small search; what a manifest lists goes before it.
        search = in_manifest.get("search") or search
    settings, *others = configurations(given, search)
    logs: list[TuningLog] = [TensorBoard(log_dir)] if log_dir is not None else []
    logs += [MLflow(mlflow)] if mlflow else []
    wants_prompts = any(request.with_prompt for request in requests)
    with Workshop(folder, load_encoder(encoder)) as workshop:
        model = load_base_model(base_model) if wants_prompts else None
        with (
            progress_bars() as progress,
            TuningLogs(logs, lambda said: progress("", said, 1, 1)) as log,
        ):
            return register_tasks(
                workshop,
                requests,
                model,
                settings,
                change,
                progress,
                DEFAULT_GATE_LIMIT if gate_limit is None else gate_limit,
                checkpoint_seconds,
                others,
                log,
            )
