"""A mixed load for long, while tasks are registered, revised, retired and restored.

    make soak

Checked: no call fails; every response names a revision of the catalog, and tasks that were live in
it, at the revision of theirs that was live; decisions are those that the catalog's revision makes
of the same text, computed here; memory does not grow once the server is warm.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from router.backends.torch_model import TorchLanguageModel
from router.background import measure_background
from router.bootstrap import load_base_model, load_encoder
from router.client import RouterClient
from router.decision import Decision
from router.interfaces import Encoder
from router.loading import ServedModels, SnapshotLoader
from router.settings import DEFAULT_BASE_MODEL
from tests.benchmarks.catalog_model import CatalogModel
from tests.benchmarks.catalog_moves import CatalogMoves
from tests.benchmarks.load import OK, Clients, Load, Result
from tests.benchmarks.served import Served, serving
from tests.benchmarks.serving_homes import (
    example_requests,
    held_out,
    register_with_untuned_prompts,
    short_texts,
)
from trainer.commands import RegisterTask
from trainer.workshop import Workshop

# The tasks that Generate names stay; the others come and go.
STAYING = 2
_WATCHED_TEXTS = 16
_MOST_SEGMENT_SECONDS = 5.0
_SERVED_SECONDS = 30.0
METHODS = ("Route", "BatchRoute", "StreamRoute", "Generate")
# As calls are told it, and texts of a stream.
REFUSALS = ("RESOURCE_EXHAUSTED", "OVERLOADED")
# Memory is judged by the line through its second half, and by how much of itself that adds.
LEAST_JUDGED_SECONDS = 240.0
MOST_GROWTH = 0.05


@dataclass(slots=True)
class Findings:
    """What a soak saw."""

    calls: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    """How often, by method and what the server said."""
    publishes: Counter[str] = field(default_factory=Counter)
    revisions_seen: set[int] = field(default_factory=set)
    decisions_compared: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    slowest_reload: float = 0.0

    def growth(self) -> float | None:
        """The share by which memory grew in the second half; None where that is too short."""
        if not self.memory or self.memory[-1][0] < LEAST_JUDGED_SECONDS:
            return None
        half = self.memory[-1][0] / 2
        times, sizes = np.array([each for each in self.memory if each[0] >= half]).T
        slope, _ = np.polyfit(times, sizes, 1)
        return float(slope * (times[-1] - times[0]) / sizes.mean())


class Soak:
    """A server under a mixed load, and a catalog that moves under it."""

    def __init__(
        self,
        home: Path,
        encoder: Encoder,
        base_model: TorchLanguageModel,
        base_folder: str,
        tasks: Sequence[RegisterTask],
    ) -> None:
        """`home` must be empty; `base_folder` is where the server finds the same base model."""
        self.home = home
        self.findings = Findings()
        self._encoder, self._base_model, self._base_folder = encoder, base_model, base_folder
        self._background = measure_background(encoder)
        self._tasks = tasks
        self._model = CatalogModel(home)
        self._over = threading.Event()
        self._lock = threading.Lock()

    def run(self, seconds: float, publish_every: float) -> Findings:
        """Set up, load for `seconds` with a publish every `publish_every`, and check."""
        with Workshop(self.home, self._encoder) as workshop:
            register_with_untuned_prompts(workshop, self._tasks, self._base_model)
            with serving(self.home, "--base-model", self._base_folder) as served:
                self._under_load(served, workshop, seconds, publish_every)
        return self.findings

    def _under_load(
        self, served: Served, workshop: Workshop, seconds: float, publish_every: float
    ) -> None:
        segment = min(seconds / 4, _MOST_SEGMENT_SECONDS)
        threads = [
            threading.Thread(target=self._load, args=(served, load, segment))
            for load in self._loads()
        ]
        for thread in threads:
            thread.start()
        moves = CatalogMoves(
            workshop,
            self._tasks[STAYING:],
            partial(register_with_untuned_prompts, base_model=self._base_model),
        )
        self.findings.publishes = moves.made
        began = time.monotonic()
        try:
            with RouterClient(served.address) as client:
                due = began
                while (now := time.monotonic()) < began + seconds:
                    self.findings.memory.append((now - began, served.resident_mib()))
                    if now >= due:
                        due = now + publish_every
                        moves.next()
                        self._compare(client, workshop)
                    time.sleep(min(0.5, max(began + seconds - time.monotonic(), 0)))
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _loads(self) -> list[Load]:
        rows = held_out([task.name for task in self._tasks[:STAYING]])
        answered = {"texts": [t for t, _ in rows], "tasks": [task for _, task in rows]}
        short = short_texts()
        one = {"processes": 1, "timeout": 30.0}
        return [
            Load("Route", short, callers=4, **one),
            Load("BatchRoute", short, callers=1, batch=16, **one),
            Load("StreamRoute", short, callers=1, outstanding=4, **one),
            Load("Generate", callers=2, **answered, **one),
            Load("Generate", texts=short, callers=1, **one),
        ]

    def _load(self, served: Served, load: Load, segment: float) -> None:
        try:
            with Clients(served.address, load) as clients:
                while not self._over.is_set():
                    self._check(load.method, clients.run(segment, warm_up=0.0))
        except Exception as error:
            self._note(f"{load.method}: {type(error).__name__}: {error}")

    def _check(self, method: str, result: Result) -> None:
        for problem in result.problems:
            self._note(f"{method}: {problem}")
        refused: Counter[str] = Counter()
        for call in result.calls:
            if call.code in REFUSALS:
                refused[f"{method}: {call.said}"] += 1
            elif call.code != OK:
                self._note(f"{method}: {call.code}")
            elif problem := self._model.problem(call.revision, call.tasks):
                self._note(f"{method}: {problem}")
        with self._lock:
            self.findings.calls[method] += len(result.calls) - refused.total()
            self.findings.revisions_seen |= {
                c.revision for c in result.calls if c.code not in REFUSALS
            }
            self.findings.refused += refused

    def _note(self, problem: str) -> None:
        with self._lock:
            self.findings.problems.append(problem)

    def _compare(self, client: RouterClient, workshop: Workshop) -> None:
        """Decisions of the server beside those of the same revision, computed here."""
        newest = workshop.catalog.newest_revision()
        began = time.monotonic()
        while client.status().revision != newest:
            if time.monotonic() > began + _SERVED_SECONDS:
                self._note(f"revision {newest} is not served after {_SERVED_SECONDS:g} s")
                return
            time.sleep(0.05)
        waited = time.monotonic() - began
        self.findings.slowest_reload = max(self.findings.slowest_reload, waited)
        texts = short_texts()[:_WATCHED_TEXTS]
        served = [client.route(text) for text in texts]
        models = ServedModels(
            self._encoder.fingerprint,
            self._encoder.dimension,
            lambda: self._background,
            self._base_model.fingerprint,
        )
        snapshot = SnapshotLoader(self.home, models).load(workshop.catalog, newest, None)
        computed = snapshot.decide(self._encoder.encode(texts))
        for ours, theirs in zip(computed, served, strict=True):
            self.findings.decisions_compared += 1
            if not same_decision(ours, theirs):
                self._note(f"at revision {newest}: the server decided {theirs}, not {ours}")


def same_decision(one: Decision, other: Decision) -> bool:
    """Whether both are of the same revision and say the same."""
    return (
        one.revision == other.revision
        and (one.outcome, one.task) == (other.outcome, other.task)
        and bool(np.isclose(one.score, other.score, atol=1e-4))
    )


def report(findings: Findings, seconds: float) -> list[str]:
    """Lines for people."""
    calls = ", ".join(f"{count:,} {name}" for name, count in sorted(findings.calls.items()))
    made = ", ".join(f"{count} {kind}" for kind, count in sorted(findings.publishes.items()))
    growth = findings.growth()
    sizes = [size for _, size in findings.memory]
    lines = [
        f"{seconds:.0f} s: {calls}",
        f"refused as too many: {findings.refused.total():,}",
        *(f"  {count} x {said}" for said, count in findings.refused.most_common(5)),
        f"published meanwhile: {made}; served within {findings.slowest_reload:.1f} s at most",
        f"revisions in responses: {len(findings.revisions_seen)}, all of them checked;"
        f" {findings.decisions_compared} decisions compared with the catalog's",
        f"memory: {sizes[0]:.0f} MiB at the start, {max(sizes):.0f} at most, {sizes[-1]:.0f} at the"
        " end",
        "growth in the second half: "
        + ("not judged, the run is too short" if growth is None else f"{100 * growth:+.1f} %"),
        f"problems: {len(findings.problems)}",
    ]
    return lines + [f"  {count} x {p}" for p, count in Counter(findings.problems).most_common(20)]


def holds(findings: Findings, *, may_refuse: bool = False) -> bool:
    """Whether everything that is checked holds, and anything was checked at all.

    With `may_refuse`, a call may be refused as one too many: on a machine that is busy with other
    things, that is what a server is to do.
    """
    growth = findings.growth()
    return (
        not findings.problems
        and (may_refuse or not findings.refused)
        and (growth is None or growth <= MOST_GROWTH)
        and all(findings.calls[method] for method in METHODS)
        and len(findings.revisions_seen) > 1
        and findings.decisions_compared > 0
    )


def main() -> int:
    """Soak, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--publish-every", type=float, default=10.0, help="seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        soak = Soak(
            Path(home),
            load_encoder(),
            load_base_model(DEFAULT_BASE_MODEL),
            DEFAULT_BASE_MODEL,
            example_requests(),
        )
        findings = soak.run(options.seconds, options.publish_every)
    print("\n".join(report(findings, options.seconds)))
    return 0 if holds(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
