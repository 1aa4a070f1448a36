"""Commands that try a revision on live traffic: challenger start, list, promote, end."""

from __future__ import annotations

from typing import Annotated

import typer

from router.settings import DEFAULT_ENCODER
from trainer.cli.console import (
    AsJson,
    EncoderName,
    GateLimit,
    Home,
    errors_for_people,
    home_folder,
    print_json,
    print_table,
)
from trainer.cli.published import challenge_fields, print_published, publish_or_refuse
from trainer.cli.tasks import Force, TaskName, gate_share, open_workshop

app = typer.Typer(
    help="Two revisions of a task side by side on live traffic: the current one and a challenger.",
    no_args_is_help=True,
)


@app.command()
def start(
    name: TaskName,
    share: Annotated[
        str,
        typer.Argument(
            metavar="SHARE|shadow",
            help="Share of the request keys that it answers (10% or 0.1), or shadow: it decides, "
            "and never answers.",
        ),
    ],
    revision: Annotated[
        int | None,
        typer.Option(
            help="The revision to try. Default: the one that is tried already, or the newest one."
        ),
    ] = None,
    gate_limit: GateLimit = None,
    force: Force = "",
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Try a stored revision of a task, or change the share of the one that is tried.

    promptyard challenger start refunds 25%

    `register --revise --challenger` makes a new revision that is tried from the start.
    """
    with errors_for_people(as_json):
        from router.challengers import parse_share
        from trainer.challenges import start_challenge

        wanted = parse_share(share, "SHARE")
        with open_workshop(home, encoder) as workshop:
            publish_or_refuse(
                lambda: start_challenge(
                    workshop, name, wanted, revision, gate_share(gate_limit), force
                ),
                as_json,
            )


@app.command("list")
def list_challengers(home: Home = None, as_json: AsJson = False) -> None:
    """List the challengers of the newest catalog revision."""
    with errors_for_people(as_json):
        from router.catalog import CatalogReader

        with CatalogReader(home_folder(home)) as catalog:
            newest = catalog.newest_revision()
            live = {key.name: key.revision for key in catalog.live(newest)}
            found = [stored.challenge for stored in catalog.challengers(newest)]
        if as_json:
            fields = [{**challenge_fields(c), "current_revision": live[c.task]} for c in found]
            print_json({"revision": newest, "challengers": fields})
            return
        print_table(
            ["task", "current", "challenger", "share"],
            [[each.task, live[each.task], each.revision, each.share_text] for each in found],
            title=f"catalog revision {newest}: {len(found)} challengers",
        )


@app.command()
def promote(
    name: TaskName,
    gate_limit: GateLimit = None,
    force: Force = "",
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Make the challenger of a task its current revision. It passes the gate as a new task does.

    `promptyard rollback NAME` goes back.
    """
    with errors_for_people(as_json):
        from trainer.challenges import promote_challenger

        with open_workshop(home, encoder) as workshop:
            publish_or_refuse(
                lambda: promote_challenger(workshop, name, gate_share(gate_limit), force), as_json
            )


@app.command()
def end(
    name: TaskName,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Try the challenger of a task no more. Its record and files stay."""
    with errors_for_people(as_json):
        from trainer.challenges import end_challenge

        with open_workshop(home, encoder) as workshop:
            print_published(end_challenge(workshop, name), as_json)
