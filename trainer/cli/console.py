"""What the commands share: options, output for people and for programs, errors, progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from router.errors import InvalidInputError, PromptyardError, RefusedError

if TYPE_CHECKING:
    from router.client import RouterError

# Results go to stdout; progress, warnings and errors to stderr, so that output can be piped.
out = Console()
err = Console(stderr=True)

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_REFUSED = 3


@dataclass(frozen=True, slots=True)
class BeforeCommand:
    """What was chosen before the command, as in `promptyard --tenant NAME list`."""

    tenant: str | None = None
    home: Path | None = None


def _before_command(context: typer.Context) -> BeforeCommand:
    found = context.find_root().obj
    return found if isinstance(found, BeforeCommand) else BeforeCommand()


def chosen_tenant(context: typer.Context) -> str | None:
    """What `promptyard --tenant` chose."""
    return _before_command(context).tenant


def chosen_home(context: typer.Context, home: Path | None) -> Path | None:
    """The flag of the command, or that before it, or `home` as the environment has it."""
    before = _before_command(context).home
    source = context.get_parameter_source("home")
    of_command = source is not None and source.name == "COMMANDLINE"
    return home if of_command or before is None else before


def _home_of_tenant(context: typer.Context, home: Path | None) -> Path | None:
    from router.tenants import tenant_home

    tenant, home = chosen_tenant(context), chosen_home(context, home)
    return home if tenant is None else tenant_home(home_folder(home), tenant)


def _home_of_all_tenants(context: typer.Context, home: Path | None) -> Path | None:
    _refuse_tenant(chosen_tenant(context))
    return chosen_home(context, home)


def _server(context: typer.Context, server: str | None) -> str | None:
    if server is not None:
        _refuse_tenant(chosen_tenant(context))
    return server


def _refuse_tenant(tenant: str | None) -> None:
    if tenant is not None:
        remedy = "leave it out: a server knows a caller's tenant by the token"
        fail(InvalidInputError("--tenant", tenant, remedy))


def _home_option(
    of: Callable[[typer.Context, Path | None], Path | None],
) -> object:
    return typer.Option(
        "--home",
        envvar="PROMPTYARD_HOME",
        callback=of,
        help="Folder of the catalog and its files. It may also stand before the command. "
        "Default: the platform's data folder.",
    )


Home = Annotated[Path | None, _home_option(_home_of_tenant)]
HomeOfAllTenants = Annotated[Path | None, _home_option(_home_of_all_tenants)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")]
EncoderName = Annotated[
    str,
    typer.Option(
        envvar="PROMPTYARD_ENCODER",
        help="Sentence encoder: all-MiniLM-L6-v2 (comes with the install), fast (token vectors "
        "distilled from it), or any sentence-transformers model by hub name or folder; see "
        "`promptyard encoders`.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        envvar="PROMPTYARD_BASE_MODEL",
        help="Base model: a folder or hub name of any Hugging Face seq2seq or causal model. "
        "Default: the one that comes with the install.",
        show_default=False,
    ),
]
GateLimit = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of another task's held-out rows that a new one may take. Default: 0.05.",
    ),
]
Server = Annotated[
    str | None,
    typer.Option(
        callback=_server, help="Ask the server at HOST:PORT instead of working in process."
    ),
]
ServerAsked = Annotated[str, typer.Option(callback=_server, help="The server's HOST:PORT.")]
AccessToken = Annotated[
    str,
    typer.Option(
        "--token",
        envvar="PROMPTYARD_TOKEN",
        show_default=False,
        help="Token for a server that asks for one. Other users of this machine can see flags: "
        "prefer the environment.",
    ),
]
UseTls = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="PROMPTYARD_TLS",
        help="Speak TLS to the server, trusting what this system trusts. The other --tls flags "
        "imply it.",
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca", envvar="PROMPTYARD_TLS_CA", help="The authority of the server, as PEM."
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        envvar="PROMPTYARD_CLIENT_CERT",
        help="A certificate to show to a server that asks for one, as PEM.",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option("--tls-key", envvar="PROMPTYARD_CLIENT_KEY", help="Its key, as PEM."),
]

ReportProgress = Callable[[str, str, int, int], None]


def home_folder(home: Path | None) -> Path:
    """The folder that was given, or the platform's data folder."""
    if home is not None:
        return home
    from platformdirs import user_data_path

    return Path(user_data_path("promptyard"))


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """A table for people. Numbers are right-aligned; texts are shown as they are."""
    table = Table(title=escape(title) or None, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], int | float) for row in rows)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    out.print(table)


@contextmanager
def errors_for_people(as_json: bool = False) -> Iterator[None]:
    """Turn the errors of the project into one clear message and an exit code."""
    try:
        yield
    except PromptyardError as error:
        fail(error, as_json)
    except KeyboardInterrupt:
        err.print("interrupted; nothing that was published is lost")
        raise typer.Exit(130) from None


def fail(error: PromptyardError, as_json: bool = False) -> NoReturn:
    """Print an error and leave with its exit code."""
    if as_json:
        print_json({"error": error_fields(error)})
    else:
        print_error("error", error)
    raise typer.Exit(exit_code(error))


def fail_of_server(server: str, error: RouterError, as_json: bool = False) -> NoReturn:
    """Print the error that a call to `server` ended with, and leave with its exit code."""
    remedy = error.remedy
    if error.reason == "UNAVAILABLE":
        remedy = (
            "check the address, that a server runs there (`promptyard serve`), and --tls if it"
            " speaks TLS"
        )
    if as_json:
        fields = {"reason": error.reason, "field": error.field or "server"}
        fields |= {"value": error.value or error.message, "remedy": remedy}
        print_json({"error": fields})
    else:
        err.print(f"[bold red]error[/] ({error.reason}) from {escape(server)}", highlight=False)
        err.print(f"  {error.message}", highlight=False, markup=False)
        if remedy != error.remedy:
            err.print(f"  {remedy}", highlight=False, markup=False)
    invalid = error.reason == InvalidInputError.reason
    raise typer.Exit(EXIT_INVALID if invalid else EXIT_FAILED)


def print_error(what: str, error: PromptyardError) -> None:
    """An error for people, on stderr."""
    err.print(f"[bold red]{escape(what)}[/] ({error.reason})", highlight=False)
    err.print(f"  {error}", highlight=False, markup=False)


def exit_code(error: PromptyardError) -> int:
    """2 for bad input, 3 for a refused registration, 1 otherwise."""
    if isinstance(error, InvalidInputError):
        return EXIT_INVALID
    return EXIT_REFUSED if isinstance(error, RefusedError) else EXIT_FAILED


def error_fields(error: PromptyardError) -> Mapping[str, str]:
    """An error as fields, for programs."""
    return {
        "reason": error.reason,
        "field": error.field,
        "value": error.value,
        "remedy": error.remedy,
    }


@contextmanager
def progress_bars() -> Iterator[ReportProgress]:
    """Progress of long work on stderr: one bar per (task, stage); plain lines where no terminal."""
    if not err.is_terminal:
        yield _progress_lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err) as bars:
        known: dict[tuple[str, str], object] = {}

        def report(task: str, stage: str, done: int, total: int) -> None:
            key = (task, stage)
            if key not in known:
                known[key] = bars.add_task(f"{stage} {task}".strip(), total=total)
            bars.update(known[key], completed=done, total=total)  # type: ignore[arg-type]

        yield report


def quiet_libraries() -> None:
    """No progress bars and no log lines of libraries between ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # It writes to stderr itself, and not as JSON: a line for every handshake that fails.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _progress_lines() -> ReportProgress:
    finished: set[tuple[str, str]] = set()

    def report(task: str, stage: str, done: int, total: int) -> None:
        if done >= total and (task, stage) not in finished:
            finished.add((task, stage))
            err.print(f"{stage} {task}: {done}/{total}".replace(" :", ":"), highlight=False)

    return report


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
