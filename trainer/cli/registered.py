"""What became of a registration, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from trainer.cli.console import (
    error_fields,
    exit_code,
    out,
    print_error,
    print_table,
)
from trainer.cli.published import challenges_document, print_effect, print_gate, summary

if TYPE_CHECKING:
    from router.tasks import TaskRecord
    from trainer.admission import Registered
    from trainer.gate import GateReport


def registered_document(result: Registered) -> dict[str, object]:
    """What became of a registration, for programs."""
    gate = _gate_of(result)
    return {
        "revision": result.published.revision if result.published else None,
        "registered": [summary(record) for record in result.records],
        "failed": {name: error_fields(error) for name, error in result.failures.items()},
        "report": result.published.report if result.published else None,
        "gate": gate.document() if gate else None,
        "suspects": [asdict(suspect) for suspect in result.suspects],
        **(challenges_document(result.published) if result.published else {}),
    }


def _gate_of(result: Registered) -> GateReport | None:
    from trainer.gate import InterferenceError

    if result.published is not None and result.published.gate is not None:
        return result.published.gate
    refused = [error for error in result.failures.values() if isinstance(error, InterferenceError)]
    return refused[0].report if refused else None


def print_registered(result: Registered) -> None:
    """What became of a registration, for people."""
    if result.published is not None:
        print_table(
            [
                *("task", "revision", "rows", "metric"),
                *("prompt", "majority", "instruction", "no prompt", "classifier"),
            ],
            [_scores(record) for record in result.records],
            title=f"published catalog revision {result.published.revision}",
        )
        for record in result.records:
            _print_probabilities(record)
        print_effect(result.published)
    gate = _gate_of(result)
    if gate is not None:
        print_gate(gate, result.suspects)
    for name, error in result.failures.items():
        print_error(f"{name} was not registered", error)


def leave_if_failed(result: Registered) -> None:
    """Leave with the exit code of the worst failure, if there is one."""
    if result.failures:
        raise typer.Exit(max(exit_code(error) for error in result.failures.values()))


def _print_probabilities(record: TaskRecord) -> None:
    found = record.prompt.probabilities if record.prompt else {}
    if found:
        changes = (
            f"{kind} {found[f'{kind}_before']:.2g} before, {found[f'{kind}_after']:.2g} after"
            for kind in ("rejected", "desired")
        )
        out.print(f"{record.name}, mean probability of held-out outputs: {'; '.join(changes)}")


def _scores(record: TaskRecord) -> list[object]:
    scores = record.prompt.scores if record.prompt else {}
    columns = ("prompt", "majority", "instruction", "no_prompt")
    shown = [f"{scores[column]:.1%}" if column in scores else "-" for column in columns]
    metric = record.prompt.metric if record.prompt else "-"
    classifier = f"{record.classifier.accuracy:.1%}" if record.classifier else "-"
    return [record.name, record.revision, record.data.rows, metric, *shown, classifier]
