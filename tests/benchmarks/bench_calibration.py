"""How far the probability of being right is from the truth. No test row is looked at.

    PROMPTYARD_BENCH_DATA=/path/to/data python tests/benchmarks/bench_calibration.py

Of the training rows of each intent a fifth is held out. The rest, or 10 or 5 rows of it, is what a
catalog is made of, the probability included; the expected calibration error is that of the held-out
rows. This is what the form of the probability was chosen by.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from router.background import measure_background
from router.bootstrap import load_encoder
from router.compiling import HEAD_KINDS, compile_head
from router.interfaces import Embeddings, Encoder, FloatArray
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import Policy, TaskKey
from trainer.clustering import cluster
from trainer.metrics import Reliability, reliability

DATA_VARIABLE = "PROMPTYARD_BENCH_DATA"
SETS = ("clinc150_full", "banking77", "hwu64")
ROWS_PER_TASK = (None, 10, 5)
EMBED_ROWS = 256
SEED = 7


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--heads", nargs="+", choices=HEAD_KINDS, default=HEAD_KINDS)
    options = parser.parse_args()
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        print(f"set {DATA_VARIABLE} to the folder of the data", file=sys.stderr)
        return 2
    encoder = load_encoder()
    print("| set | rows a task | head | right | probability, mean | ECE | Brier score |")
    print("|---|---|---|---|---|---|---|")
    for name in options.sets:
        intents = embedded(Path(folder) / "routing" / f"{name}.jsonl.gz", encoder)
        for rows in ROWS_PER_TASK:
            for head in options.heads:
                found, mean = measure(intents, rows, head, encoder)
                right = sum(each.right * each.rows for each in found.bins) / found.rows
                print(
                    f"| {name} | {rows or 'all'} | {head} | {right:.2%} | {mean:.2%} "
                    f"| {found.expected_calibration_error:.2%} | {found.brier_score:.4f} |",
                    flush=True,
                )
    return 0


def measure(
    intents: Mapping[str, FloatArray], rows_per_task: int | None, kind: str, encoder: Encoder
) -> tuple[Reliability, float]:
    """Hold out a fifth of each intent's rows; returns their reliability and mean probability."""
    rng = np.random.default_rng(SEED)
    pool = PooledMoments(encoder.dimension)
    tasks, held_out = [], []
    for intent, vectors in sorted(intents.items()):
        shuffled = vectors[rng.permutation(len(vectors))]
        count = max(len(shuffled) // 5, 1)
        held_out.append((intent, shuffled[:count]))
        kept = shuffled[count:][:rows_per_task]
        key = TaskKey(intent, 1)
        tasks.append(TaskStatistics(key, to_fixed_point(kept), cluster(kept)))
    pool.update(tasks)
    head = compile_head(
        pool,
        policy=Policy(head=kind),
        encoder=encoder.fingerprint,
        dimension=encoder.dimension,
        background=measure_background(encoder),
    )
    stacked = np.concatenate([vectors for _, vectors in held_out])
    truth = [intent for intent, vectors in held_out for _ in vectors]
    embeddings = Embeddings(stacked, np.zeros(len(stacked), np.bool_))
    decisions = Snapshot.build(1, head, {}).decide(embeddings, top_k=1)
    probabilities = [decision.probability or 0.0 for decision in decisions]
    right = np.array(
        [d.candidates[0].task.name == intent for d, intent in zip(decisions, truth, strict=True)]
    )
    return reliability(probabilities, right), float(np.mean(probabilities))


def embedded(path: Path, encoder: Encoder) -> dict[str, FloatArray]:
    """The embeddings `[n, D]` of the training rows of each intent."""
    rows = [row for row in read_lines(path) if row["split"] == "train" and row["label"] != "oos"]
    pieces = [
        encoder.encode([row["text"] for row in rows[start : start + EMBED_ROWS]]).vectors
        for start in range(0, len(rows), EMBED_ROWS)
    ]
    vectors, labels = np.concatenate(pieces), np.array([row["label"] for row in rows])
    return {label: vectors[labels == label] for label in np.unique(labels).tolist()}


def read_lines(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a gzipped file of JSON lines."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; check {DATA_VARIABLE}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
