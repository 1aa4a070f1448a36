"""A load generator: client processes of their own, over real channels.

Every process runs `tests.benchmarks.load_worker` with callers that take the next request as soon as
the last one is answered (closed loop), or that start calls at a given rate whatever becomes of the
earlier ones (open loop).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
OK = "OK"


@dataclass(frozen=True, slots=True)
class Load:
    """What is called, by how many.

    `method` is a method of RouterService that is served with texts, or `Empty`. `callers` are
    shared out over the processes; a caller of `StreamRoute` is a stream that keeps `outstanding`
    texts on their way. `batch` texts go into one `BatchRoute`. `tasks` are named by `Generate`, one
    for each of `texts`. With `rate` (calls a second, of all processes) the loop is open.
    With `once` every text is sent once, in order; otherwise they come again until the time is over.
    """

    method: str
    texts: Sequence[str]
    callers: int = 64
    processes: int = 2
    connections: int = 1
    batch: int = 32
    outstanding: int = 16
    tasks: Sequence[str] = ()
    max_output_tokens: int = 16
    rate: float = 0.0
    once: bool = False
    timeout: float = 60.0


@dataclass(frozen=True, slots=True)
class Call:
    """One call (of a stream: one text): when it began and ended (monotonic), and its status.

    `items` are its texts; `revision` and `tasks` (NAME@REVISION, with spaces between) are what the
    response says, for those who check, `said` what an error says.
    """

    began: float
    ended: float
    items: int
    code: str
    revision: int = 0
    tasks: str = ""
    said: str = ""

    @property
    def seconds(self) -> float:
        """From the request to the end of the response."""
        return self.ended - self.began


@dataclass(slots=True)
class Result:
    """Every call that was begun, when measuring began and ended, and what the clients took."""

    calls: list[Call]
    began: float
    ended: float
    client_cpu_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def measured(self) -> list[Call]:
        """The calls that ended within the measured time."""
        return [call for call in self.calls if self.began <= call.ended <= self.ended]

    @property
    def rate(self) -> float:
        """Texts a second that were answered."""
        done = sum(call.items for call in self.measured if call.code == OK)
        return done / (self.ended - self.began)

    @property
    def codes(self) -> dict[str, int]:
        """Calls by status."""
        return dict(Counter(call.code for call in self.measured))

    def times(self, *codes: str) -> list[float]:
        """Seconds of the calls with these statuses (by default OK), in order of size."""
        wanted = codes or (OK,)
        return sorted(call.seconds for call in self.measured if call.code in wanted)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed; NaN where there are none."""
    if not ordered:
        return float("nan")
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


class Clients:
    """Client processes that are connected and wait for the word to begin."""

    def __init__(self, target: str, load: Load) -> None:
        self._load = load
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.load_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for _ in range(load.processes)
        ]
        for number, process in enumerate(self._processes):
            self._send(process, {"target": target, **_share(load, number)})
        for process in self._processes:
            if self._receive(process) != "ready":
                raise RuntimeError(f"a client process did not connect to {target}")

    def run(self, seconds: float, warm_up: float = 1.0) -> Result:
        """Call for `warm_up` seconds, then measure for `seconds`; `once`: until all is sent."""
        began = time.monotonic() + 0.1
        until = began + warm_up + seconds
        for process in self._processes:
            self._send(process, {"begin": began, "until": until})
        answers = [self._receive(process) for process in self._processes]
        calls = [Call(*row) for answer in answers for row in answer["calls"]]
        calls.sort(key=lambda call: call.ended)
        if self._load.once:
            measured = (min(call.began for call in calls), max(call.ended for call in calls))
        else:
            measured = (began + warm_up, until)
        problems = [problem for answer in answers for problem in answer["problems"]]
        return Result(calls, *measured, sum(answer["cpu"] for answer in answers), problems)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _send(process: subprocess.Popen[str], message: object) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()

    @staticmethod
    def _receive(process: subprocess.Popen[str]) -> dict | str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a client process has died")
        return json.loads(line)


def run_load(target: str, load: Load, seconds: float, warm_up: float = 1.0) -> Result:
    """Start the clients, run them once, and end them."""
    with Clients(target, load) as clients:
        return clients.run(seconds, warm_up)


def _share(load: Load, number: int) -> dict:
    """The part of process `number`."""
    part = asdict(load)
    callers = range(load.callers)[number :: load.processes]
    part |= {"callers": len(callers), "rate": load.rate / load.processes}
    if load.once:
        part["texts"] = list(load.texts)[number :: load.processes]
        part["tasks"] = list(load.tasks)[number :: load.processes]
    else:
        # Not the same texts at the same time in all processes.
        turn = len(load.texts) * number // load.processes
        part["texts"] = [*load.texts[turn:], *load.texts[:turn]]
        part["tasks"] = [*load.tasks[turn:], *load.tasks[:turn]]
    return part
