"""What a network makes of a soft prompt before it reads any text: computed once, and shared."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from router.interfaces import FloatArray
from router.tasks import PromptMethod


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A soft prompt as the network reads it, `[P, W]`, and of which method it then is."""

    tensor: Tensor
    method: PromptMethod


@dataclass(frozen=True, slots=True)
class _Entry:
    array: weakref.ref[FloatArray]
    read: ReadPrompt

    @property
    def size(self) -> int:
        return self.read.tensor.nbytes


class PromptMemory:
    """The prompts that were used last, as they were read, `max_bytes` of them. Thread-safe.

    A prompt is known by its array, which must not be written to. It is forgotten together with the
    array: when the last snapshot that has its task goes.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # The one that was used last is the last. An array that goes takes its entry out without the
        # lock, in whatever thread, maybe one that holds it.
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in list(self._entries.values()))

    def get(self, array: FloatArray, read: Callable[[], ReadPrompt]) -> ReadPrompt:
        """What `read` returned for this array; it is called where that is not known (any more)."""
        key = id(array)
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._entries[key] = entry
                return entry.read
        entries = self._entries
        entry = _Entry(weakref.ref(array, lambda _: entries.pop(key, None)), read())
        if entry.size <= self._max_bytes:
            with self._lock:
                entries[key] = entry
                for oldest in list(entries):
                    if self.size <= self._max_bytes:
                        break
                    entries.pop(oldest, None)
        return entry.read
