"""What a cascade saves and loses on test rows, and what loading a revision with one takes.

    PROMPTYARD_BENCH_DATA=/path/to/data python -m tests.benchmarks.bench_cascade

The intents are the tasks, all rows but the test rows are theirs, and keep their texts. The figures
are those of `evaluate routing --cascade`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from router.bootstrap import load_encoder, load_fast_model
from router.cascade import FastModel
from router.interfaces import Encoder
from tests.benchmarks.routing_sets import OUT_OF_SCOPE, READERS, DataSet
from trainer.commands import PolicyChange, RegisterTask
from trainer.evaluate_routing import RoutingEvaluation, evaluate_routing, load_snapshot
from trainer.evaluation_rows import LabelledText
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

DATA_VARIABLE = "PROMPTYARD_BENCH_DATA"


def main() -> int:
    """Measure, and print a table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=READERS, default=["clinc150", "hwu64"])
    options = parser.parse_args()
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        print(f"set {DATA_VARIABLE} to the folder of the data", file=sys.stderr)
        return 2
    encoder, fast = load_encoder(), load_fast_model()
    print(
        "| | decided by `fast` | accuracy, alone → cascade | with rejection | out of scope rejected"
        " | decided otherwise | a load in seconds: none, head published, not published |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name in options.sets:
        print(measured(READERS[name](Path(folder)), encoder, fast), flush=True)
    return 0


def measured(data: DataSet, encoder: Encoder, fast: FastModel) -> str:
    """The row of a data set in the table."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        with Workshop(home, encoder, lambda: fast) as workshop:
            result = register(
                workshop, requests(data, Path(folder)), None, TuningSettings(), gate_limit=1.0
            )
            assert not result.failures, result.failures
            workshop.publish("policy", live={}, change=PolicyChange(cascade=True))
        seconds = [
            loading_seconds(home, encoder, used, revision)
            for used, revision in ((None, 2), (fast, 2), (fast, 1))
        ]
        snapshot = load_snapshot(home, encoder, fast=fast)
        rows = [
            LabelledText(number, text, None if task == OUT_OF_SCOPE else task)
            for number, (text, task) in enumerate(data.test, start=1)
        ]
        evaluation = evaluate_routing(snapshot, encoder, rows)
    return table_row(data.name, evaluation, seconds)


def requests(data: DataSet, folder: Path) -> list[RegisterTask]:
    """Registrations of the tasks of a set, from files that are written to `folder`."""
    texts = defaultdict(list)
    for text, task in data.train:
        texts[task].append(text)
    found = []
    for number, (task, mine) in enumerate(sorted(texts.items())):
        file = folder / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"input": t, "output": task}) + "\n" for t in mine))
        found.append(
            RegisterTask(task, file, with_prompt=False, drop_duplicates=True, keep_text=True)
        )
    return found


def loading_seconds(home: Path, encoder: Encoder, fast: FastModel | None, revision: int) -> float:
    """What loading a revision takes in a process that has the encoders."""
    began = time.perf_counter()
    load_snapshot(home, encoder, revision=revision, fast=fast)
    return time.perf_counter() - began


def table_row(name: str, evaluation: RoutingEvaluation, seconds: list[float]) -> str:
    """The figures of a set."""
    alone, cascade = evaluation.routing, evaluation.cascade
    assert cascade is not None
    outside, rejected = "", ""
    if evaluation.reject is not None and cascade.out_of_scope_fast is not None:
        outside = f" ({cascade.out_of_scope_fast:.1%} of the rows out of scope)"
        rejected = (
            f"{evaluation.reject.out_of_scope_rejected:.1%} → {cascade.out_of_scope_rejected:.1%}"
        )
    return (
        f"| {name} | {cascade.decided_fast:.1%}{outside} "
        f"| {alone.accuracy:.1%} → {cascade.accuracy:.1%} "
        f"| {alone.accuracy_with_rejection:.1%} → {cascade.accuracy_with_rejection:.1%} "
        f"| {rejected} | {cascade.differing:.1%} | {', '.join(f'{s:.1f}' for s in seconds)} |"
    )


if __name__ == "__main__":
    sys.exit(main())
