"""Routing on public data sets, beside other ways to route on the same embeddings.

    PROMPTYARD_BENCH_DATA=/path/to/data make bench-routing

One configuration for all: the embedded encoder and the default head. Every task is registered as a
user would, and all in one publish; test rows are only scored. Nothing is chosen by test rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router.bootstrap import load_encoder
from router.decision import Outcome
from router.interfaces import Embeddings, Encoder, FloatArray
from router.snapshot import Snapshot
from tests.benchmarks.routing_peers import Peer, peers
from tests.benchmarks.routing_sets import OUT_OF_SCOPE, READERS, DataSet, Rows, drawn
from tests.benchmarks.routing_speed import head_in_a_call
from trainer import metrics
from trainer.commands import PolicyChange, RegisterTask
from trainer.evaluation_rows import task_names
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

DATA_VARIABLE = "PROMPTYARD_BENCH_DATA"
REPORTS = Path(__file__).parents[2] / "docs" / "benchmarks"
ONE_TASK = {"RTE": "MNLI", "CB": "MNLI"}
HEADS = ("auto", "lda", "nearest-mean")
DRAWS = 5


class RememberingEncoder:
    """An encoder that embeds every text once, and keeps the embeddings in a file if asked to."""

    def __init__(self, encoder: Encoder, file: Path | None) -> None:
        self._encoder = encoder
        self._file = file
        self._known: dict[bytes, FloatArray] = {}
        self.name, self.fingerprint = encoder.name, encoder.fingerprint
        self.dimension, self.window = encoder.dimension, encoder.window
        if file is not None and file.exists():
            with np.load(file) as kept:
                if str(kept["fingerprint"]) == self.fingerprint:
                    self._known = {
                        key.tobytes(): vector
                        for key, vector in zip(kept["keys"], kept["vectors"], strict=True)
                    }

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As the encoder."""
        return self._encoder.count_tokens(texts)

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """As the encoder. (What was cut is not remembered.)"""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        if new:
            vectors = self._encoder.encode(list(new.values())).vectors
            self._known.update(zip(new, vectors, strict=True))
        vectors = np.array([self._known[key] for key in keys], np.float32)
        return Embeddings(vectors.reshape(len(texts), -1), np.zeros(len(texts), np.bool_))

    def save(self) -> None:
        """Write the file."""
        if self._file is not None:
            keys = np.frombuffer(b"".join(self._known), np.uint8).reshape(-1, 32)
            np.savez(
                self._file,
                fingerprint=self.fingerprint,
                keys=keys,
                vectors=np.array(list(self._known.values())),
            )


@dataclass(slots=True)
class Report:
    """Lines of Markdown, and the same figures for programs."""

    lines: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)

    def table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Add rows of the same columns."""
        self.figures[title] = [dict(row) for row in rows]
        columns = list(rows[0])
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(_cell(row[column]) for column in columns)} |" for row in rows]
        self.lines += [f"## {title}", "", *lines, ""]
        print(f"{title}\n" + "\n".join(lines), flush=True)

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.lines += [text, ""]
        print(text, flush=True)


def main() -> int:
    """Measure, print and write; returns the exit status."""
    options = parse_arguments()
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        print(f"set {DATA_VARIABLE} to the folder with the data sets", file=sys.stderr)
        return 2
    encoder = RememberingEncoder(load_encoder(), options.embeddings)
    report = Report()
    others, missing = peers()
    for name in options.sets:
        data = READERS[name](Path(folder))
        print(f"{name}: {len(data.train)} training rows, {len(data.test)} test rows", flush=True)
        rows = [ours(data, encoder, head) for head in HEADS]
        left_out = [peer for peer in others if peer.is_slow and name not in options.slow_peers_on]
        rows += [theirs(data, encoder, peer) for peer in others if peer not in left_out]
        report.table(data.name, rows)
        for peer in left_out:
            report.text(f"{peer.name} was left out: it takes more than 20 minutes here.")
        encoder.save()
    if "clinc150" in options.sets:
        clinc = READERS["clinc150"](Path(folder))
        some = [text for text, _ in clinc.train[:: len(clinc.train) // 2000]]
        report.table(f"CLINC150, few rows a task (mean of {DRAWS} draws)", few_rows(clinc, encoder))
        report.table("Time of the head", head_in_a_call(load_encoder(), some, HEADS))
    if missing:
        report.text(missing)
    # Embeddings that are kept change the time it takes, and no figure.
    told = sys.argv[1:]
    if options.embeddings is not None:
        place = told.index("--embeddings")
        del told[place : place + 2]
    module = ["python", "-m", "tests.benchmarks.bench_routing"]
    command = f"{DATA_VARIABLE}=DATA {shlex.join([*module, *told])}"
    report.text(f"Repeat with `{command}`, or `make bench-routing`. {platform.platform()}.")
    write(report, options.output)
    return 0


def ours(data: DataSet, encoder: Encoder, head: str) -> dict[str, object]:
    """Register the tasks of a data set, decide its test rows, and count."""
    snapshot = registered(data.train, encoder, PolicyChange(head=head))
    labels = {name: label for label, name in task_names(task for _, task in data.train).items()}
    vectors = encoder.encode([text for text, _ in data.test])
    decisions = snapshot.decide(vectors, top_k=1)
    best = [labels[decision.candidates[0].task.name] for decision in decisions]
    scores = np.array([decision.score for decision in decisions])
    # How far over its threshold: what decides about rejection.
    over = scores - np.array([decision.threshold for decision in decisions])
    kept = np.array([decision.outcome is Outcome.MATCHED for decision in decisions])
    return {
        "way to route": f"promptyard, head `{head}`",
        **counted(data, best, scores),
        "FPR 95, over thresholds": _fpr(data, over),
        "in scope not matched": _share(~kept, data, out_of_scope=False),
        "out of scope not matched": _share(~kept, data, out_of_scope=True),
        "note": "the default" if head == HEADS[0] else "",
    }


def theirs(data: DataSet, encoder: Encoder, peer: Peer) -> dict[str, object]:
    """Train a peer on the embeddings of the training rows, decide the test rows, and count."""
    names = sorted({task for _, task in data.train})
    number = {task: n for n, task in enumerate(names)}
    tasks = np.array([number[task] for _, task in data.train])
    route = peer.train(encoder.encode([text for text, _ in data.train]).vectors, tasks)
    best, scores = route(encoder.encode([text for text, _ in data.test]).vectors)
    return {
        "way to route": peer.name,
        **counted(data, [names[task] for task in best], scores),
        "FPR 95, over thresholds": None,
        "in scope not matched": None,
        "out of scope not matched": None,
        "note": peer.note,
    }


def counted(data: DataSet, best: Sequence[str], scores: FloatArray) -> dict[str, object]:
    """Shares of right tasks before rejection, and how well scores tell what is out of scope."""
    truth = np.array([task for _, task in data.test])
    inside = truth != OUT_OF_SCOPE
    right = (truth == np.array(best))[inside]
    figures: dict[str, object] = {"right": float(right.mean())}
    if set(ONE_TASK) & set(truth):
        merged = [
            ONE_TASK.get(a, a) == ONE_TASK.get(b, b) for a, b in zip(truth, best, strict=True)
        ]
        figures["right, MNLI, RTE and CB as one"] = float(np.mean(merged))
    if not inside.all():
        apart = metrics.separation(scores[inside], scores[~inside])
        figures |= {"AUROC": apart.auroc, "FPR 95": apart.fpr_at_95_tpr}
    return figures


def few_rows(data: DataSet, encoder: Encoder) -> list[dict[str, object]]:
    """Five and ten rows a task, drawn from the training rows."""
    truth = [task for _, task in data.test if task != OUT_OF_SCOPE]
    texts = [text for text, task in data.test if task != OUT_OF_SCOPE]
    test = encoder.encode(texts)
    table = []
    for rows in (5, 10):
        shares: dict[str, list[float]] = defaultdict(list)
        for draw in range(DRAWS):
            chosen = drawn(data.train, rows, draw)
            labels = {n: label for label, n in task_names(task for _, task in chosen).items()}
            for head in HEADS:
                snapshot = registered(chosen, encoder, PolicyChange(head=head))
                best = [
                    labels[decision.candidates[0].task.name]
                    for decision in snapshot.decide(test, top_k=1)
                ]
                shares[head].append(
                    float(np.mean([a == b for a, b in zip(truth, best, strict=True)]))
                )
        table += [
            {
                "rows a task": rows,
                "head": head,
                "right": float(np.mean(shares[head])),
                "least": min(shares[head]),
                "most": max(shares[head]),
            }
            for head in HEADS
        ]
    return table


def registered(train: Rows, encoder: Encoder, change: PolicyChange) -> Snapshot:
    """The snapshot after all tasks of `train` were registered, in one publish."""
    of_task: dict[str, list[str]] = defaultdict(list)
    for text, task in train:
        of_task[task].append(text)
    names = task_names(of_task)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Workshop(Path(scratch) / "home", encoder) as shop,
    ):
        requests = []
        for task, texts in of_task.items():
            path = Path(scratch) / f"{names[task]}.jsonl"
            lines = [json.dumps({"input": text}) for text in texts]
            path.write_text("\n".join(lines), encoding="utf-8")
            requests.append(
                RegisterTask(names[task], path, with_prompt=False, drop_duplicates=True)
            )
        # Several of these tasks overlap, and all are to be measured.
        result = register(shop, requests, None, TuningSettings(), change, gate_limit=1.0)
        if result.published is None or result.failures:
            raise next(iter(result.failures.values()))
        return Snapshot.build(result.published.revision, result.published.head, {})


def write(report: Report, folder: Path) -> None:
    """Write `routing.md` and `routing.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    heading = ["# Routing", "", *(__doc__ or "").split("\n\n")[2].strip().splitlines(), ""]
    (folder / "routing.md").write_text("\n".join([*heading, *report.lines]), encoding="utf-8")
    figures = json.dumps(report.figures, indent=2)
    (folder / "routing.json").write_text(f"{figures}\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument(
        "--slow-peers-on",
        nargs="*",
        choices=READERS,
        default=list(READERS),
        help="the sets to measure semantic-router on: on cl15 it takes more than 20 minutes",
    )
    parser.add_argument("--output", type=Path, default=REPORTS, help="folder of the reports")
    parser.add_argument("--embeddings", type=Path, help="an .npz file to keep embeddings in")
    return parser.parse_args()


def _share(marked: NDArray[np.bool_], data: DataSet, *, out_of_scope: bool) -> float | None:
    chosen = np.array([(task == OUT_OF_SCOPE) == out_of_scope for _, task in data.test])
    return float(marked[chosen].mean()) if chosen.any() else None


def _fpr(data: DataSet, scores: FloatArray) -> float | None:
    inside = np.array([task != OUT_OF_SCOPE for _, task in data.test])
    if inside.all():
        return None
    return metrics.separation(scores[inside], scores[~inside]).fpr_at_95_tpr


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
