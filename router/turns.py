"""Models that several queues share: they take turns, in the order in which they came.

Every tenant has one batch of texts, one of scored answers and one running batch in line at a time,
however long its queues are, so that a tenant under load makes another wait for a batch and not for
its queue.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

from router.interfaces import Embeddings, Encoder

Result = TypeVar("Result")


class Turns:
    """A lock that goes to whoever has waited longest (`threading.Lock` goes to anyone)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        mine.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()  # it stays taken
            else:
                self._taken = False


class ModelThread:
    """A thread that does all work with a model, in the order in which it came.

    The threads among which torch shares out a product belong to the thread that asks for it. Were
    there several of these, theirs would get in each other's way: an answer takes a third longer.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="base-model")

    def run(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, or raises."""
        return self._executor.submit(work).result()


class TurnTakingEncoder:
    """An encoder that embeds one batch at a time. Thread-safe, as every `Encoder`."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._turns = Turns()

    @property
    def name(self) -> str:
        """Of the encoder inside."""
        return self._encoder.name

    @property
    def fingerprint(self) -> str:
        """Of the encoder inside: taking turns changes no vector."""
        return self._encoder.fingerprint

    @property
    def dimension(self) -> int:
        """D."""
        return self._encoder.dimension

    @property
    def window(self) -> int:
        """Of the encoder inside."""
        return self._encoder.window

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `router.interfaces.Encoder`; this waits for no turn."""
        return self._encoder.count_tokens(texts)

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """See `router.interfaces.Encoder`."""
        with self._turns:
            return self._encoder.encode(texts)
