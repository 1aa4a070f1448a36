"""Continuous batching: free text for many callers from one running batch, off the event loop.

Callers join and leave between the steps of the batch, each of which writes one token for every row.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from router.batching import BatchLimits, about_tokens
from router.errors import OverloadedError
from router.interfaces import Generation, LanguageModel, Observer, PromptedInput, RunningBatch
from router.observing import UNOBSERVED
from router.pace import Pace
from router.turns import ModelThread

# How long the running batch takes steps before others may use the model: less than a batch of
# scores takes, and several steps, so that neither makes the other stand still.
_TURN_SECONDS = 0.05
_NAME = "generating"

_Event = str | Generation | Exception


@dataclass(slots=True, eq=False)
class _Row:
    """A caller's row, since `since`. `events` belongs to the event loop, the rest to the worker.

    `prepared` is what the running batch made of it, `seconds` its share of the work so far.
    """

    item: PromptedInput
    max_new_tokens: int
    since: float
    events: asyncio.Queue[_Event] = field(default_factory=asyncio.Queue)
    left: bool = False
    prepared: Any = None
    seconds: float = 0.0


class GenerationQueue:
    """Free text for concurrent calls. Its methods belong to one event loop.

    At most `batch_items` rows are written at a time, fewer where the model has no room for more;
    inputs of about `batch_tokens` are read between two steps.
    """

    def __init__(
        self,
        model: LanguageModel,
        limits: BatchLimits,
        model_thread: ModelThread,
        observer: Observer = UNOBSERVED,
    ) -> None:
        """`model_thread` is that of the model, for all who use it.

        `observer` is told the stages `generating_wait` (a row), `generating_read` (the inputs that
        join between two steps) and `generating_step`, and the rows of every step.
        """
        self._model = model
        self._limits = limits
        self._model_thread = model_thread
        self._observer = observer
        self._pace = Pace(_NAME, limits.queue_items, limits.queue_seconds)
        self._unfinished = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        # Both sides use these, under the lock of `_changed`.
        self._changed = threading.Condition()
        self._waiting: deque[_Row] = deque()
        self._closing = False
        # The worker's own: the running batch, and whose row is which.
        self._batch: RunningBatch[Any] = model.start_batch()
        self._rows: dict[Any, _Row] = {}
        self._thread: threading.Thread | None = None

    @property
    def unfinished(self) -> int:
        """Rows that are waiting or being written."""
        return self._unfinished

    async def write(
        self, item: PromptedInput, max_new_tokens: int
    ) -> AsyncGenerator[str | Generation]:
        """Pieces of text as they become final, then the whole `Generation`.

        Closing the iterator frees the row's place before the next step.

        Raises:
            OverloadedError: too many rows are waiting, or this one waited too long.
            Exception: what the model raised for the row.
        """
        self._pace.admit(1, self._unfinished)
        self._loop = asyncio.get_running_loop()
        row = _Row(item, max_new_tokens, time.perf_counter())
        self._unfinished += 1
        try:
            self._put(row)
            while True:
                event = await row.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Generation):
                    return
        finally:
            self._unfinished -= 1
            row.left = True
            with self._changed, contextlib.suppress(ValueError):
                self._waiting.remove(row)

    def close(self) -> None:
        """End the thread after the step that is running; callers who are left are told so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _put(self, row: _Row) -> None:
        with self._changed:
            if self._closing:
                raise _closed()
            self._waiting.append(row)
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=_NAME, daemon=True)
            self._thread.start()

    # ---- in the worker thread

    def _work(self) -> None:
        while self._wait_for_rows():
            try:
                self._model_thread.run(self._take_turn)
            except Exception as error:
                # A mistake of ours: nobody is to wait for a thread that died.
                self._start_anew(error)
        with self._changed:
            left = [*self._rows.values(), *self._waiting]
        self._tell([(row, _closed()) for row in left])

    def _take_turn(self) -> None:
        """Read and write for a while, as others may be waiting for the model."""
        until = time.perf_counter() + _TURN_SECONDS
        while time.perf_counter() < until and not self._closing:
            self._drop_those_who_left()
            self._admit()
            if not self._rows:
                break
            self._step()

    def _wait_for_rows(self) -> bool:
        """Until there is something to do; False where the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._waiting or self._closing)
            return not self._closing

    def _drop_those_who_left(self) -> None:
        for prepared, row in list(self._rows.items()):
            if row.left:
                self._batch.drop(prepared)
                del self._rows[prepared]

    def _admit(self) -> None:
        """Let rows join that there is room for, in the order in which they came."""
        joining: list[_Row] = []
        tokens = 0
        for row in self._next_waiting():
            tokens += about_tokens(row.item.text)
            if joining and tokens > self._limits.batch_tokens:
                break
            if self._prepare(row):
                joining.append(row)
        if joining:
            self._join(joining)

    def _next_waiting(self) -> list[_Row]:
        """As many rows as could join, the oldest first. Those that waited too long are refused."""
        now = time.perf_counter()
        stale = []
        with self._changed:
            while self._waiting and self._pace.is_stale(now - self._waiting[0].since):
                stale.append(self._waiting.popleft())
            waiting = list(islice(self._waiting, self._limits.batch_items - len(self._rows)))
        self._tell([(row, self._pace.stale()) for row in stale])
        return waiting

    def _prepare(self, row: _Row) -> bool:
        """Whether the row can join; its caller is told why not."""
        try:
            if row.prepared is None:
                row.prepared = self._batch.prepare(row.item, row.max_new_tokens)
        except Exception as error:
            self._fail(row, error)
            return False
        return True

    def _join(self, rows: Sequence[_Row]) -> None:
        began = time.perf_counter()
        try:
            joined = rows[: self._batch.join([row.prepared for row in rows])]
        except Exception as error:
            if len(rows) == 1:
                self._fail(rows[0], error)
            else:  # which of them is to blame shows when each is read alone
                for row in rows:
                    self._join([row])
            return
        self._no_longer_waiting(joined)
        seconds = time.perf_counter() - began
        for row in joined:
            row.seconds = seconds / len(joined)
            self._rows[row.prepared] = row
            self._observer.stage_ended(f"{_NAME}_wait", began - row.since)
        if joined:
            self._observer.stage_ended(f"{_NAME}_read", seconds)

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            written = self._batch.step()
        except Exception as error:
            # Nobody can tell whose row it was, and the batch is of no use any more.
            self._drop_batch(error)
            return
        seconds = time.perf_counter() - began
        self._observer.stage_ended(f"{_NAME}_step", seconds)
        self._observer.batch_ended(_NAME, len(self._rows))
        # Where nobody waits for a place, more rows could have shared the step: what it would then
        # have taken, nobody knows, and it is no reason to refuse any.
        sharing = len(self._rows) if self._waiting else self._limits.batch_items
        for row in self._rows.values():
            row.seconds += seconds / sharing
        events: list[tuple[_Row, _Event]] = []
        for each in written:
            row = self._rows[each.row]
            if each.piece:
                events.append((row, each.piece))
            if each.generation is not None:
                events.append((row, each.generation))
                self._pace.note(row.seconds)
                del self._rows[each.row]
        self._tell(events)

    def _drop_batch(self, error: Exception) -> None:
        self._tell([(row, error) for row in self._rows.values()])
        self._rows.clear()
        self._batch = self._model.start_batch()

    def _start_anew(self, error: Exception) -> None:
        """Tell all who are in the batch or wait for it what happened, and forget them."""
        self._drop_batch(error)
        with self._changed:
            waiting = list(self._waiting)
            self._waiting.clear()
        self._tell([(row, error) for row in waiting])

    def _fail(self, row: _Row, error: Exception) -> None:
        self._no_longer_waiting([row])
        self._tell([(row, error)])

    def _no_longer_waiting(self, rows: Sequence[_Row]) -> None:
        with self._changed:
            for row in rows:
                with contextlib.suppress(ValueError):  # its caller left just now
                    self._waiting.remove(row)

    def _tell(self, events: Sequence[tuple[_Row, _Event]]) -> None:
        """Hand events to the callers that are still there, in the event loop."""
        wanted = [(row, event) for row, event in events if not row.left]
        if wanted and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and its callers with it
                self._loop.call_soon_threadsafe(_hand_out, wanted)


def _hand_out(events: Sequence[tuple[_Row, _Event]]) -> None:
    for row, event in events:
        row.events.put_nowait(event)


def _closed() -> OverloadedError:
    return OverloadedError(f"{_NAME} queue", "closed", "ask a server that is running")
