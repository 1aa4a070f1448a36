"""The command that shows the whole job: demo."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from router.decision import Outcome
from router.settings import DEFAULT_BASE_MODEL
from trainer.cli.console import (
    EXIT_FAILED,
    chosen_home,
    err,
    errors_for_people,
    fail_of_server,
    out,
    print_table,
    progress_bars,
)

if TYPE_CHECKING:
    from router.tasks import TaskRecord
    from trainer.demo_result import Answered, DemoResult

_SHOWN_PER_TASK = 3
_SHOWN_CHARACTERS = 70


def add_to(app: typer.Typer) -> None:
    """Mount the command."""
    app.command("demo")(demo)


def demo(
    home: Annotated[
        Path | None,
        typer.Option(
            callback=chosen_home, help="An empty folder to keep. Default: a temporary one."
        ),
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Show every held-out input.")] = False,
) -> None:
    """Watch the whole job happen, with real parts, and check every claim.

    Registers nine tasks from the examples that come with the install, starts the real server,
    routes and answers held-out inputs over gRPC, and registers a tenth task while it runs.
    Leaves with 1 where a claim does not hold.
    """
    with errors_for_people(), tempfile.TemporaryDirectory(prefix="promptyard-") as temporary:
        from router.bootstrap import load_base_model, load_encoder
        from router.client import RouterError
        from trainer.demo import run_demo

        base_model = load_base_model(DEFAULT_BASE_MODEL)
        if base_model is None:  # pragma: no cover - a name was given
            raise typer.Exit(EXIT_FAILED)
        try:
            with progress_bars() as progress:
                result = run_demo(
                    home or Path(temporary), load_encoder(), base_model, progress, err.print
                )
        except RouterError as error:
            fail_of_server("the demo's server", error)
        print_result(result, show_all)
        if not result.passed:
            raise typer.Exit(EXIT_FAILED)


def print_result(result: DemoResult, show_all: bool) -> None:
    """Everything that the demo found, as tables; with `show_all` every held-out input."""
    print_table(
        ["task", "outputs", "validation", "majority", "instruction", "no prompt"],
        [
            [
                record.name,
                "free text" if record.outputs is None else len(record.outputs),
                *_scores(record),
            ]
            for record in result.registered.records
        ],
        title=f"registered in {result.tuning_seconds:.0f} s",
    )
    for name, error in result.failures.items():
        out.print(f"{name} was refused, and its inputs count as wrong: {error}", markup=False)
    shown = [a for a in result.answered if show_all or not (a.right and a.rightly_routed)]
    if not show_all:
        shown = _sample(result.answered) + shown
    _print_answers(
        "held-out inputs: three a task" + ("" if show_all else ", then all wrong ones"), shown
    )
    _print_accuracy(result)
    _print_out_of_scope(result)
    if result.live is not None:
        _print_answers(f"registered live: {result.live.task}", result.live.answered[:5])
    print_table(
        ["claim", "found", ""],
        [[claim, found, "ok" if holds else "FAILED"] for claim, found, holds in result.checks],
        title=f"checked in {result.seconds:.0f} s",
    )


def _scores(record: TaskRecord) -> list[str]:
    scores = record.prompt.scores if record.prompt else {}
    columns = ("prompt", "majority", "instruction", "no_prompt")
    return [f"{scores[name]:.0%}" if name in scores else "-" for name in columns]


def _sample(answered: Sequence[Answered]) -> list[Answered]:
    seen: dict[str, int] = {}
    sample = []
    for item in answered:
        seen[item.row.task] = seen.get(item.row.task, 0) + 1
        if seen[item.row.task] <= _SHOWN_PER_TASK:
            sample.append(item)
    return sample


def _print_answers(title: str, rows: Sequence[Answered]) -> None:
    print_table(
        ["input", "routed to", "score", "answer", "expected", ""],
        [
            [
                _short(a.row.input),
                a.decision.task.name if a.decision.task else a.decision.outcome.value,
                a.decision.score,
                a.answer or "-",
                a.row.output,
                "right" if a.right else "wrong",
            ]
            for a in rows
        ],
        title=title,
    )


def _print_accuracy(result: DemoResult) -> None:
    from trainer.demo_result import share

    tasks = sorted({a.row.task for a in result.answered})
    groups = [(name, [a for a in result.answered if a.row.task == name]) for name in tasks]
    groups.append(("all", list(result.answered)))
    print_table(
        ["task", "rows", "routing", "routed answers", "with rejection", "oracle's task"],
        [
            [
                name,
                len(group),
                f"{share([a.rightly_routed for a in group]):.1%}",
                f"{share([a.routed_right for a in group]):.1%}",
                f"{share([a.right for a in group]):.1%}",
                f"{share([a.oracle_right for a in group]):.1%}",
            ]
            for name, group in groups
        ],
        title="accuracy on held-out inputs",
    )
    out.print(
        "routed answers are under the prompt of the best-scoring task, before rejection; "
        "with rejection, inputs that were rejected count as wrong"
    )
    out.print(f"routing by TF-IDF + logistic regression, same rows: {result.tfidf_routing:.1%}")
    out.print(f"answers of the base model with no prompt: {result.no_prompt:.1%}")
    out.print(
        "answers under the oracle's prompt alone, with no label classifier beside it: "
        f"{result.prompt_alone:.1%}"
    )


def _print_out_of_scope(result: DemoResult) -> None:
    kinds = [("near a task", True), ("far from all", False)]
    print_table(
        ["out-of-scope texts", "unknown", "ambiguous", "matched"],
        [
            [label, *(_count(result, near, outcome) for outcome in _OUTCOMES)]
            for label, near in kinds
        ],
    )
    matched = [row for row in result.out_of_scope if not row.rejected]
    if matched:
        print_table(
            ["out of scope, yet matched", "routed to", "score"],
            [
                [
                    _short(r.input),
                    r.decision.task.name if r.decision.task else "-",
                    r.decision.score,
                ]
                for r in matched
            ],
        )


_OUTCOMES = (Outcome.UNKNOWN, Outcome.AMBIGUOUS, Outcome.MATCHED)


def _count(result: DemoResult, near: bool, outcome: Outcome) -> int:
    return sum(bool(r.near) == near and r.decision.outcome is outcome for r in result.out_of_scope)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
