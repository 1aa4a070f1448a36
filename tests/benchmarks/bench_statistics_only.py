"""What keeping statistics only costs: fresh rows, and rows out of scope. No test row is looked at.

    PROMPTYARD_BENCH_DATA=/path/to/data python -m tests.benchmarks.bench_statistics_only

A fifth of the intents of a set is out of scope; of the training rows of each other one a fifth is
held out as fresh rows. The rest is what a catalog is made of, in which a share of the tasks keeps
statistics only. By the `fast` encoder; means of several draws.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from router.background import measure_background
from router.bootstrap import load_encoder
from router.compiling import compile_head
from router.decision import Decision, Outcome
from router.interfaces import Embeddings, Encoder, FloatArray
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.statistics import TaskStatistics, sums_of, to_fixed_point
from router.tasks import Policy, TaskKey
from tests.benchmarks.bench_calibration import DATA_VARIABLE, embedded
from trainer.clustering import cluster

SETS = ("clinc150_full", "hwu64")
HEADS = ("auto", "nearest-mean")
SHARES = (0.0, 0.5, 0.9, 1.0)
DRAWS = 3


def main() -> int:
    """Measure, and print a table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    options = parser.parse_args()
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        print(f"set {DATA_VARIABLE} to the folder of the data", file=sys.stderr)
        return 2
    encoder = load_encoder("fast")
    print(
        "| set | head | statistics only | right | unknown, of tasks that keep rows"
        " | of the others | out of scope |\n|---|---|---|---|---|---|---|"
    )
    for name in options.sets:
        intents = embedded(Path(folder) / "routing" / f"{name}.jsonl.gz", encoder)
        for head in HEADS:
            for share in SHARES:
                draws = [measured(intents, head, share, encoder, seed) for seed in range(DRAWS)]
                found = np.mean(draws, axis=0)
                cells = " | ".join("" if np.isnan(each) else f"{each:.1%}" for each in found)
                print(f"| {name} | {head} | {share:.0%} | {cells} |", flush=True)
    return 0


def measured(
    intents: Mapping[str, FloatArray], head: str, share: float, encoder: Encoder, seed: int
) -> tuple[float, float, float, float]:
    """Shares of fresh rows that are right, and unknown (of either kind of task), and of others."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(sorted(intents)).tolist()
    outside, inside = names[: len(names) // 5], names[len(names) // 5 :]
    keeping = round((1 - share) * len(inside))
    tasks, fresh, owners = [], [], []
    for number, name in enumerate(inside):
        rows = intents[name][rng.permutation(len(intents[name]))]
        count = max(len(rows) // 5, 1)
        fresh.append(rows[:count])
        owners += [number] * count
        fixed = to_fixed_point(rows[count:])
        clusters, sums = cluster(rows[count:]), None
        if number >= keeping:
            fixed, clusters, sums = fixed[:0], clusters[:0], sums_of(fixed)
        tasks.append(TaskStatistics(TaskKey(name, 1), fixed, clusters, sums))
    pool = PooledMoments(encoder.dimension)
    pool.update(tasks)
    compiled = compile_head(
        pool,
        policy=Policy(head=head),
        encoder=encoder.fingerprint,
        dimension=encoder.dimension,
        background=measure_background(encoder),
    )
    snapshot, owner = Snapshot.build(1, compiled, {}), np.array(owners)
    decisions = decided(snapshot, np.concatenate(fresh))
    best = [decision.candidates[0].task.name for decision in decisions]
    unknown = np.array([decision.outcome is Outcome.UNKNOWN for decision in decisions])
    others = decided(snapshot, np.concatenate([intents[name] for name in outside]))
    return (
        float(np.mean([inside[n] == name for n, name in zip(owners, best, strict=True)])),
        float(unknown[owner < keeping].mean()) if keeping else np.nan,
        float(unknown[owner >= keeping].mean()) if keeping < len(inside) else np.nan,
        float(np.mean([decision.outcome is Outcome.UNKNOWN for decision in others])),
    )


def decided(snapshot: Snapshot, vectors: FloatArray) -> list[Decision]:
    """The decisions on embeddings, each with its best candidate."""
    return snapshot.decide(Embeddings(vectors, np.zeros(len(vectors), np.bool_)), top_k=1)


if __name__ == "__main__":
    sys.exit(main())
