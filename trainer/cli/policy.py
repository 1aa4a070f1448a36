"""Commands about how the catalog routes: policy show, policy set."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from router.errors import InvalidInputError
from router.settings import DEFAULT_ENCODER
from trainer.cli.console import (
    AsJson,
    EncoderName,
    Home,
    errors_for_people,
    home_folder,
    out,
    print_json,
    print_table,
)
from trainer.cli.published import print_published
from trainer.cli.tasks import open_workshop

app = typer.Typer(
    help="How the catalog routes: its head, its error rates, what becomes of unknown inputs.",
    no_args_is_help=True,
)


@app.command()
def show(home: Home = None, as_json: AsJson = False) -> None:
    """Show the policy of the newest catalog revision."""
    with errors_for_people(as_json):
        from router.catalog import CatalogReader
        from router.rejection import RejectionPolicy

        with CatalogReader(home_folder(home)) as catalog:
            revision = catalog.newest_revision()
            policy = catalog.revision(revision).policy
            live = {key.name for key in catalog.live(revision)}
        rejection = RejectionPolicy.parse(policy.on_unknown)
        is_served = rejection.is_served(live)
        if as_json:
            print_json({"revision": revision, **asdict(policy), "fallback_missing": not is_served})
            return
        print_table(
            ["setting", "value"],
            [[name, str(value)] for name, value in asdict(policy).items()],
            title=f"policy of catalog revision {revision}",
        )
        if not is_served:
            out.print(
                f"{rejection.fallback_task} is not live: no task is used for an unknown input",
                markup=False,
                highlight=False,
            )


@app.command("set")
def set_policy(
    on_unknown: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="Task that is used for an input that fits none: abstain (none), best (the "
            "best-scoring one) or fallback:TASK. The decision stays unknown.",
        ),
    ] = None,
    head: Annotated[str | None, typer.Option(help="The head: auto, lda or nearest-mean.")] = None,
    false_reject_rate: Annotated[
        float | None, typer.Option(help="Share of a task's own inputs that may be called unknown.")
    ] = None,
    ambiguous_rate: Annotated[
        float | None,
        typer.Option(help="Share of a task's own inputs that may be called ambiguous."),
    ] = None,
    cascade: Annotated[
        bool | None,
        typer.Option(
            "--cascade/--no-cascade",
            help="Publish a head of the encoder `fast` with every revision, for `serve --cascade`. "
            "All tasks must keep their texts (register --keep-text).",
        ),
    ] = None,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Change the policy, in a catalog revision of its own. What is not named stays.

    promptyard policy set --on-unknown fallback:helpdesk
    """
    with errors_for_people(as_json):
        from router.rejection import RejectionPolicy
        from trainer.commands import PolicyChange

        change = PolicyChange(
            head=head,
            false_reject_rate=false_reject_rate,
            ambiguous_rate=ambiguous_rate,
            on_unknown=(
                None if on_unknown is None else RejectionPolicy.parse(on_unknown, "--on-unknown")
            ),
            cascade=cascade,
        )
        if change == PolicyChange():
            raise InvalidInputError("policy", "no change", "name what to set, see --help")
        with open_workshop(home, encoder) as workshop:
            workshop.policy(change)
            print_published(workshop.publish("policy", live={}, change=change), as_json)
