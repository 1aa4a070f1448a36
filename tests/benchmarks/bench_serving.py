"""Serving: what a call costs, how many a server does, and what it does when there are too many.

    make bench-serving

The parts may be measured one by one (`--parts`); the page is made of all that were measured last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from router.bootstrap import load_base_model, load_encoder
from router.settings import DEFAULT_BASE_MODEL
from tests.benchmarks.serving_homes import routing_home
from tests.benchmarks.serving_page import TITLES, page
from tests.benchmarks.serving_rates import answer_rates, fast_rates, overload, routing_rates
from tests.benchmarks.serving_route import one_caller, stages

REPORTS = Path(__file__).parents[2] / "docs" / "benchmarks"


def main() -> int:
    """Measure, print and write; returns the exit status."""
    options = parse_arguments()
    encoder = load_encoder()
    with tempfile.TemporaryDirectory() as scratch:
        home = routing_home(Path(scratch) / "routing", encoder)
        measure: dict[str, Callable[[], dict]] = {
            "route": lambda: one_caller(home, encoder, options.rounds, options.semantic_router),
            "stages": lambda: stages(home, encoder, options.rounds),
            "rates": lambda: routing_rates(home, encoder, options.rounds, options.seconds),
            "fast": lambda: fast_rates(Path(scratch) / "fast", options.rounds, options.seconds),
            "generate": lambda: answer_rates(
                Path(scratch) / "answering",
                encoder,
                load_base_model(DEFAULT_BASE_MODEL),
                options.rounds,
                options.answers,
            ),
            "overload": lambda: overload(home, options.overload_seconds, options.overload_times),
        }
        store = options.output / "serving.json"
        parts = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
        for part in options.parts:
            print(f"measuring: {part}", flush=True)
            about = environment()
            parts[part] = {
                "environment": about,
                "command": command(part),
                "figures": measure[part](),
            }
            write(parts, options.output)
            print(page({part: parts[part]}).split("\n## ")[1 + list(TITLES).index(part)])
    return 0


def environment() -> dict[str, object]:
    """Where and when, and what else the machine was doing."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def command(part: str) -> str:
    """What repeats a part: the options of this run, without folders of this machine."""
    left, kept = sys.argv[1:], []
    while left:
        word = left.pop(0)
        if word == "--parts":
            while left and not left[0].startswith("--"):
                left.pop(0)
        elif word == "--output":
            left.pop(0)
        elif word == "--semantic-router":
            left.pop(0)
            kept += [word, "SITE_PACKAGES"] if part == "route" else []
        else:
            kept.append(word)
    return shlex.join(["python", "-m", "tests.benchmarks.bench_serving", "--parts", part, *kept])


def write(parts: dict[str, dict], folder: Path) -> None:
    """Write `serving.md` and `serving.json`, the parts in the order of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = {part: parts[part] for part in TITLES if part in parts}
    figures = json.dumps(ordered, indent=2)
    (folder / "serving.json").write_text(f"{figures}\n", encoding="utf-8")
    (folder / "serving.md").write_text(page(ordered), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one run of many callers")
    parser.add_argument("--answers", type=int, default=240, help="of one run of `generate`")
    parser.add_argument("--overload-seconds", type=float, default=30.0)
    parser.add_argument("--overload-times", type=float, default=5.0, help="what the server can do")
    parser.add_argument("--output", type=Path, default=REPORTS, help="folder of the reports")
    parser.add_argument(
        "--semantic-router",
        type=Path,
        metavar="DIR",
        help="packages of an environment with semantic-router 1.1.1; default: what can be imported",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
