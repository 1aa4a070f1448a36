"""What a head of many tasks takes: to make, to write, to load, to hold and to search.

    PROMPTYARD_BENCH_DATA=/path/to/data python tests/benchmarks/bench_scale.py --output FOLDER

Tasks are drawn around pairs of real embeddings: of the texts of three public data sets where
PROMPTYARD_BENCH_DATA is set, else of the example tasks' inputs. A task's mean is that of 20 rows
which spread as real texts differ from each other; a query is one more such row of some task, so
that it has a best task to be found. Rows of the head are fitted by the product's own fitters, from
moments without stored rows: a million tasks of 20 rows would be 90 GB. What publishing takes of a
catalog with rows, gate and calibration is measured by `make bench-publish`.

Every size is measured in processes of its own: one makes and writes the head, one loads it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from bench_publish import example_inputs
from numpy.typing import NDArray
from routing_sets import read_banking77, read_clinc150, read_hwu64

from router.approximate_index import LEAST_ROWS, ApproximateIndex
from router.backends.onnx_encoder import OnnxMiniLM
from router.background import measure_background
from router.compiling import HEAD_KINDS
from router.fitting import (
    Background,
    Fitter,
    combine,
    fit_nearest_mean,
    general_precision,
    lda_fitter,
    shared_by_tasks,
)
from router.head import Head
from router.interfaces import FloatArray
from router.snapshot import Snapshot
from router.statistics import FIXED_POINT, Moments
from router.tasks import TaskKey
from router.threads import one_blas_thread

DATA_VARIABLE = "PROMPTYARD_BENCH_DATA"
HEADS = [kind for kind in HEAD_KINDS if kind != "auto"]
SIZES = [10, 1_000, 10_000, 100_000, 1_000_000]
ROWS = 20
QUERIES = 300
# The tasks whose rows say what all tasks share.
_SHARED_TASKS = 2_000
_SPREAD = 0.5
_PIECE = 10_000
# What the discriminant's terms count where no stored rows weigh them.
_WEIGHTS = (0.25, 0.25)
_MB = 1e6


def main() -> int:
    """Measure, and print a table."""
    options = parse_arguments()
    if options.step:
        print(json.dumps(STEPS[options.step](options.folder, options.head, options.tasks)))
        return 0
    found = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        np.save(Path(folder) / "real.npy", real_embeddings())
        for tasks in options.sizes:
            for head in options.heads:
                figures = {"head": head, "tasks": tasks}
                for step in STEPS:
                    figures |= measured_apart(step, Path(folder), head, tasks)
                found.append(figures)
                print(json.dumps(figures), file=sys.stderr, flush=True)
    page = page_of(found)
    print(page)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "scale.md").write_text(page, encoding="utf-8")
        (options.output / "scale.json").write_text(
            json.dumps(found, indent=1) + "\n", encoding="utf-8"
        )
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=SIZES, help="numbers of tasks")
    add("--heads", nargs="+", choices=HEADS, default=HEADS)
    add("--output", type=Path, help="write scale.md and scale.json into this folder")
    add("--scratch", type=Path, help="where heads are written: 5 GB for a million tasks")
    add("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--head", help=argparse.SUPPRESS)
    add("--tasks", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured_apart(step: str, folder: Path, head: str, tasks: int) -> dict[str, float]:
    """The figures of a step, measured in a process of its own."""
    asked = ["--step", step, "--folder", str(folder), "--head", head, "--tasks", str(tasks)]
    done = subprocess.run(
        [sys.executable, __file__, *asked], check=True, stdout=subprocess.PIPE, text=True
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def real_embeddings() -> FloatArray:
    """The embeddings `[N, D]` that tasks are drawn around."""
    folder = os.environ.get(DATA_VARIABLE)
    texts = example_inputs()
    if folder:
        sets = [read(Path(folder)) for read in (read_clinc150, read_banking77, read_hwu64)]
        texts = [text for one in sets for text, _ in one.train]
    return OnnxMiniLM().encode(texts).vectors


def drawn_rows(real: FloatArray, tasks: NDArray[np.int64], rows: int, first: int) -> FloatArray:
    """Rows `[K, rows, D]` of tasks; `first` tells rows of a task from others of it."""
    found = np.empty((len(tasks), rows, real.shape[1]), np.float32)
    for into, task in zip(found, tasks.tolist(), strict=True):
        one, other = np.random.default_rng(task).integers(len(real), size=2)
        center = real[one] + 0.5 * real[other]
        center /= np.linalg.norm(center)
        there, back = np.random.default_rng((task, first)).integers(len(real), size=(2, rows))
        into[:] = center + _SPREAD * (real[there] - real[back])
    found /= np.linalg.norm(found, axis=2, keepdims=True)
    return found


def drawn_moments(real: FloatArray, tasks: NDArray[np.int64], *, with_gram: bool) -> Moments:
    """The moments of tasks; without the second moment where a fit takes that from elsewhere."""
    dimension = real.shape[1]
    gram = np.zeros((dimension, dimension))
    sums = np.empty((len(tasks), dimension))
    for start in range(0, len(tasks), 500):
        rows = drawn_rows(real, tasks[start : start + 500], ROWS, 0)
        sums[start : start + len(rows)] = rows.sum(1)
        if with_gram:
            flat = rows.reshape(-1, dimension).astype(np.float64)
            gram += flat.T @ flat
    sums *= FIXED_POINT
    counts = np.full(len(tasks), float(ROWS))
    return Moments(counts, sums, np.arange(len(tasks)), gram * FIXED_POINT**2)


def fitter_for(kind: str, moments: Moments, background: Background) -> Fitter:
    """The fitter of a kind of head, which takes what tasks share from `moments`."""
    if kind == "nearest-mean":
        return fit_nearest_mean
    return lda_fitter(
        background,
        with_cosine=False,
        single=True,
        general=general_precision(moments, background, single=True),
        shared=shared_by_tasks(moments, single=True),
    )


def make(folder: Path, kind: str, tasks: int) -> dict[str, float]:
    """Fit the rows of so many tasks, build the index where they are many, and write the head."""
    real = np.load(folder / "real.npy")
    weights = (1.0,) if kind == "nearest-mean" else _WEIGHTS
    with one_blas_thread():
        common = drawn_moments(real, np.arange(_SHARED_TASKS), with_gram=True)
        fitter = fitter_for(kind, common, measure_background(OnnxMiniLM()))
    rows = np.empty((tasks, real.shape[1] + 1), np.float32)
    fitting = 0.0
    for start in range(0, tasks, _PIECE):
        numbers = np.arange(start, min(start + _PIECE, tasks))
        moments = drawn_moments(real, numbers, with_gram=False)
        began = time.perf_counter()
        fit = fitter(moments)
        term = combine(fit, weights)
        rows[start : start + len(numbers)] = term.rows
        fitting += time.perf_counter() - began
    began = time.perf_counter()
    approximate = None
    if tasks >= LEAST_ROWS:
        precision = None if kind == "nearest-mean" else shared_by_tasks(common).precision
        approximate = ApproximateIndex.build(rows, precision)
    indexing = time.perf_counter() - began
    head = Head(
        kind=kind,
        encoder="drawn",
        tasks=tuple(TaskKey(f"task-{number:07}", 1) for number in range(tasks)),
        rows=rows,
        row_task=np.arange(tasks),
        thresholds=(0.0,) * tasks,
        ambiguity_margin=0.0,
        center=fit.center.astype(np.float32),
        background=None if term.offset is None else term.offset.astype(np.float32),
        held_out=np.zeros(0, np.int32),
        summary={},
        approximate=approximate,
    )
    began = time.perf_counter()
    with (folder / "head").open("wb") as file:
        for part in head.to_file():
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return {
        "fit_seconds": fitting,
        "index_seconds": indexing,
        "write_seconds": time.perf_counter() - began,
        "file_mb": (folder / "head").stat().st_size / _MB,
    }


def load(folder: Path, kind: str, tasks: int) -> dict[str, float]:
    """Load the head, and search it for queries that are rows of its tasks, one at a time."""
    real = np.load(folder / "real.npy")
    process = psutil.Process()
    before = process.memory_info().rss
    began = time.perf_counter()
    snapshot = Snapshot.build(1, Head.from_bytes((folder / "head").read_bytes()), {})
    loading = time.perf_counter() - began
    held = process.memory_info().rss - before
    chosen = np.random.default_rng(0).integers(tasks, size=QUERIES)
    queries, _ = snapshot.head.queries(drawn_rows(real, chosen, 1, 1)[:, 0])
    seconds, found = [], []
    with one_blas_thread():
        for query in queries:
            began = time.perf_counter()
            _, best = snapshot.index.search(query[None], 2)
            seconds.append(time.perf_counter() - began)
            found.append(best[0, 0])
        right = exact_best(snapshot.head.rows, queries)
        began = time.perf_counter()
        for query in queries[:10]:
            (snapshot.head.rows @ query).argmax()
        exact = (time.perf_counter() - began) / 10
    return {
        "load_seconds": loading,
        "held_mb": held / _MB,
        "lookup_ms": 1e3 * float(np.median(seconds)),
        "lookup_p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
        "exact_ms": 1e3 * exact,
        "recall": float((np.array(found) == right).mean()),
        "own_task": float((np.array(found) == chosen).mean()),
        "load_of_machine": os.getloadavg()[0],
    }


def exact_best(rows: FloatArray, queries: FloatArray) -> NDArray[np.int64]:
    """The best row of each query, of all rows."""
    best = np.full(len(queries), -np.inf, np.float32)
    found = np.zeros(len(queries), np.int64)
    for start in range(0, len(rows), _PIECE):
        scores = queries @ rows[start : start + _PIECE].T
        top = scores.argmax(1)
        value = scores[np.arange(len(queries)), top]
        found = np.where(value > best, start + top, found)
        best = np.maximum(best, value)
    return found


STEPS = {"make": make, "load": load}


def page_of(found: Sequence[dict[str, object]]) -> str:
    """The table, and how to repeat it."""
    columns = {
        "tasks": ("tasks", ",.0f"),
        "head": ("head", ""),
        "fit_seconds": ("fit, s", ".2f"),
        "index_seconds": ("index, s", ".1f"),
        "write_seconds": ("write, s", ".2f"),
        "file_mb": ("file, MB", ",.1f"),
        "load_seconds": ("load, s", ".2f"),
        "held_mb": ("held, MB", ",.0f"),
        "lookup_ms": ("lookup, ms", ".3f"),
        "lookup_p99_ms": ("99 %, ms", ".3f"),
        "exact_ms": ("all rows, ms", ".3f"),
        "recall": ("recall", ".1%"),
    }
    loads = [float(str(figures["load_of_machine"])) for figures in found]
    lines = [
        "# Scale\n",
        "\n\n".join((__doc__ or "").split("\n\n")[2:4]).strip(),
        "\n| " + " | ".join(title for title, _ in columns.values()) + " |",
        "|" + "---|" * len(columns),
    ]
    for figures in found:
        cells = [format(figures[key], form) for key, (_, form) in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Lookup is the median of {QUERIES} searches for the two best tasks, one query at a time,"
        " on one thread; recall",
        "is the share whose best task is the one that looking at all rows finds. The searched"
        " dimension is that of",
        f"the embedded encoder. From {LEAST_ROWS:,} rows on the index is approximate.",
        "",
        f"{os.cpu_count()} cores, load of the machine meanwhile {min(loads):.1f} to"
        f" {max(loads):.1f}. Repeat with `make bench-scale`, which reads {DATA_VARIABLE}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
