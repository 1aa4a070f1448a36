"""Processes that start in milliseconds, can change their user and can be killed.

A server process imports the heavy modules once and forks for every call; the test process itself
has threads and cannot fork safely.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent


class Fork:
    """A forked process that runs one function of `tests.victims`."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server = server
        self.pid = pid

    def lines(self) -> Iterator[Any]:
        """What the function reports, one JSON value a line, until the process has ended."""
        while True:
            message = self._server.receive()
            if "status" in message:
                self.status = int(message["status"])
                return
            yield message["report"]

    def kill(self) -> None:
        """SIGKILL. The process stays a zombie until `lines` are read, so that the id is its own."""
        os.kill(self.pid, signal.SIGKILL)

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL ended it; only known after `lines`."""
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


class ForkServer:
    """Starts the forked processes, one at a time."""

    def __enter__(self) -> ForkServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        assert self.receive() == {"report": "ready"}
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()

    def start(self, function: str, *arguments: object, user: int | None = None) -> Fork:
        """Run a function of `tests.victims` in a process of its own, as that user."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([function, arguments, user]).encode() + b"\n")
        self._process.stdin.flush()
        return Fork(self, self.receive()["pid"])

    def call(self, function: str, *arguments: object, user: int | None = None) -> list[Any]:
        """Run it to its end, and return what it reports."""
        fork = self.start(function, *arguments, user=user)
        reports = list(fork.lines())
        assert fork.status == 0, reports
        return reports

    def receive(self) -> Any:
        """The next message of the server or its child."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has died"
        return json.loads(line)


def report(value: object) -> None:
    """Tell the test something: one write, whole or not at all."""
    os.write(1, json.dumps({"report": value}).encode() + b"\n")


def _child(function: str, arguments: list[Any], user: int | None) -> None:
    from tests import victims

    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    getattr(victims, function)(*arguments)


def _serve() -> None:
    from tests import victims  # noqa: F401 - imported once, for all children

    report("ready")
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _child(*json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.write(1, json.dumps({"pid": pid}).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        os.write(1, json.dumps({"status": status}).encode() + b"\n")


if __name__ == "__main__":
    _serve()
