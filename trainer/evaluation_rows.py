"""The labelled rows that evaluation scores: read, checked, and matched with the tasks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from router.errors import InvalidInputError
from router.tasks import check_task_name
from trainer.data import MAX_INPUT_BYTES, Fields, read_cell, read_context, read_output, read_rows

DEFAULT_OUT_OF_SCOPE_LABEL = "oos"
SPLIT_FIELD = "split"
TEST_SPLIT = "test"

_MAX_LABEL_BYTES = 1024
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class EvaluationFields:
    """What the columns are called. Outputs and instructions are only read where they are named.

    `context` is only read with the outputs.
    """

    input: str = "input"
    task: str = "task"
    output: str | None = None
    instruction: str | None = None
    context: str = "context"


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One row of a file. `number` counts from 1; `task` is None for a row that is out of scope."""

    number: int
    text: str
    task: str | None
    output: str = ""
    instruction: str = ""
    split: str = ""
    context: tuple[str, ...] = ()


def read_texts(
    path: Path,
    fields: EvaluationFields,
    out_of_scope_label: str = DEFAULT_OUT_OF_SCOPE_LABEL,
) -> list[LabelledText]:
    """The rows of `path`, in its order. Out-of-scope rows need no output.

    Raises:
        InvalidInputError: missing, unreadable, or a field that is missing, empty or too long; the
            message names the file and the row.
    """
    texts = []
    for number, row in read_rows(path):
        label = read_cell(path, number, row, fields.task, _MAX_LABEL_BYTES)
        task = None if label == out_of_scope_label else label
        output = fields.output if task is not None else None
        texts.append(
            LabelledText(
                number,
                read_cell(path, number, row, fields.input, MAX_INPUT_BYTES),
                task,
                read_output(path, number, row, output) if output else "",
                str(row.get(fields.instruction) or "") if fields.instruction else "",
                str(row.get(SPLIT_FIELD) or ""),
                read_context(path, number, row, Fields(fields.input, context=fields.context))
                if output
                else (),
            )
        )
    if not texts:
        raise InvalidInputError(f"{path}", "no rows", "give a file with labelled rows")
    return texts


def match_tasks(
    path: Path, texts: Sequence[LabelledText], known: Iterable[str], *, unknown_as_oos: bool
) -> list[LabelledText]:
    """`texts`, where every task is a known one; others become out of scope, if that was asked for.

    Raises:
        InvalidInputError: a row names a task that is not known.
    """
    names = set(known)
    matched = []
    for row in texts:
        if row.task is None or row.task in names:
            matched.append(row)
        elif unknown_as_oos:
            matched.append(LabelledText(row.number, row.text, None))
        else:
            raise InvalidInputError(
                f"{path}: row {row.number}",
                f"task {row.task!r} is not in the catalog",
                "register it, name the task's column with --task-field, or pass --unknown-as-oos",
            )
    return matched


def first_of_each_task(texts: Sequence[LabelledText], most: int | None) -> list[LabelledText]:
    """The first `most` rows of each task and of those out of scope; all of them for None."""
    if most is None:
        return list(texts)
    seen: Counter[str | None] = Counter()
    kept = []
    for row in texts:
        seen[row.task] += 1
        if seen[row.task] <= most:
            kept.append(row)
    return kept


def task_names(labels: Iterable[str]) -> Mapping[str, str]:
    """A valid task name for each label: the label itself, or with `-` for what names cannot have.

    Raises:
        InvalidInputError: nothing is left of a label, it is too long, or two labels get one name.
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for label in sorted(set(labels)):
        name = check_task_name(_valid_name(label) or label)
        if name in taken:
            raise InvalidInputError(
                "task name",
                f"{name!r} for both {taken[name]!r} and {label!r}",
                "rename one of the labels: names have letters, digits, '.', '_' and '-' only",
            )
        names[label], taken[name] = name, label
    return names


def _valid_name(label: str) -> str:
    """`label` where it can be a name, otherwise what it has of one."""
    replaced = _NOT_IN_NAMES.sub("-", label)
    return label if replaced == label and label[0].isalnum() else replaced.strip("-._")
