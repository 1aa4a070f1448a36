"""What became of a registration, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from trainer.cli.console import (
    error_fields,
    exit_code,
    out,
    print_error,
    print_json,
    print_table,
)
from trainer.cli.published import print_effect, summary

if TYPE_CHECKING:
    from router.tasks import TaskRecord
    from trainer.admission import Registered, SuspectInput
    from trainer.gate import GateReport


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
            _print_gate(gate, result.suspects)
        for name, error in failures.items():
            print_error(f"{name} was not registered", error)
    if failures:
        raise typer.Exit(max(exit_code(error) for error in failures.values()))


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


def _scores(record: TaskRecord) -> list[object]:
    scores = record.prompt.scores if record.prompt else {}
    columns = ("prompt", "majority", "instruction", "no_prompt")
    shown = [f"{scores[column]:.1%}" if column in scores else "-" for column in columns]
    return [record.name, record.revision, record.data.rows, *shown]
