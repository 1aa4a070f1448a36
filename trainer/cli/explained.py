"""Explanations of decisions, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.cli.console import out, print_table

if TYPE_CHECKING:
    from router.explanation import Explanation, StoredExample


def print_explanation(text: str, explanation: Explanation) -> None:
    """The sentence, the candidates with the terms of their scores, and their closest rows."""
    out.print(text, style="bold", markup=False, highlight=False)
    out.print(explanation.sentence, markup=False, highlight=False)
    candidates = explanation.candidates
    names = [term.name for term in candidates[0].terms] if candidates else []
    if candidates:
        rows: list[list[object]] = [
            ["score", *(c.score for c in candidates)],
            *(
                [f"  {name}", *(c.terms[number].value for c in candidates)]
                for number, name in enumerate(names)
            ),
            ["threshold", *(c.threshold for c in candidates)],
            ["margin", *(c.margin for c in candidates)],
            ["closest rows (cosine)", *(_rows(c.examples) for c in candidates)],
        ]
        print_table(["", *(str(c.task) for c in candidates)], rows)
    for note in explanation.notes:
        out.print(note, markup=False, highlight=False)


def _rows(examples: Sequence[StoredExample]) -> str:
    return "\n".join(f"{e.row} ({e.similarity:.2f})" for e in examples) or "-"


def explanation_fields(explanation: Explanation) -> dict[str, object]:
    """What programs are told."""
    return {
        "sentence": explanation.sentence,
        "ambiguity_margin": explanation.ambiguity_margin,
        "notes": explanation.notes,
        "candidates": [
            {
                "task": c.task.name,
                "task_revision": c.task.revision,
                "score": c.score,
                "threshold": c.threshold,
                "margin": c.margin if math.isfinite(c.margin) else None,
                "terms": {term.name: term.value for term in c.terms},
                "examples": [{"row": e.row, "similarity": e.similarity} for e in c.examples],
            }
            for c in explanation.candidates
        ],
    }
