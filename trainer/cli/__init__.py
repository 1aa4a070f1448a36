"""The `promptyard` command."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli import (
    base_models,
    challenging,
    comparing,
    demo,
    drifting,
    encoders,
    evaluation,
    exchanging,
    inspecting,
    operating,
    policy,
    registering,
    serving,
    tasks,
    trying,
    watching,
)
from trainer.cli.console import BeforeCommand, fail, quiet_libraries

app = typer.Typer(
    name="promptyard",
    help="Route inputs to soft prompts: register tasks, serve them over gRPC, evaluate routing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"promptyard {version('promptyard')}")
        raise typer.Exit


def _check_tenant(name: str | None) -> str | None:
    from router.errors import InvalidInputError
    from router.tenants import check_tenant

    try:
        return None if name is None else check_tenant(name, "--tenant")
    except InvalidInputError as error:
        fail(error)


@app.callback()
def _options(
    context: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="As `--home` of the command, for those that have one."),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            callback=_check_tenant,
            help="Work on this tenant's catalog, which is one of its own in the home. It stands "
            "before the command. Default: the home's own catalog.",
        ),
    ] = None,
    _: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    # What the help of the command says is above, at `app`.
    context.obj = BeforeCommand(tenant, home)


registering.add_to(app)
trying.add_to(app)
tasks.add_to(app)
inspecting.add_to(app)
exchanging.add_to(app)
operating.add_to(app)
serving.add_to(app)
watching.add_to(app)
drifting.add_to(app)
demo.add_to(app)
comparing.add_to(evaluation.app)
app.add_typer(evaluation.app, name="evaluate")
app.add_typer(base_models.app, name="base")
app.add_typer(encoders.app, name="encoders")
app.add_typer(policy.app, name="policy")
app.add_typer(challenging.app, name="challenger")


def main() -> None:
    """Run the command."""
    quiet_libraries()
    app()
