"""Says what a comparison of two revisions found: for programs (JSON, CSV) and as tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from router.errors import StorageError, shorten
from trainer.compare_revisions import ChangedDecision, LabelledComparison, RevisionComparison
from trainer.report import Table, to_json

CHANGED_COLUMNS = (
    *("row", "input", "label", "change"),
    *("outcome_a", "task_a", "outcome_b", "task_b"),
)


def comparison_document(comparison: RevisionComparison, source: str) -> Mapping[str, object]:
    """The comparison for programs; `source` says what was routed."""
    return {"format": 1, "kind": "compare", "source": source, **asdict(comparison)}


def write_comparison(folder: Path, comparison: RevisionComparison, source: str) -> list[Path]:
    """Write report.json and changed.csv to a folder that is there; returns the files.

    Raises:
        StorageError: a file cannot be written.
    """
    report, changed = folder / "report.json", folder / "changed.csv"
    try:
        report.write_text(to_json(comparison_document(comparison, source)), encoding="utf-8")
        with changed.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(CHANGED_COLUMNS)
            writer.writerows(_cells(change) for change in comparison.changed)
    except OSError as error:
        raise StorageError(
            f"report folder {folder}", error.strerror or error, "give a writable one with --report"
        ) from error
    return [report, changed]


def comparison_facts(comparison: RevisionComparison) -> list[str]:
    """Sentences about the comparison as a whole."""
    changed, rows = len(comparison.changed), comparison.rows
    facts = [f"{changed} of {rows} inputs are decided differently."]
    if not changed:
        facts = [f"Nothing changed: all {rows} inputs are decided alike."]
    if comparison.labelled is None:
        facts.append("No row is labelled with a task of either revision: accuracy is not measured.")
    if comparison.unknown_labels:
        named = ", ".join(f"{label!r} ({n})" for label, n in comparison.unknown_labels.items())
        facts.append(
            f"Rows not scored, as their label is a task of neither revision: {named}. "
            "Register them, or say with --oos-label which label is out of scope."
        )
    return facts


def summary_table(comparison: RevisionComparison) -> Table:
    """The figures at both revisions, McNemar's test, and the counts by kind of change."""
    rows = [[kind, "", "", str(count)] for kind, count in comparison.kinds.items()]
    unknown, labelled = comparison.out_of_scope, comparison.labelled
    if unknown is not None:
        shares = _percent(unknown.rejected_a), _percent(unknown.rejected_b)
        rows.insert(0, ["out-of-scope rows rejected", *shares, f"{unknown.rows} rows"])
    if labelled is not None:
        test = labelled.mcnemar
        shares = _percent(labelled.accuracy_a), _percent(labelled.accuracy_b)
        only = str(test.right_only_at_a), str(test.right_only_at_b)
        rows[:0] = [
            ["accuracy with rejection", *shares, f"{labelled.rows} rows"],
            ["difference", "", _points(labelled.difference), _points_interval(labelled)],
            ["right at this one only", *only, f"McNemar's exact p = {test.p_value:.3g}"],
        ]
    columns = ("", f"at {comparison.revision_a}", f"at {comparison.revision_b}", "")
    return Table("Summary", columns, rows)


def changed_table(comparison: RevisionComparison) -> Table:
    """The inputs whose decision changed, in the order of the file, with their texts if known."""
    with_text = any(change.text for change in comparison.changed)
    columns = (
        *("row", *(["input"] if with_text else []), "label", "change"),
        *(f"at {comparison.revision_a}", f"at {comparison.revision_b}"),
    )
    rows = []
    for change in comparison.changed:
        text = [shorten(change.text)] if with_text else []
        about = [str(change.number), *text, change.label or "", change.kind]
        rows.append([*about, change.task_a or "unknown", change.task_b or "unknown"])
    return Table("Changed decisions", columns, rows)


def _cells(change: ChangedDecision) -> list[str]:
    return [
        *(str(change.number), change.text, change.label or "", change.kind),
        *(change.outcome_a.value, change.task_a or ""),
        *(change.outcome_b.value, change.task_b or ""),
    ]


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}"


def _points_interval(labelled: LabelledComparison) -> str:
    interval = labelled.difference_interval
    return f"points; 95 % interval {_points(interval.low)} to {_points(interval.high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
