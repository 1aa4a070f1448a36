"""The comparison of two revisions' decisions: kinds of change, accuracy, McNemar's test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from router.decision import Decision, Outcome
from router.errors import InvalidInputError
from router.tasks import TaskKey
from trainer.compare_revisions import (
    ComparedText,
    RevisionComparison,
    compare_decisions,
    kind_of_change,
    mcnemar,
    read_compared_texts,
)
from trainer.comparison_report import comparison_facts
from trainer.metrics import paired_difference_interval


def decision(task: str | None, outcome: Outcome = Outcome.MATCHED, revision: int = 1) -> Decision:
    key = TaskKey(task, revision) if task else None
    return Decision(outcome if key else Outcome.UNKNOWN, key, 0.5, 0.1, 0.2, 1, False)


def compare(*rows: tuple[str | None, str | None, str | None]) -> RevisionComparison:
    """Compare rows of (label, task at A, task at B)."""
    return compare_decisions(
        [ComparedText(n, f"text {n}", label) for n, (label, _, _) in enumerate(rows, start=1)],
        [decision(a) for _, a, _ in rows],
        [decision(b) for _, _, b in rows],
        revisions=(3, 4),
        tasks={"red", "blue"},
        out_of_scope_label="oos",
    )


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),
        # Twice the tail: 2 * (1 / 2**5).
        (0, 5, 2 / 2**5),
        # 2 * (C(10, 0) + C(10, 1) + C(10, 2)) / 2**10.
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (3, 3, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int, p_value: float) -> None:
    assert mcnemar(only_a, only_b).p_value == pytest.approx(p_value)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (decision("red"), decision("red"), None),
        (decision("red"), decision("red", revision=2), None),
        (decision(None), decision(None), None),
        (decision("red"), decision("blue"), "matched -> other task"),
        (decision("red"), decision(None), "matched -> unknown"),
        (decision(None), decision("red"), "unknown -> matched"),
        (decision("red"), decision("red", Outcome.AMBIGUOUS), "matched -> ambiguous"),
        (decision("red"), decision("blue", Outcome.AMBIGUOUS), "matched -> ambiguous, other task"),
        (decision("red", Outcome.AMBIGUOUS), decision("blue"), "ambiguous -> other task"),
        (decision(None), decision("blue", Outcome.AMBIGUOUS), "unknown -> ambiguous"),
    ],
)
def test_a_change_is_named_by_what_became_of_the_decision(
    before: Decision, after: Decision, kind: str | None
) -> None:
    assert kind_of_change(before, after) == kind


def test_rows_are_scored_by_what_their_labels_are() -> None:
    found = compare(
        ("red", "red", "red"),
        ("red", "red", None),
        ("blue", "red", "blue"),
        ("blue", None, "blue"),
        ("oos", "red", None),
        ("green", "red", "red"),
        (None, "red", "blue"),
    )
    assert found.labelled is not None
    assert found.labelled.rows == 4
    assert (found.labelled.accuracy_a, found.labelled.accuracy_b) == (2 / 4, 3 / 4)
    assert found.labelled.mcnemar == mcnemar(1, 2)
    assert found.labelled.difference == 1 / 4
    assert found.labelled.difference_interval == paired_difference_interval(1, 1, 2, 0)
    assert {change.text for change in found.changed} == {""}
    assert found.out_of_scope is not None
    assert (found.out_of_scope.rejected_a, found.out_of_scope.rejected_b) == (0.0, 1.0)
    assert found.unknown_labels == {"green": 1}
    assert [change.number for change in found.changed] == [2, 3, 4, 5, 7]
    assert found.kinds == {
        "matched -> other task": 2,
        "matched -> unknown": 2,
        "unknown -> matched": 1,
    }
    assert any("'green' (1)" in fact for fact in comparison_facts(found))


def test_rows_without_labels_give_the_changes_only() -> None:
    found = compare((None, "red", "red"), (None, "blue", "blue"))
    assert (found.labelled, found.out_of_scope, found.changed) == (None, None, ())
    assert comparison_facts(found)[0].startswith("Nothing changed")


def test_a_label_may_be_missing_or_empty_but_an_input_may_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    content: list[dict[str, object]] = [
        {"input": "a", "task": "red"},
        {"input": "b"},
        {"input": "c", "task": None},
        {"input": "d", "task": " "},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    texts = read_compared_texts(path, "input", "task")
    assert [text.label for text in texts] == ["red", None, None, None]
    with pytest.raises(InvalidInputError, match="row 1, field 'words'"):
        read_compared_texts(path, "words", "task")
