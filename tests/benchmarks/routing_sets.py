"""The data sets of `bench_routing.py`: what is trained on, and what is tested with."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OUT_OF_SCOPE = "oos"
TEST_ROWS_PER_TASK = 500

Rows = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Rows (text, task) to train on and to test with; those of the task `oos` are out of scope."""

    name: str
    train: Rows
    test: Rows


def drawn(train: Rows, rows: int, seed: int) -> Rows:
    """`rows` rows of each task."""
    rng = np.random.default_rng(seed)
    of_task: dict[str, list[str]] = defaultdict(list)
    for text, task in train:
        of_task[task].append(text)
    return [
        (of_task[task][row], task)
        for task in sorted(of_task)
        for row in rng.permutation(len(of_task[task]))[:rows]
    ]


def read_clinc150(folder: Path) -> DataSet:
    """150 intents: training and validation rows; test rows in and out of scope."""
    rows = list(_rows(folder / "routing" / "clinc150_full.jsonl.gz"))
    train = [r for r in rows if r["split"] != "test" and r["label"] != OUT_OF_SCOPE]
    return DataSet("CLINC150, 150 intents", _pairs(train), _pairs(_test(rows)))


def read_banking77(folder: Path) -> DataSet:
    """77 intents of a bank."""
    rows = list(_rows(folder / "routing" / "banking77.jsonl.gz"))
    train = [r for r in rows if r["split"] == "train"]
    return DataSet("Banking77, 77 intents", _pairs(train), _pairs(_test(rows)))


def read_hwu64(folder: Path) -> DataSet:
    """64 intents of a home assistant: training and development rows."""
    rows = list(_rows(folder / "routing" / "hwu64.jsonl.gz"))
    train = [r for r in rows if r["split"] != "test"]
    return DataSet("HWU64, 64 intents", _pairs(train), _pairs(_test(rows)))


def read_cl15(folder: Path) -> DataSet:
    """The 15-task benchmark: training and development rows, at most 500 test rows a task."""
    rows = list(_rows(folder / "cl" / "cl15.jsonl.gz"))
    test, seen = [], defaultdict(int)
    for row in _test(rows):
        seen[row["task"]] += 1
        if seen[row["task"]] <= TEST_ROWS_PER_TASK:
            test.append(row)
    train = [r for r in rows if r["split"] != "test"]
    keys = ("input", "task")
    return DataSet("cl15, 15 tasks of different kinds", _pairs(train, *keys), _pairs(test, *keys))


READERS = {
    "clinc150": read_clinc150,
    "banking77": read_banking77,
    "hwu64": read_hwu64,
    "cl15": read_cl15,
}


def _rows(path: Path) -> Iterable[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _test(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["split"] == "test"]


def _pairs(rows: Iterable[dict[str, str]], text: str = "text", task: str = "label") -> Rows:
    return [(row[text], row[task]) for row in rows]
