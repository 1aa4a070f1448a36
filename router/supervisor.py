"""Several server processes on one port, and the supervisor that starts them again where they end.

Workers are forked from the supervisor, so that they share the memory of what was imported and
loaded before: the supervisor must own no thread that matters and no object of gRPC.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import structlog

from router.errors import PromptyardError
from router.sockets import bound_socket

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess

Announce = Callable[[str], None]

# A worker that ends is started again after this long, twice as long where it ends again soon.
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 30.0
# One that served for so long was well: its end is the first again.
WELL_AFTER_SECONDS = 60.0
# Beyond what calls may take to finish: batches end and files are closed.
_EXTRA_STOP_SECONDS = 10.0
_LOOK_FOR_SUPERVISOR_SECONDS = 1.0

_log = structlog.get_logger(__name__)


@contextlib.contextmanager
def shared_port(listen: str) -> Iterator[str]:
    """Hold HOST:PORT for processes that share it; yields it with the real port for port 0.

    What is held takes no connection: those go to the processes that listen.
    """
    with bound_socket(listen, socket.SO_REUSEPORT) as held:
        yield f"{listen.rpartition(':')[0]}:{held.getsockname()[1]}"


@dataclass(slots=True)
class _Worker:
    """A process, what it tells (that it serves, or why it cannot), and when it was started.

    `endings` counts how often it ended soon after its start. `due` is when to start it again, and
    None while it runs.
    """

    number: int
    process: ForkProcess
    told: Connection
    began: float
    serves: bool = False
    endings: int = 0
    due: float | None = None


class Supervisor:
    """Runs `work(number, announce)` in each of `workers` processes until SIGTERM or SIGINT.

    A worker announces one line when it serves, and returns from `work` when it got SIGTERM and its
    calls have ended, for which it has `stop_seconds`. Belongs to the main thread.
    """

    def __init__(
        self, workers: int, work: Callable[[int, Announce], None], stop_seconds: float
    ) -> None:
        self._work = work
        self._stop_seconds = stop_seconds + _EXTRA_STOP_SECONDS
        self._count = workers
        self._workers: list[_Worker] = []

    def run(self, announce: Announce) -> None:
        """Start the workers, announce one line when all serve, and keep them running.

        Raises:
            PromptyardError: one of them cannot start; the others are stopped.
        """
        gc.freeze()  # the collector writes to what it looks at, which would unshare the memory
        with _stop_signals() as stop:
            try:
                for number in range(self._count):
                    self._workers.append(self._start(number))
                lines = self._wait_until_all_serve(stop)
                if lines:
                    announce(f"{lines[0]}, {self._count} workers")
                    self._keep_running(stop)
            finally:
                self._stop()

    def _start(self, number: int) -> _Worker:
        told, telling = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=_be_worker, args=(self._work, number, telling, os.getpid()), name=f"{number}"
        )
        process.start()
        telling.close()
        return _Worker(number, process, told, time.monotonic())

    def _wait_until_all_serve(self, stop: socket.socket) -> list[str]:
        """The line of each worker, by number; none where a signal came first."""
        lines: dict[int, str] = {}
        while len(lines) < self._count:
            ready = wait([stop, *(worker.told for worker in self._workers if not worker.serves)])
            if stop in ready:
                return []
            for worker in self._workers:
                if worker.told in ready:
                    lines[worker.number] = self._first_word(worker)
        return [lines[number] for number in range(self._count)]

    def _first_word(self, worker: _Worker) -> str:
        """The line of a worker that serves.

        Raises:
            PromptyardError: it cannot, or ended without a word.
        """
        try:
            said = worker.told.recv()
        except EOFError:
            worker.process.join(self._stop_seconds)
            raise PromptyardError(
                f"worker {worker.number}",
                _ending(worker.process),
                "the log may say why; is there memory for all of the workers?",
            ) from None
        if isinstance(said, PromptyardError):
            raise said
        worker.serves = True
        _log.info("worker serves", worker=worker.number, pid=worker.process.pid)
        return str(said)

    def _keep_running(self, stop: socket.socket) -> None:
        while True:
            now = time.monotonic()
            for place, worker in enumerate(self._workers):
                if worker.due is not None and worker.due <= now:
                    worker.told.close()
                    self._workers[place] = self._start(worker.number)
                    self._workers[place].endings = worker.endings
            dues = [worker.due - now for worker in self._workers if worker.due is not None]
            running = [worker for worker in self._workers if worker.due is None]
            starting = [worker.told for worker in running if not worker.serves]
            ends = [worker.process.sentinel for worker in running]
            ready = wait([stop, *starting, *ends], max(min(dues), 0) if dues else None)
            if stop in ready:
                return
            for worker in running:
                if worker.told in ready:
                    with contextlib.suppress(PromptyardError):  # it ends, which is looked at next
                        self._first_word(worker)
                if worker.process.sentinel in ready:
                    self._note_end(worker)

    def _note_end(self, worker: _Worker) -> None:
        now = time.monotonic()
        worker.process.join()
        was_well = worker.serves and now - worker.began > WELL_AFTER_SECONDS
        worker.endings = 1 if was_well else worker.endings + 1
        delay = min(FIRST_DELAY_SECONDS * 2 ** (worker.endings - 1), LONGEST_DELAY_SECONDS)
        worker.due = now + delay
        _log.error(
            "worker ended",
            worker=worker.number,
            pid=worker.process.pid,
            how=_ending(worker.process),
            seconds_to_restart=delay,
        )

    def _stop(self) -> None:
        """Tell all workers to stop, and wait until their calls have ended."""
        _log.info("stopping workers")
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.terminate()
        deadline = time.monotonic() + self._stop_seconds
        for worker in self._workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
            if worker.process.is_alive():
                _log.error("worker killed: it did not stop", worker=worker.number)
                worker.process.kill()
                worker.process.join()


@contextlib.contextmanager
def _stop_signals() -> Iterator[socket.socket]:
    """A socket that can be read from as soon as SIGTERM or SIGINT came."""
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    wakeup = signal.set_wakeup_fd(writing.fileno())
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        yield reading
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        reading.close()
        writing.close()


def _be_worker(
    work: Callable[[int, Announce], None], number: int, telling: Connection, supervisor: int
) -> None:
    """The life of a forked process."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Ctrl-C in a terminal goes to all processes: the supervisor passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_without, args=(supervisor,), daemon=True).start()
    try:
        work(number, telling.send)
    except PromptyardError as error:
        _log.error("worker cannot serve", problem=str(error))
        telling.send(error)
        sys.exit(1)


def _stop_without(supervisor: int) -> None:
    """Stop this process when the supervisor was killed: nobody else would."""
    while os.getppid() == supervisor:
        time.sleep(_LOOK_FOR_SUPERVISOR_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _ending(process: ForkProcess) -> str:
    """How a process ended, in words."""
    code = process.exitcode
    if code is None or code >= 0:
        return f"ended with exit status {code}"
    return f"ended by {signal.Signals(-code).name}"
