"""Several server processes on one port: what they share, and what happens when one ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from router.backends.onnx_encoder import OnnxMiniLM
from router.backends.torch_model import TorchLanguageModel
from router.bootstrap import check_settings, load_base_model
from router.client import RouterClient
from router.errors import InvalidInputError
from router.settings import DEFAULT_BASE_MODEL
from router.supervisor import shared_port
from tests.benchmarks.chaos import free_port
from tests.benchmarks.serving_homes import register_with_untuned_prompts, write_examples
from tests.fakes import make_settings
from trainer.commands import RegisterTask
from trainer.data import Example
from trainer.workshop import Workshop

SECONDS = 60.0

SUPERVISE = """
import os, signal, sys, time
from router.bootstrap import log_to_stderr
from router.errors import InvalidInputError
from router.supervisor import Supervisor
log_to_stderr()
def work(number, announce):
    {work}
Supervisor({workers}, work, stop_seconds={stop_seconds}).run(lambda line: print(line, flush=True))
"""


class Supervised:
    """A supervisor as a process of its own, and its log."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.log: list[dict[str, Any]] = []
        self.other: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self.log.append(json.loads(line))
            else:
                self.other.append(line)

    def line(self) -> str:
        """What it prints next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def logged(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """The first log lines of an event, when there are so many."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            found = [line for line in list(self.log) if line["event"] == event]
            if len(found) >= count:
                return found[:count]
            time.sleep(0.02)
        raise AssertionError(f"{event!r} is not logged {count} times: {self.log} {self.other}")

    def pids(self, served: int = 2) -> dict[int, int]:
        """The process that serves last for each worker, when they began to so many times."""
        self.logged("worker serves", served)
        return {
            line["worker"]: line["pid"] for line in self.log if line["event"] == "worker serves"
        }

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """The exit status after a signal."""
        self.process.send_signal(signal_number)
        return self.ended()

    def ended(self) -> int:
        """The exit status, when it has ended."""
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code

    def close(self) -> None:
        """Kill it, if it has not ended."""
        self.process.kill()
        self.ended()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[Supervised]:
    supervised = Supervised(command)
    try:
        yield supervised
    finally:
        supervised.close()


def supervising(
    work: str, workers: int = 2, stop_seconds: float = 5.0
) -> contextlib.AbstractContextManager[Supervised]:
    """A supervisor of workers that do this and no more."""
    program = SUPERVISE.format(work=work, workers=workers, stop_seconds=stop_seconds)
    return running([sys.executable, "-c", program])


def serving(
    home: Path, *flags: str, answers: bool = False
) -> contextlib.AbstractContextManager[Supervised]:
    command = [sys.executable, "-m", "trainer.cli", "serve", "--home", str(home)]
    command += ["--listen", "127.0.0.1:0", *([] if answers else ["--route-only"])]
    return running([*command, *flags])


def scraped(port: int, sample: str) -> float:
    """The sum of the samples of that name and labels in a worker's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(sample))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_share_a_port_replace_one_that_was_killed_and_finish_their_calls(
    tmp_path: Path,
) -> None:
    metrics = free_port()
    with serving(tmp_path, "--workers", "2", "--metrics", f"127.0.0.1:{metrics}") as served:
        listening, rest = served.line().split(", ", 1)
        assert rest == "revision 0, 0 tasks, 2 workers"
        address = listening.removeprefix("listening on ")
        for _ in range(30):
            with RouterClient(address) as client:  # a connection of its own
                client.route("is it going to rain?")
        ports = (metrics, metrics + 1)
        counted = [scraped(port, "promptyard_calls_total") for port in ports]
        assert sum(counted) == 30
        assert min(counted) > 0
        first = served.pids()
        os.kill(first[1], signal.SIGKILL)
        [ended] = served.logged("worker ended")
        assert (ended["worker"], ended["how"]) == (1, "ended by SIGKILL")
        second = served.pids(3)
        assert second[0] == first[0]
        assert second[1] != first[1]
        with RouterClient(address) as client:
            client.route("is anybody there?")
            answers: list[object] = []
            texts = [f"{number} times " + "a text about this and that " * 9 for number in range(64)]
            caller = threading.Thread(target=lambda: answers.extend(client.batch_route(texts)))
            caller.start()
            queue = 'promptyard_queued_items{queue="routing"'
            until(lambda: any(scraped(port, queue) for port in ports))
            assert served.stop() == 0
            caller.join(SECONDS)
        assert len(answers) == 64
    assert served.other == []
    assert not any(is_running(pid) for pid in second.values())


def mib(pid: int, kind: str) -> float:
    """Memory of a process: resident (`Rss`), or its share of what it has in common (`Pss`)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    [line] = [line for line in rollup.splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1]) / 1024


def test_workers_answer_alike_with_one_copy_of_the_base_model(
    tmp_path: Path, encoder: OnnxMiniLM
) -> None:
    base_model = load_base_model(DEFAULT_BASE_MODEL, device="cpu", threads=1)
    assert isinstance(base_model, TorchLanguageModel)
    rows = [Example(f"is anybody there, number {number}?", "yes") for number in range(12)]
    data = write_examples(tmp_path / "rows.jsonl", [*rows, Example("nobody is here", "no")])
    request = RegisterTask("presence", data, instruction="Is anybody there?")
    with Workshop(tmp_path, encoder) as workshop:
        register_with_untuned_prompts(workshop, [request], base_model)
    answers: dict[str, set[str]] = {}
    with serving(tmp_path, "--workers", "2", "--threads", "1", answers=True) as served:
        address = served.line().split(", ")[0].removeprefix("listening on ")
        for _ in range(12):
            with RouterClient(address) as client:
                started = str(client.status().started_at.ToJsonString())
                events = client.generate("is anybody there?", task=request.name)
                answer = "".join(event for event in events if isinstance(event, str))
                answers.setdefault(answer, set()).add(started)
        pids = served.pids().values()
        in_common = sum(mib(pid, "Rss") - mib(pid, "Pss") for pid in pids)
        assert served.stop() == 0
    assert len(answers) == 1
    assert "" not in answers
    [workers] = answers.values()
    assert len(workers) == 2  # each of them was asked
    assert in_common > 300


def test_a_worker_that_cannot_serve_ends_the_others_and_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite3").write_bytes(b"no catalog at all" * 100)
    with serving(tmp_path, "--workers", "2") as served:
        assert served.ended() == 1
        assert served.line() == ""
    assert "CATALOG_UNAVAILABLE" in "".join(served.other)


def test_a_worker_that_dies_before_it_serves_is_no_start() -> None:
    work = "announce('served') if number else os.kill(os.getpid(), signal.SIGKILL)"
    with supervising(work) as supervised:
        assert supervised.ended() == 1
    assert "PromptyardError: worker 0: ended by SIGKILL" in supervised.other[-1]


def test_one_that_ends_again_and_again_is_started_less_and_less_often() -> None:
    with supervising("announce('served')", workers=1) as supervised:
        assert supervised.line() == "served, 1 workers"
        ends = supervised.logged("worker ended", 3)
        assert [end["seconds_to_restart"] for end in ends] == [0.5, 1.0, 2.0]
        assert supervised.stop(signal.SIGINT) == 0


def test_one_that_does_not_stop_is_killed_when_the_time_is_over() -> None:
    work = "signal.signal(signal.SIGTERM, signal.SIG_IGN); announce('served'); time.sleep(600)"
    with supervising(work, stop_seconds=-9.5) as supervised:
        supervised.line()
        assert supervised.stop() == 0
        assert len(supervised.logged("worker killed: it did not stop", 2)) == 2
        assert not any(is_running(pid) for pid in supervised.pids().values())


def test_workers_stop_when_their_supervisor_was_killed() -> None:
    with supervising("announce('served'); time.sleep(600)") as supervised:
        supervised.line()
        pids = supervised.pids().values()
        supervised.stop(signal.SIGKILL)
        until(lambda: not any(is_running(pid) for pid in pids))


def test_a_port_that_others_share_cannot_be_taken_by_a_server_of_its_own(tmp_path: Path) -> None:
    with shared_port("127.0.0.1:0") as address, serving(tmp_path, "--listen", address) as served:
        assert served.ended() == 2
    assert "Address already in use" in " ".join(served.other)


def test_workers_are_refused_where_a_port_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    make_settings(workers=1)
    with pytest.raises(InvalidInputError, match="workers: 2 on darwin; give 1"):
        make_settings(workers=2)


def test_every_worker_has_a_port_for_metrics() -> None:
    settings = make_settings(workers=3, metrics="127.0.0.1:65533")
    assert settings.of_worker(2, "127.0.0.1:1").metrics == "127.0.0.1:65535"
    anywhere = make_settings(workers=3, metrics="127.0.0.1:0")
    assert anywhere.of_worker(2, "127.0.0.1:1").metrics == "127.0.0.1:0"
    with pytest.raises(InvalidInputError, match="65534; give a port with 2 more above it"):
        check_settings(make_settings(workers=3, metrics="127.0.0.1:65534"))
    with pytest.raises(InvalidInputError, match="workers: 65; give 1 to 64"):
        make_settings(workers=65)
