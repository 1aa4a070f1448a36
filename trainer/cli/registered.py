"""What became of a registration, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from trainer.cli.console import (
    error_fields,
    exit_code,
    print_error,
    print_json,
    print_table,
)
from trainer.cli.published import print_effect, print_gate, summary

if TYPE_CHECKING:
    from router.tasks import TaskRecord
    from trainer.admission import Registered


def print_registered(result: Registered, as_json: bool) -> None:
    """Print what was registered and what it does to the others; leave with a code if any failed."""
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
            print_gate(gate, result.suspects)
        for name, error in failures.items():
            print_error(f"{name} was not registered", error)
    if failures:
        raise typer.Exit(max(exit_code(error) for error in failures.values()))


def _scores(record: TaskRecord) -> list[object]:
    scores = record.prompt.scores if record.prompt else {}
    columns = ("prompt", "majority", "instruction", "no_prompt")
    shown = [f"{scores[column]:.1%}" if column in scores else "-" for column in columns]
    return [record.name, record.revision, record.data.rows, *shown]
