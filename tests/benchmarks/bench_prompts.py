"""What soft prompts are worth beside the alternatives, on the 15 tasks of `cl15`.

    PROMPTYARD_BENCH_DATA=/path/to/data make bench-prompts
    python tests/benchmarks/bench_prompts.py --parts tuning-speed serving-speed --out speed.json
    python tests/benchmarks/bench_prompts.py --merge docs/benchmarks/prompts.json speed.json

Each part can be run alone, in several processes (by `--tasks`, `--methods` or `--first-seed`), and
writes its file after every figure; `--merge` makes `docs/benchmarks/prompts.md` and `.json` of the
files. Prompts and models are trained on `train` rows and chosen on `dev` rows; `test` rows are only
scored.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_base_model import (
    BASE_MODEL,
    DATA_VARIABLE,
    device_name,
    find_data,
    read_tasks,
    report,
)
from prompts_accuracy import accuracy, data_size
from prompts_comparison import comparison, costs, forgetting
from prompts_page import page
from prompts_plan import RATES, Bench, Record
from prompts_sets import context, safety
from prompts_speed import serving_speed, tuning_speed

from router.backends.language_model import fingerprint

REPORTS = Path(__file__).parents[2] / "docs" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Part:
    """What measures it, and how much of everything it takes where nothing else is said.

    `of_cl15`: it is about the 15 tasks, and needs their file.
    """

    measure: Callable[[Bench], Iterator[Record]]
    steps: int
    tasks: tuple[str, ...] = ()
    rows: int | None = None
    of_cl15: bool = True


def stream(bench: Bench) -> Iterator[Record]:
    """See `prompts_stream.stream`: the only part that needs the router, and what it depends on."""
    from prompts_stream import stream as measure

    yield from measure(bench)


PARTS: Mapping[str, Part] = {
    "tuning-speed": Part(tuning_speed, 100, rows=500),
    "serving-speed": Part(serving_speed, 1, rows=500),
    "costs": Part(costs, 20, ("agnews",)),
    "comparison": Part(comparison, 300, ("MNLI", "IMDB", "SST-2", "agnews")),
    "forgetting": Part(forgetting, 150),
    "accuracy": Part(accuracy, 400),
    "stream": Part(stream, 150, rows=500),
    "data-size": Part(data_size, 150, ("MNLI", "QQP", "IMDB", "SST-2", "dbpedia", "agnews")),
    "context": Part(context, 300, of_cl15=False),
    "safety": Part(safety, 150, of_cl15=False),
}


def steps_by_part(words: Sequence[str]) -> dict[str, int]:
    """The steps of each part that `words` name: `80` for all of them, `costs=20` for one.

    Raises:
        ValueError: no such part, or no number.
    """
    found: dict[str, int] = {}
    for word in sorted(words, key=lambda word: "=" in word):
        part, equals, steps = word.rpartition("=")
        if equals and part not in PARTS:
            raise ValueError(part)
        found |= dict.fromkeys([part] if equals else PARTS, int(steps))
    return found


def main() -> int:
    """Measure and write, or put files together. Returns the exit status."""
    options = parse_arguments()
    if options.merge:
        return merge(options.merge, options.reports)
    path = find_data() if any(PARTS[name].of_cl15 for name in options.parts) else None
    if path is None and any(PARTS[name].of_cl15 for name in options.parts):
        return 2
    torch.set_float32_matmul_precision("high")
    done: list[dict[str, object]] = []
    for name in options.parts:
        for state in run(name, path, options):
            write_json(options.out, [*done, state])
        done.append(state)
    return 0


def run(name: str, path: Path | None, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Measure a part; what is known of it after each figure."""
    began = time.perf_counter()
    part = PARTS[name]
    given = {"tasks": options.tasks or list(part.tasks), "rows": options.rows or part.rows}
    chosen = argparse.Namespace(**{**vars(options), **given, "data": path})
    tasks = read_tasks(path, chosen) if path is not None and part.of_cl15 else []
    bench = Bench(chosen, tasks, options.steps.get(name, part.steps))
    records: list[Record] = []
    state: dict[str, object] = {
        "part": name,
        "command": f"{f'{DATA_VARIABLE}=DATA ' if path else ''}{shlex.join(['python', *sys.argv])}",
        "complete": False,
        "base_model": base_model(options.model),
        "environment": environment(options),
        "settings": {
            "tasks": [task.job.name for task in bench.tasks],
            "steps": bench.steps,
            **{key: getattr(chosen, key) for key in _SETTINGS},
        },
        "records": records,
    }
    for record in part.measure(bench):
        records.append(record)
        state["seconds"] = time.perf_counter() - began
        report(f"{name}: {json.dumps(record)}", began)
        yield state
    state["complete"] = True
    yield state


_SETTINGS = (
    *("rows", "dev_rows", "test_rows", "length", "rows_per_step", "validations", "rates"),
    *("rate", "repeats", "serving_rows", "new_tokens", "bf16", "seeds", "first_seed", "methods"),
)


def base_model(name_or_folder: str) -> dict[str, str]:
    """What it is called, and its fingerprint where it is a folder."""
    folder = Path(name_or_folder)
    digest = {"fingerprint": fingerprint(folder)} if folder.is_dir() else {}
    return {"name": folder.name if digest else name_or_folder, **digest}


def environment(options: argparse.Namespace) -> dict[str, object]:
    """What it was measured on."""
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ("torch", "transformers", "peft")
    return {
        "device": device_name(torch.device(kind)),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def merge(files: Sequence[Path], folder: Path) -> int:
    """Write the page and the figures of all measurements in `files`.

    What was cut short makes way for what was not, of the same part on the same device with all of
    its methods.
    """
    measurements = []
    for file in files:
        measurements += json.loads(file.read_text(encoding="utf-8"))
    whole = [each for each in measurements if each["complete"]]
    measurements = [
        each
        for each in measurements
        if each["complete"] or not any(_covers(other, each) for other in whole)
    ]
    for each in measurements:
        each["command"] = re.sub(r" --out \S+", "", each["command"])
    measurements.sort(key=lambda each: list(PARTS).index(each["part"]))  # stable: in given order
    write_json(folder / "prompts.json", measurements)
    (folder / "prompts.md").write_text(page(measurements, list(PARTS)), encoding="utf-8")
    print(f"{folder / 'prompts.md'}, {folder / 'prompts.json'}")
    return 0


def _covers(whole: Mapping[str, Any], short: Mapping[str, Any]) -> bool:
    return (
        whole["part"] == short["part"]
        and whole["environment"]["device"] == short["environment"]["device"]
        and set(whole["settings"]["methods"]) >= set(short["settings"]["methods"])
    )


def write_json(path: Path, measurements: Sequence[Mapping[str, object]]) -> None:
    """All or nothing, so that a file is whole whenever the run is cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(measurements, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    add("--merge", nargs="+", type=Path, metavar="FILE", help="measure nothing, join these files")
    add(
        "--out", type=Path, default=Path("build/bench_prompts.json"), help="the figures of this run"
    )
    add("--reports", type=Path, default=REPORTS, help="folder of the page")
    add("--model", default=str(BASE_MODEL), help="folder or hub name of the base model")
    add("--device", default="auto")
    add("--threads", type=int, default=None)
    add("--bf16", action="store_true", help="autocast training and scoring to bfloat16")
    add("--tasks", nargs="+", default=[], help="only these tasks (what suits the part)")
    add("--methods", nargs="+", choices=RATES, default=list(RATES), help="only these methods")
    add(
        "--rows",
        type=int,
        default=None,
        help="train rows a task at most (all, or what suits the part)",
    )
    add("--dev-rows", type=int, default=200, help="dev rows a task at most")
    add("--test-rows", type=int, default=500, help="test rows a task at most")
    add("--length", type=int, default=20, help="virtual tokens")
    add(
        "--steps",
        nargs="+",
        default=[],
        metavar="N|PART=N",
        help="steps of training, of all parts or of one (what suits the part)",
    )
    add("--rows-per-step", type=int, default=16, help="rows a task and step")
    add("--validations", type=int, default=4, help="how often dev rows are tried")
    add("--rates", type=int, default=2, choices=(1, 2, 3), help="learning rates tried a method")
    add("--rate", type=float, default=0.03, help="learning rate where only speed is measured")
    add("--sizes", nargs="+", type=int, default=[8, 16, 64, 256, 0], help="train rows; 0 for all")
    add("--seeds", type=int, default=3)
    add("--first-seed", type=int, default=0)
    add("--repeats", type=int, default=3, help="of every time")
    add("--orders", nargs="+", default=[], help="only these orders of the stream (all)")
    add("--serving-rows", type=int, default=64, help="rows served in one batch")
    add("--new-tokens", type=int, default=8, help="of an answer at most")
    options = parser.parse_args()
    try:
        options.steps = steps_by_part(options.steps)
    except ValueError as error:
        parser.error(f"--steps: {error}; write 80, or costs=20 for one of {', '.join(PARTS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
