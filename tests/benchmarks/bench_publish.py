"""What publishing one more task takes in a small catalog and in a large one: `make bench-publish`.

Tasks of 20 rows each, drawn around pairs of real embeddings (those of the example tasks' inputs by
the embedded encoder), so that they lie as tasks do. Nothing is tuned. Measured are

- a publish in a process that has published the others: it compiles and calibrates the head,
  measures what the new task does to the others, writes the head and appends to the catalog. Nothing
  is embedded while the clock runs;
- the command `promptyard register NAME --data FILE --no-prompt`, from its start to its end: a new
  process, which loads the encoder and embeds 20 rows, too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from router.backends.onnx_encoder import OnnxMiniLM
from router.interfaces import FloatArray
from router.tasks import DataSummary, TaskRecord
from router.threads import one_blas_thread
from trainer.commands import PolicyChange
from trainer.gate import DEFAULT_GATE_LIMIT
from trainer.register import store_rows
from trainer.workshop import Workshop

EXAMPLES = Path(__file__).parents[2] / "trainer" / "examples"
ROWS = 20
SMALL = 10
REPEATS = 5
_SPREAD = 0.35
_AT_ONCE = 1000


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000, help="of the large catalog")
    parser.add_argument("--heads", nargs="+", default=["nearest-mean", "lda", "auto"])
    options = parser.parse_args()
    encoder = OnnxMiniLM()
    real = encoder.encode(example_inputs()).vectors
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {REPEATS}: seconds, and"
        " of the processors"
    )
    print("| head | tasks before | publish | | `promptyard register` | | head, MB |")
    print("|---|---|---|---|---|---|---|")
    for head in options.heads:
        with (
            tempfile.TemporaryDirectory() as folder,
            Workshop(Path(folder) / "home", encoder) as workshop,
            one_blas_thread(),
        ):
            known = 0
            found = []
            for size in (SMALL, options.tasks):
                while known < size:
                    count = min(size - known, _AT_ONCE)
                    publish(workshop, real, range(known, known + count), head, gate=False)
                    known += count
                published = [
                    publish(workshop, real, range(known + n, known + n + 1), head, gate=True)
                    for n in range(REPEATS)
                ]
                known += REPEATS
                seconds, busy, size_mb = np.median(published, axis=0)
                commands = [register(workshop.home, f"{size}-{n}", n) for n in range(REPEATS)]
                found.append((seconds, busy, *np.median(commands, axis=0)))
                times = " | ".join(f"{value:.2f}" for value in found[-1])
                print(f"| {head} | {size} | {times} | {size_mb:.1f} |", flush=True)
            ratios = " | ".join(f"{large / small:.1f}" for small, large in zip(*found, strict=True))
            print(f"| {head} | times as long | {ratios} | |", flush=True)


def register(home: Path, name: str, number: int) -> tuple[float, float]:
    """Register rows of the example tasks; returns seconds, and seconds of all processors."""
    inputs = example_inputs()
    rows = [inputs[(number + place * 61) % len(inputs)] for place in range(ROWS)]
    data = home.parent / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"input": text}) + "\n" for text in rows), encoding="utf-8")
    command = ["register", name, "--home", str(home), "--data", str(data), "--no-prompt"]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "trainer.cli", *command, "--force", "rows of many tasks"],
        capture_output=True,
        text=True,
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise SystemExit(run.stderr)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, busy


def example_inputs() -> list[str]:
    """The inputs of the example tasks."""
    return [
        json.loads(line)["input"]
        for file in sorted(EXAMPLES.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]


def publish(
    workshop: Workshop, real: FloatArray, numbers: Sequence[int], head: str, *, gate: bool
) -> tuple[float, float, float]:
    """Publish drawn tasks; returns seconds, seconds of all processors, and the head's size."""
    records = tuple(drawn_task(workshop, real, number) for number in numbers)
    began, busy = time.perf_counter(), time.process_time()
    published = workshop.publish(
        "register",
        records=records,
        live={record.name: 1 for record in records},
        change=PolicyChange(head=head),
        gate_limit=DEFAULT_GATE_LIMIT if gate else None,
        force="a drawn task may lie anywhere" if gate else "",
    )
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return seconds, busy, published.head_bytes / 1e6


def drawn_task(workshop: Workshop, real: FloatArray, number: int) -> TaskRecord:
    """A task of `ROWS` rows around a place between two embeddings."""
    rng = np.random.default_rng(number)
    first, second = real[rng.integers(len(real), size=2)]
    center = first + 0.5 * second
    noise = rng.normal(size=(ROWS, len(center))) / len(center) ** 0.5
    rows = center / np.linalg.norm(center) + _SPREAD * noise
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return TaskRecord(
        name=f"task-{number:06}",
        revision=1,
        created_at="2026-11-24T01:02:03.456+00:00",
        description="",
        instruction="",
        outputs=None,
        data=DataSummary("d" * 64, ROWS, ROWS, 0),
        encoder=workshop.encoder.fingerprint,
        embeddings_sha256=store_rows(workshop, rows.astype(np.float32)),
    )


if __name__ == "__main__":
    main()
