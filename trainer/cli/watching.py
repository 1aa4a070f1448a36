"""The command that watches a server: top."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from router.errors import InvalidInputError
from trainer.cli.console import AsJson, chosen_tenant, errors_for_people, out, print_json

if TYPE_CHECKING:
    from trainer.server_figures import Look, ServerFigures

DEFAULT_METRICS = "127.0.0.1:9464"
_MOST_DECISIONS = 15


def add_to(app: typer.Typer) -> None:
    """Mount the command."""
    app.command("top")(top)


def top(
    context: typer.Context,
    metrics: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[HOST:PORT]...",
            show_default=False,
            help="Where the server tells its metrics (`serve --metrics`); of several workers, "
            f"where each does. Default: {DEFAULT_METRICS}.",
        ),
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds that the figures are of.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show the figures once and leave.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a server does: calls, times by stage, queues, cache, decisions, memory.

    promptyard top 127.0.0.1:9464 127.0.0.1:9465

    The figures are of the last interval, and go on until Ctrl-C. With --json every interval is one
    line; with --once and --json it is one document. `promptyard --tenant NAME top` looks at one
    tenant.
    """
    with errors_for_people(as_json):
        addresses = metrics or [DEFAULT_METRICS]
        shown = _watch(addresses, chosen_tenant(context), interval)
        if once:
            figures = next(shown)
            if isinstance(figures, InvalidInputError):
                raise figures
            if as_json:
                print_json(asdict(figures))
            else:
                out.print(_view(figures))
            return
        try:
            if as_json:
                for figures in shown:
                    if isinstance(figures, InvalidInputError):
                        raise figures
                    sys.stdout.write(f"{json.dumps(asdict(figures))}\n")
                    sys.stdout.flush()
            else:
                with Live(console=out, screen=out.is_terminal, auto_refresh=False) as live:
                    for figures in shown:
                        live.update(_view(figures), refresh=True)
        except KeyboardInterrupt:
            raise typer.Exit from None


def _watch(
    addresses: list[str], tenant: str | None, interval: float
) -> Iterator[ServerFigures | InvalidInputError]:
    """The figures of every interval, or why there are none; the first look must succeed.

    Raises:
        InvalidInputError: it did not.
    """
    from trainer.server_figures import look_at, server_figures

    def look() -> list[Look]:
        return [look_at(address, tenant) for address in addresses]

    before = look()
    while True:
        time.sleep(interval)
        try:
            after = look()
        except InvalidInputError as error:
            yield error
            continue
        yield server_figures(before, after)
        before = after


def _view(figures: ServerFigures | InvalidInputError) -> Group:
    if isinstance(figures, InvalidInputError):
        return Group(f"[bold red]no figures[/]: {escape(str(figures))}")
    served = f"revision {figures.revision}"
    if figures.newest_revision != figures.revision:
        served += f" [bold red](newest: {figures.newest_revision})[/]"
    broken = figures.tasks_out_of_service
    cache = figures.cache_hit_share
    about = [
        f"{served}, {figures.tasks} tasks" + (f" [bold red]({broken} broken)[/]" if broken else ""),
        f"{figures.calls_per_second:.1f} calls/s, {figures.cores:.2f} cores,"
        f" {figures.memory_mib:.0f} MiB in {figures.processes} process"
        + ("es" if figures.processes > 1 else ""),
        "cache " + ("not asked" if cache is None else f"{cache:.0%} hits"),
    ]
    calls = _table("calls", "status", "per second")
    for call in figures.calls:
        calls.add_row(call.method, call.code, f"{call.per_second:.1f}")
    queues = _table("queue", "items", "batch")
    for queue in figures.queues:
        batch = "-" if queue.batch_items is None else f"{queue.batch_items:.1f}"
        queues.add_row(queue.queue, str(queue.items), batch)
    decisions = _table("decisions", "outcome", "per second")
    for decision in figures.decisions[:_MOST_DECISIONS]:
        task = escape(decision.task) or "(none)"
        decisions.add_row(task, decision.outcome, f"{decision.per_second:.1f}")
    left = len(figures.decisions) - _MOST_DECISIONS
    if left > 0:
        decisions.add_row(f"and {left} more", "", "")
    side_by_side = Table.grid(padding=(0, 3))
    side_by_side.add_row(calls, queues)
    times = _table("method or stage", "per second", "mean ms", "p50", "p99")
    for each in (*figures.methods, *figures.stages):
        numbers = (each.per_second, each.mean_ms, each.p50_ms, each.p99_ms)
        times.add_row(each.what, *(f"{number:.1f}" for number in numbers))
    return Group(*about, side_by_side, times, decisions)


def _table(first: str, *others: str) -> Table:
    table = Table(header_style="bold", box=None)
    table.add_column(first, no_wrap=True)
    for column in others:
        table.add_column(column, justify="left" if column in ("status", "outcome") else "right")
    return table
