"""Commands that read the catalog, or change what is live: list, show, retire, restore, rollback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router.settings import DEFAULT_ENCODER
from trainer.cli.console import (
    AsJson,
    EncoderName,
    GateLimit,
    Home,
    err,
    errors_for_people,
    home_folder,
    out,
    print_json,
    print_table,
)
from trainer.cli.published import challenge_fields, print_published, publish_or_refuse, summary

if TYPE_CHECKING:
    from router.challengers import Challenge
    from router.tasks import TaskRecord
    from trainer.data import Fields
    from trainer.workshop import Workshop

TaskName = Annotated[str, typer.Argument(metavar="NAME", help="The task's name.")]
Force = Annotated[
    str,
    typer.Option(metavar="REASON", help="Let it take too much of others; the reason is recorded."),
]


_LOST_WITHOUT_EMBEDDINGS = (
    "no row is held out: the threshold is that of all tasks together, and what is said of a "
    "publish, by the gate and of drift leaves this task's own rows out",
    "the head `auto` looks at no stored rows while this task is live",
    "the task has one centroid",
    "explanations show no examples of it",
)


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    app.command("list")(list_tasks)
    app.command("show")(show)
    app.command("retire")(retire)
    app.command("restore")(restore)
    app.command("rollback")(rollback)


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
            tried = {each.challenge.task: each.challenge for each in catalog.challengers(revision)}
            names = catalog.task_names() if show_all else sorted(live)
            records = [
                catalog.record(TaskKey(name, live.get(name) or catalog.newest_record(name)))
                for name in names
            ]
        if as_json:
            tasks = [
                {
                    **summary(r),
                    "live": r.name in live,
                    "challenger": challenge_fields(tried[r.name]) if r.name in tried else None,
                }
                for r in records
            ]
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
                    _prompt(record),
                    f"{record.prompt.scores['prompt']:.1%}" if record.prompt else "-",
                    _state(record.name, live, tried),
                ]
                for record in records
            ],
            title=f"catalog revision {revision}: {len(live)} live tasks",
        )


def _state(name: str, live: Mapping[str, int], tried: Mapping[str, Challenge]) -> str:
    if name not in live:
        return "retired"
    if name not in tried:
        return "live"
    return f"live, tries {tried[name].revision} ({tried[name].share_text})"


def _prompt(record: TaskRecord) -> str:
    if record.prompt is None:
        return "none"
    tokens = f"{record.prompt.tokens} tokens"
    return tokens if record.prompt.method == "prompt" else f"{tokens} ({record.prompt.method})"


def show(
    name: TaskName,
    revision: Annotated[
        int | None, typer.Option(help="A revision of the task. Default: the live one.")
    ] = None,
    row: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Show this stored row instead, as --explain numbers them; needs --data where the "
            "task keeps no texts.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="The file that the task was registered from; not needed where it keeps texts."
        ),
    ] = None,
    input_field: Annotated[str, typer.Option(help="Name of the column with inputs.")] = "input",
    output_field: Annotated[str, typer.Option(help="Name of the column with outputs.")] = "output",
    context_field: Annotated[
        str, typer.Option(help="Name of the column with passages.")
    ] = "context",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show everything that the catalog knows of a task, or the text of one of its rows."""
    with errors_for_people(as_json):
        from router.catalog import CatalogReader
        from trainer.cli.chosen_task import chosen_record
        from trainer.data import Fields

        folder = home_folder(home)
        with CatalogReader(folder) as catalog:
            record = chosen_record(catalog, name, revision)
            history = catalog.history(name)
            live = history[-1][1]
            newest = catalog.newest_revision()
            head = catalog.revision(newest)
            tried = [
                challenge_fields(each.challenge)
                for each in catalog.challengers(newest)
                if each.challenge.task == name
            ]
        if row is not None and data is None and record.texts_sha256:
            _show_kept_row(folder, record, row, as_json)
            return
        if row is not None or data is not None:
            _show_row(record, row, data, Fields(input_field, output_field, context_field), as_json)
            return
        document = {
            **asdict(record),
            "sha256": record.sha256,
            "live_revision": live,
            "history": [{"catalog_revision": at, "task_revision": to} for at, to in history],
            "challenger": tried[0] if tried else None,
            "policy": asdict(head.policy),
        }
        if record.statistics_only:
            document["lost"] = list(_LOST_WITHOUT_EMBEDDINGS)
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
        from router.rejection import RejectionPolicy
        from trainer import lifecycle

        with open_workshop(home, encoder) as workshop:
            published = lifecycle.retire(workshop, name)
            print_published(published, as_json)
            if RejectionPolicy.parse(workshop.policy().on_unknown).fallback_task == name:
                err.print(
                    f"{name} is what the catalog's policy falls back to: no task is used for an "
                    "unknown input any more; see `promptyard policy set --on-unknown`",
                    markup=False,
                    highlight=False,
                )


def restore(
    name: TaskName,
    gate_limit: GateLimit = None,
    force: Force = "",
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Bring a retired task back. It passes the gate as a new task does."""
    with errors_for_people(as_json):
        from trainer import lifecycle

        with open_workshop(home, encoder) as workshop:
            limit = gate_share(gate_limit)
            publish_or_refuse(lambda: lifecycle.restore(workshop, name, limit, force), as_json)


def rollback(
    name: TaskName,
    to: Annotated[
        int | None, typer.Option(help="The revision to go back to. Default: the one before.")
    ] = None,
    gate_limit: GateLimit = None,
    force: Force = "",
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Make an older revision of a task live again. It passes the gate as a new task does."""
    with errors_for_people(as_json):
        from trainer import lifecycle

        with open_workshop(home, encoder) as workshop:
            publish_or_refuse(
                lambda: lifecycle.rollback(workshop, name, to, gate_share(gate_limit), force),
                as_json,
            )


@contextmanager
def open_workshop(home: Path | None, encoder: str) -> Iterator[Workshop]:
    """The workshop of a catalog that exists."""
    from router.bootstrap import load_encoder
    from router.catalog import CatalogReader
    from router.threads import one_blas_thread
    from trainer.workshop import Workshop

    folder = home_folder(home)
    CatalogReader(folder).close()
    with Workshop(folder, load_encoder(encoder)) as workshop, one_blas_thread():
        yield workshop


def gate_share(limit: float | None) -> float:
    """The limit of the gate that was asked for, or the default."""
    from trainer.gate import DEFAULT_GATE_LIMIT

    return DEFAULT_GATE_LIMIT if limit is None else limit


def _show_kept_row(folder: Path, record: TaskRecord, row: int, as_json: bool) -> None:
    """Show a stored row of a task that keeps its texts."""
    from router.artifacts import ArtifactReader
    from router.catalog import ARTIFACTS_FOLDER
    from router.kept_texts import kept_texts

    texts = kept_texts(ArtifactReader(folder / ARTIFACTS_FOLDER), record)
    _print_row(row, [(text.input, text.output) for text in texts], as_json)


def _show_row(
    record: TaskRecord,
    row: int | None,
    data: Path | None,
    fields: Fields,
    as_json: bool,
) -> None:
    """Find a stored row in the file that it came from."""
    from router.errors import InvalidInputError
    from trainer.data import read_labelled

    if row is None or data is None:
        missing = "--row" if row is None else "--data"
        raise InvalidInputError(missing, "missing", "give a row's number and the task's file")
    file = read_labelled(
        data,
        fields,
        with_output=record.prompt is not None,
        drop_duplicates=True,
        min_rows=1,
    )
    if file.sha256 != record.data.sha256:
        raise InvalidInputError(
            "--data", data, f"give the file that {record.key} was registered from, unchanged"
        )
    _print_row(row, [(each.input, each.output) for each in file.examples], as_json)


def _print_row(row: int, texts: Sequence[tuple[str, str]], as_json: bool) -> None:
    from router.errors import InvalidInputError

    if row >= len(texts):
        raise InvalidInputError("--row", row, f"give 0 to {len(texts) - 1}")
    text, output = texts[row]
    if as_json:
        print_json({"row": row, "input": text, "output": output})
    else:
        out.print(text, markup=False, highlight=False, soft_wrap=True)


def _outputs(record: TaskRecord) -> str:
    return "free text" if record.outputs is None else ", ".join(record.outputs)
