"""The command that looks for drift in sampled decisions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.console import (
    AsJson,
    Home,
    chosen_tenant,
    errors_for_people,
    home_folder,
    out,
    print_json,
    print_table,
)


def add_to(app: typer.Typer) -> None:
    """Mount the command."""
    app.command("drift")(drift)


def drift(
    context: typer.Context,
    log: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file of `serve --decision-log`.")
    ],
    revision: Annotated[
        int | None,
        typer.Option(
            min=1, help="Catalog revision to look at. Default: the newest one in the file."
        ),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Say which tasks' scores or volumes moved since the revision was calibrated.

    promptyard drift decisions.jsonl --json

    The scores of the texts that a task scores best for (distinct ones, at least 30, accepted or
    not) are compared with those of the held-out rows at calibration, by the Kolmogorov-Smirnov
    test at the stored quantiles; its share of the decisions in the older half of the file with
    that in the newer half, by Fisher's exact test. A task has moved where p < 0.01 after Holm's
    correction and the distance is 0.15 or more, or the shares differ by half or more.

    That something moved does not say that decisions are wrong, nor the reverse: only labelled
    rows tell (`promptyard evaluate routing`). Texts of no task at all move the tasks that they
    are nearest to. Traffic often differs from training rows from its first day on. Calibration
    knows no volumes, so that these are compared within the file alone.
    """
    with errors_for_people(as_json):
        from trainer.drift import measure_drift, read_log

        tenant = chosen_tenant(context) or ""
        found = measure_drift(list(read_log(log)), home_folder(home), tenant, revision)
        if as_json:
            print_json(asdict(found))
            return
        out.print(
            f"{found.decisions} decisions at catalog revision {found.revision}"
            f" ({found.other_revisions} at others, not used); {found.unknown:.1%} unknown,"
            f" {found.calibrated_rejected:.1%} of the held-out rows at calibration",
            highlight=False,
        )
        print_table(
            ["task", "texts", "rows", "median", "calibrated", "distance", "p", "scores"],
            [
                [
                    s.task,
                    s.texts,
                    s.rows,
                    *map(_shown, (s.median, s.calibrated_median)),
                    *map(_shown, (s.distance, s.p)),
                    _moved(s.moved, s.p),
                ]
                for s in found.scores
            ],
        )
        print_table(
            ["task", "older half", "newer half", "p", "volume"],
            [
                [v.task or "(unknown)", v.older, v.newer, v.p, _moved(v.moved, v.p)]
                for v in found.volumes
            ],
        )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _moved(moved: bool, p: float | None) -> str:
    return "moved" if moved else "too few" if p is None else "as before"
