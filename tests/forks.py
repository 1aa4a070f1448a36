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
        self._pid = pid
        self.status: int | None = None

    def reports(self) -> Iterator[Any]:
        """What the function reports, until the process has ended."""
        while self.status is None:
            message = self._server.receive()
            if "ended" in message:
                self._server.send("reap")
                self.status = int(self._server.receive()["status"])
            else:
                yield message["report"]

    def kill(self) -> None:
        """SIGKILL. Until its reports are read, an ended process is a zombie that keeps its id."""
        assert self.status is None
        os.kill(self._pid, signal.SIGKILL)

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL ended it; known when its reports are read."""
        assert self.status is not None
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


class ForkServer:
    """Starts the forked processes, one at a time."""

    _fork: Fork | None = None

    def __enter__(self) -> ForkServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(_ROOT), *sys.path]),
                # Threads that wait for each other spinning would make a busy machine busier.
                "OPENBLAS_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            },
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
        if self._fork is not None and self._fork.status is None:  # its test has failed
            self._fork.kill()
            list(self._fork.reports())
        self.send([function, arguments, user])
        self._fork = Fork(self, self.receive()["pid"])
        return self._fork

    def call(self, function: str, *arguments: object, user: int | None = None) -> list[Any]:
        """Run it to its end, and return what it reports."""
        fork = self.start(function, *arguments, user=user)
        reports = list(fork.reports())
        assert fork.status == 0, reports
        return reports

    def send(self, message: object) -> None:
        """One message to the server."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        """The next message of the server or its child."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the fork server has died"
        return json.loads(line)


def report(value: object) -> None:
    """Tell the test something: one write, whole or not at all."""
    _send({"report": value})


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
    while line := sys.stdin.buffer.readline():
        started, start = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.read(started, 1)  # the parent's first message comes before ours
            status = 1
            try:
                _child(*json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _send({"pid": pid})
        os.write(start, b".")
        os.close(started)
        os.close(start)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        _send({"ended": pid})
        sys.stdin.buffer.readline()
        _send({"status": os.waitpid(pid, 0)[1]})


def _send(message: object) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    _serve()
