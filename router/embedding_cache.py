"""Embeddings of texts that were seen lately, within a bound of memory."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from router.interfaces import Embeddings, Encoder, FloatArray, Observer
from router.observing import UNOBSERVED

# Of the digest, of the array and of their places in the table, as tracemalloc finds them.
_BYTES_BESIDE_A_VECTOR = 640
_DIGEST_BYTES = 16


class CachingEncoder:
    """An encoder that remembers; the texts that were asked for longest ago are forgotten first.

    A remembered vector is the one that was computed first, bit by bit, also where threads compute
    it at once. Texts are kept as digests. Thread-safe, as every `Encoder`.
    """

    def __init__(self, encoder: Encoder, max_bytes: int, observer: Observer = UNOBSERVED) -> None:
        """`max_bytes` of memory at most; it holds one text at least."""
        self._encoder = encoder
        self._observer = observer
        self.capacity = max(1, max_bytes // (4 * encoder.dimension + _BYTES_BESIDE_A_VECTOR))
        self._known: OrderedDict[bytes, tuple[FloatArray, bool]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Texts that are remembered."""
        return len(self._known)

    @property
    def name(self) -> str:
        """Of the encoder inside."""
        return self._encoder.name

    @property
    def fingerprint(self) -> str:
        """Of the encoder inside: remembering changes no vector."""
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
        """Tokens that each text will cost: none where it is remembered."""
        with self._lock:
            unknown = [text for text in texts if _digest(text) not in self._known]
        costs = dict(zip(unknown, self._encoder.count_tokens(unknown), strict=True))
        return [costs.get(text, 0) for text in texts]

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Embed `texts` `[B]` to unit vectors `[B, D]`; each unknown one once."""
        digests = [_digest(text) for text in texts]
        with self._lock:
            found = {digest: self._known[digest] for digest in digests if digest in self._known}
            for digest in found:
                self._known.move_to_end(digest)
        new = {
            digest: text for digest, text in zip(digests, texts, strict=True) if digest not in found
        }
        if new:
            fresh = self._encoder.encode(list(new.values()))
            for digest, vector, truncated in zip(new, fresh.vectors, fresh.truncated, strict=True):
                # A copy: a row would keep the vectors of its whole batch in memory.
                found[digest] = (vector.copy(), bool(truncated))
            found |= self._remember({digest: found[digest] for digest in new})
        self._observer.cache_used(hits=len(texts) - len(new), misses=len(new))
        rows = [found[digest] for digest in digests]
        return Embeddings(
            np.stack([vector for vector, _ in rows])
            if rows
            else np.zeros((0, self.dimension), np.float32),
            np.array([truncated for _, truncated in rows], np.bool_),
        )

    def _remember(
        self, fresh: dict[bytes, tuple[FloatArray, bool]]
    ) -> dict[bytes, tuple[FloatArray, bool]]:
        """Remember what is not known yet; returns what is remembered of these texts."""
        with self._lock:
            remembered = {digest: self._known.setdefault(digest, fresh[digest]) for digest in fresh}
            while len(self._known) > self.capacity:
                self._known.popitem(last=False)
        return remembered


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
