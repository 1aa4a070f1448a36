"""Commands that change or read the catalog: register, list, show, retire, restore, rollback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from trainer.commands import Initialisation

if TYPE_CHECKING:
    from router.tasks import TaskRecord
    from trainer.admission import Registered, SuspectInput
    from trainer.commands import PolicyChange, RegisterTask
    from trainer.gate import GateReport
    from trainer.workshop import Published, Workshop

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
    """Mount the commands."""
    app.command("register")(register)
    app.command("list")(list_tasks)
    app.command("show")(show)
    app.command("retire")(retire)
    app.command("restore")(restore)
    app.command("rollback")(rollback)


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
        str | None, typer.Option(help="Set the catalog's head: lda or nearest-mean.")
    ] = None,
    false_reject_rate: Annotated[
        float | None, typer.Option(help="Share of a task's own inputs that may be called unknown.")
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


def list_tasks(
    show_all: Annotated[bool, typer.Option("--all", help="Retired tasks too.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks of the catalog."""
    with errors_for_people(as_json):
        from router.catalog import CatalogReader
        from router.tasks import TaskKey

        with CatalogReader(home_folder(home)) as catalog:
            revision = catalog.newest_revision()
            live = {key.name: key.revision for key in catalog.live(revision)}
            names = catalog.task_names() if show_all else sorted(live)
            records = [
                catalog.record(TaskKey(name, live.get(name) or catalog.newest_record(name)))
                for name in names
            ]
        if as_json:
            tasks = [{**_summary(r), "live": r.name in live} for r in records]
            print_json({"revision": revision, "tasks": tasks})
            return
        print_table(
            ["task", "revision", "rows", "outputs", "prompt", "validation", "state"],
            [
                [
                    record.name,
                    record.revision,
                    record.data.rows,
                    "-" if record.prompt is None else _outputs(record),
                    f"{record.prompt.tokens} tokens" if record.prompt else "none",
                    f"{record.prompt.scores['prompt']:.1%}" if record.prompt else "-",
                    "live" if record.name in live else "retired",
                ]
                for record in records
            ],
            title=f"catalog revision {revision}: {len(live)} live tasks",
        )


def show(
    name: TaskName,
    revision: Annotated[
        int | None, typer.Option(help="A revision of the task. Default: the live one.")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show everything that the catalog knows of a task."""
    with errors_for_people(as_json):
        from router.catalog import CatalogReader
        from router.errors import TaskNotFoundError
        from router.tasks import TaskKey

        with CatalogReader(home_folder(home)) as catalog:
            history = catalog.history(name)
            if not history:
                raise TaskNotFoundError("task", name, "list the tasks with `promptyard list`")
            live = history[-1][1]
            record = catalog.record(TaskKey(name, revision or live or catalog.newest_record(name)))
            head = catalog.revision(catalog.newest_revision())
        document = {
            **asdict(record),
            "sha256": record.sha256,
            "live_revision": live,
            "history": [{"catalog_revision": at, "task_revision": to} for at, to in history],
            "policy": asdict(head.policy),
        }
        if as_json:
            print_json(document)
            return
        out.print_json(data=document)


def retire(
    name: TaskName,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Take a task out of routing. Its records and files stay; `restore` brings it back."""
    with errors_for_people(as_json):
        from trainer import lifecycle

        with _workshop(home, encoder) as workshop:
            _print_published(lifecycle.retire(workshop, name), as_json)


def restore(
    name: TaskName,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Bring a retired task back."""
    with errors_for_people(as_json):
        from trainer import lifecycle

        with _workshop(home, encoder) as workshop:
            _print_published(lifecycle.restore(workshop, name), as_json)


def rollback(
    name: TaskName,
    to: Annotated[
        int | None, typer.Option(help="The revision to go back to. Default: the one before.")
    ] = None,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Make an older revision of a task live again."""
    with errors_for_people(as_json):
        from trainer import lifecycle

        with _workshop(home, encoder) as workshop:
            _print_published(lifecycle.rollback(workshop, name, to), as_json)


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


@contextmanager
def _workshop(home: Path | None, encoder: str) -> Iterator[Workshop]:
    """The workshop of a catalog that exists."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from router.bootstrap import load_encoder
    from router.catalog import CatalogReader
    from trainer.workshop import Workshop

    folder = home_folder(home)
    CatalogReader(folder).close()
    with (
        Workshop(folder, load_encoder(encoder)) as workshop,
        threadpool_limits(1, user_api="blas"),
    ):
        yield workshop


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
                "registered": [_summary(record) for record in result.records],
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
            _print_effect(result.published)
        if gate is not None:
            _print_gate(gate, result.suspects)
        for name, error in failures.items():
            print_error(f"{name} was not registered", error)
    if failures:
        raise typer.Exit(max(exit_code(error) for error in failures.values()))


def _print_published(published: Published, as_json: bool) -> None:
    if as_json:
        print_json({"revision": published.revision, "report": published.report})
        return
    out.print(f"published catalog revision {published.revision}")
    _print_effect(published)


def _print_effect(published: Published) -> None:
    """What the publish did to routing, on the rows that the tasks hold out in turn."""
    report, head = published.report, published.head
    if not head.tasks:
        out.print("no live task is left: every input is unknown now")
        return
    out.print(
        f"routing of held-out rows: {report['held_out_accuracy']:.1%} right, "
        f"{report['held_out_rejected']:.1%} rejected, {report['held_out_ambiguous']:.1%} ambiguous "
        f"({len(head.tasks)} tasks, {head.kind})"
    )
    changed = published.changed_decisions
    if changed:
        listed = ", ".join(f"{task} {rows}" for task, rows in sorted(changed.items())[:10])
        out.print(
            f"decisions on old held-out rows that changed: {sum(changed.values())} ({listed})"
        )
    else:
        out.print("decisions on old held-out rows that changed: none")


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


def _summary(record: TaskRecord) -> dict[str, object]:
    return {
        "name": record.name,
        "revision": record.revision,
        "sha256": record.sha256,
        "rows": record.data.rows,
        "outputs": record.outputs,
        "prompt": asdict(record.prompt) if record.prompt else None,
        "created_at": record.created_at,
    }


def _outputs(record: TaskRecord) -> str:
    return "free text" if record.outputs is None else ", ".join(record.outputs)


def _scores(record: TaskRecord) -> list[object]:
    scores = record.prompt.scores if record.prompt else {}
    columns = ("prompt", "majority", "instruction", "no_prompt")
    shown = [f"{scores[column]:.1%}" if column in scores else "-" for column in columns]
    return [record.name, record.revision, record.data.rows, *shown]
