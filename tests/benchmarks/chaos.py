"""kill -9, again and again: of registering processes and of a server under load.

    make chaos

Checked: every registration that was acknowledged is there, at its revision and with its digest, and
none is half there (`tests.crashes`); every response of a server that is killed names a revision of
the catalog and what was live in it; a server that is started again serves the newest revision, and
serves 1,000 tasks within 5 seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from router.bootstrap import load_encoder
from router.client import RouterClient
from router.interfaces import Encoder
from router.v1 import router_service_pb2 as messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from tests.benchmarks.catalog_model import CatalogModel, tasks_of
from tests.benchmarks.catalog_moves import CatalogMoves
from tests.benchmarks.served import serving
from tests.benchmarks.serving_homes import (
    example_requests,
    register_for_routing,
    short_texts,
    write_examples,
)
from tests.crashes import POINTS, kill_at_point, kill_at_random
from tests.forks import ForkServer
from trainer.commands import RegisterTask
from trainer.data import Example
from trainer.workshop import Workshop

CALLERS = 8
RESTART_TASKS = 1000
MOST_RESTART_SECONDS = 5.0
_RESTARTS = 5
_ROWS_OF_A_TASK = 6
# Longest time under load between two kills of the server.
_LOAD_SECONDS = 2.0
# What a caller may see of a server that is killed. Anything else is a problem.
_OF_A_KILL = ("UNAVAILABLE", "CANCELLED")

Say = Callable[[str], None]


def kill_trainers(folder: Path, kills: int, say: Say) -> None:
    """At every named point, and at `kills` random moments."""
    with ForkServer() as forks:
        for number, (point, passage) in enumerate(POINTS):
            kill_at_point(folder / f"point-{number}", forks, point, passage)
        say(f"trainer killed at {len(POINTS)} named points of publishing: nothing lost, none half")
        history = kill_at_random(folder / "random", forks, kills, seed=kills)
    say(
        f"trainer killed at {kills} random moments: {len(history.acknowledged)} registrations in"
        f" the history, all there with their digests, none half ({history.in_doubt_and_done} of"
        " them were published in the moment of the kill and not yet acknowledged)"
    )


class Callers:
    """Threads that call `Route` without end, through kills, and check every response."""

    def __init__(self, address: str, model: CatalogModel) -> None:
        self._address, self._model = address, model
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.codes: Counter[str] = Counter()
        self.problems: list[str] = []

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Call as long as this is open."""
        threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _call(self) -> None:
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 50)]
        texts = short_texts()
        with grpc.insecure_channel(self._address, options=options) as channel:
            stub = RouterServiceStub(channel)
            number = 0
            while not self._over.is_set():
                number += 1
                request = messages.RouteRequest(text=texts[number % len(texts)])
                try:
                    answer = stub.Route(request, timeout=10)
                except grpc.RpcError as error:
                    code = error.code().name
                    found = "" if code in _OF_A_KILL else f"{code}: {error.details()}"
                    self._over.wait(0.02)
                else:
                    code = "OK"
                    found = self._model.problem(answer.revision, tasks_of([answer.decision]))
                with self._lock:
                    self.codes[code] += 1
                    if found:
                        self.problems.append(found)


def kill_servers(home: Path, encoder: Encoder, kills: int, say: Say) -> None:
    """Kill a server under load `kills` times, while tasks are revised, retired and restored."""
    rng = random.Random(kills)
    address = f"127.0.0.1:{free_port()}"
    flags = ("--route-only", "--listen", address)
    seconds = []
    with Workshop(home, encoder) as workshop:
        examples = example_requests()
        register_for_routing(workshop, examples)
        moves = CatalogMoves(workshop, examples)
        callers = Callers(address, CatalogModel(home))
        with callers.calling():
            for _ in range(kills):
                newest = workshop.catalog.newest_revision()
                began = time.monotonic()
                with serving(home, *flags) as served, RouterClient(address) as client:
                    client.route("is anybody there?")
                    seconds.append(time.monotonic() - began)
                    found = client.status()
                    if found.revision < newest:
                        raise AssertionError(f"{found.revision} is served after {newest}")
                    killer = threading.Timer(rng.uniform(0, _LOAD_SECONDS), served.process.kill)
                    killer.start()
                    while killer.is_alive():
                        moves.next()
                        killer.join(0.2)
    if callers.problems:
        raise AssertionError(f"{len(callers.problems)} problems, such as {callers.problems[:5]}")
    if not callers.codes["OK"]:
        raise AssertionError("no call was answered")
    say(
        f"server killed {kills} times under load, with {workshop_moves(moves)} meanwhile:"
        f" {callers.codes['OK']:,} responses, all of a revision of the catalog and its tasks;"
        f" {sum(callers.codes.values()) - callers.codes['OK']:,} calls failed as a killed server"
        f" makes them fail; served again after {spread(seconds)} s"
    )


def restart_with_many_tasks(home: Path, encoder: Encoder, tasks: int, say: Say) -> bool:
    """Time from the start of a server to its first answer, after its kill; within 5 seconds?"""
    with Workshop(home, encoder) as workshop:
        register_for_routing(workshop, many_requests(home, tasks))
    held = True
    for name, flags in (("routing only", ("--route-only",)), ("with the base model", ())):
        seconds = []
        for _ in range(_RESTARTS):
            began = time.monotonic()
            with serving(home, *flags) as served, RouterClient(served.address) as client:
                client.route("is anybody there?")
                seconds.append(time.monotonic() - began)
                if client.status().tasks != tasks:
                    raise AssertionError(f"{client.status().tasks} of {tasks} tasks are served")
                served.process.kill()
        held &= statistics.median(seconds) <= MOST_RESTART_SECONDS
        say(f"restart with {tasks:,} tasks, {name}: first answer after {spread(seconds)} s")
    return held


def many_requests(folder: Path, tasks: int) -> list[RegisterTask]:
    """Tasks of few rows, each about words of its own."""
    words = sorted({word for text in short_texts() for word in text.lower().split()})
    rng = random.Random(0)
    requests = []
    for number in range(tasks):
        own = rng.sample(words, 6)
        rows = [
            Example(" ".join(rng.sample(own, 4) + rng.sample(words, 3)), "yes")
            for _ in range(_ROWS_OF_A_TASK)
        ]
        data = write_examples(folder / f"task-{number:04}.jsonl", rows)
        requests.append(RegisterTask(f"task-{number:04}", data, drop_duplicates=True))
    return requests


def workshop_moves(moves: CatalogMoves) -> str:
    """What was published, in words."""
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(moves.made.items()))


def free_port() -> int:
    """A port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spread(seconds: list[float]) -> str:
    """The median, with the least and the most."""
    return f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"


def main() -> int:
    """Kill, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of trainers at random moments")
    parser.add_argument("--server-kills", type=int, default=20, help="of a server under load")
    options = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    encoder = load_encoder()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kill_trainers(folder / "trainers", options.kills, say)
        kill_servers(new_folder(folder, "server"), encoder, options.server_kills, say)
        held = restart_with_many_tasks(new_folder(folder, "many"), encoder, RESTART_TASKS, say)
    say("held" if held else f"not held: a restart took over {MOST_RESTART_SECONDS:g} s")
    return 0 if held else 1


def new_folder(parent: Path, name: str) -> Path:
    """An empty folder."""
    folder = parent / name
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
