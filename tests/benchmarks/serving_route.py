"""Parts of `bench_serving` with one caller: what a `Route` costs, and where its time goes."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from router.client import RouterClient
from router.interfaces import Encoder
from tests.benchmarks.bench_route import CALLS, contenders, median_seconds
from tests.benchmarks.peer_worker import OUR_ENCODER, THEIR_ENCODER
from tests.benchmarks.served import ROOT, Served, serving
from tests.benchmarks.serving_homes import short_texts

STAGES = ("routing_wait", "routing_work", "routing_encode", "routing_decide")


class Peer:
    """semantic-router in a process of its own, where it is installed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        answer = self._receive()
        self.version = str(answer.get("version", ""))
        self.missing = str(answer.get("missing", ""))

    def median_seconds(self, encoder: str) -> float:
        """Of one call of its router, with that encoder."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{encoder}\n")
        self._process.stdin.flush()
        return float(self._receive())

    def _receive(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of semantic-router has died; see stderr")
        return json.loads(line)


@contextlib.contextmanager
def peer(site_packages: Path | None) -> Iterator[Peer]:
    """Start it; `missing` of the result says why it cannot be measured."""
    path = [] if site_packages is None else [str(site_packages)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.peer_worker", *path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield Peer(process)
    finally:
        process.kill()
        process.communicate()


def one_caller(home: Path, encoder: Encoder, rounds: int, site_packages: Path | None) -> dict:
    """Median seconds of each contender in every round; all of them in turn."""
    texts = short_texts()
    with (
        serving(home, "--route-only") as served,
        contenders(encoder, served.address) as calls,
        peer(site_packages) as other,
    ):
        measured = []
        for _ in range(rounds):
            row = {name: median_seconds(call, texts) for name, call in calls.items()}
            if not other.missing:
                row |= {n: other.median_seconds(n) for n in (THEIR_ENCODER, OUR_ENCODER)}
            measured.append(row)
        return {
            "calls": CALLS,
            "rounds": measured,
            "semantic-router": other.version,
            "missing": other.missing,
        }


def stages(home: Path, encoder: Encoder, rounds: int) -> dict:
    """Mean seconds of the stages of one `Route` at a time, from the server's own metrics."""
    texts = short_texts()
    with (
        serving(home, "--route-only", metrics=True) as served,
        contenders(encoder, served.address) as calls,
        RouterClient(served.address) as client,
    ):
        for text in texts[:50]:
            client.route(text)
        return {
            "calls": CALLS,
            "rounds": [
                {
                    **_stages_once(served, client, texts),
                    "encoder alone": _mean(calls["encoder alone"], texts),
                    "tokenizer alone": _mean(lambda text: encoder.count_tokens([text]), texts),
                    "empty gRPC call": _mean(calls["empty gRPC call"], texts),
                }
                for _ in range(rounds)
            ],
        }


def _stages_once(served: Served, client: RouterClient, texts: list[str]) -> dict[str, float]:
    before = served.scrape()
    mean = _mean(client.route, texts)
    after = served.scrape()

    def of(family: str, label: str) -> float:
        total, count = (
            after[(f"{family}_{kind}", label)] - before.get((f"{family}_{kind}", label), 0.0)
            for kind in ("sum", "count")
        )
        if count != CALLS:
            raise RuntimeError(f"{family} {label} counted {count:g} of {CALLS} calls")
        return total / count

    found = {stage: of("promptyard_stage_seconds", stage) for stage in STAGES}
    return {"client": mean, "handler": of("promptyard_call_seconds", "Route"), **found}


def _mean(call, texts: list[str]) -> float:
    seconds = []
    for number in range(CALLS):
        began = time.perf_counter()
        call(texts[number % len(texts)])
        seconds.append(time.perf_counter() - began)
    return statistics.fmean(seconds)
