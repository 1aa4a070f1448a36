"""Embeds what will be asked for next, beside other work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future

from router.interfaces import Embeddings, Encoder


class EncoderAhead:
    """An encoder that can be told which texts it will be asked for, and embeds them meanwhile.

    The vectors are those of the encoder inside, bit by bit: texts that were announced are embedded
    in the batch in which they are asked for. Not thread-safe, but that `executor` does the work.
    """

    def __init__(self, encoder: Encoder, executor: Executor) -> None:
        self._encoder = encoder
        self._executor = executor
        self._announced: dict[tuple[str, ...], Future[tuple[Embeddings, float]]] = {}
        self.seconds_ahead = 0.0
        """Seconds of embedding that nobody waited for, of texts that were asked for by now."""

    @property
    def name(self) -> str:
        """Of the encoder inside."""
        return self._encoder.name

    @property
    def fingerprint(self) -> str:
        """Of the encoder inside."""
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
        """Tokens of each text, cut to the window."""
        return self._encoder.count_tokens(texts)

    def announce(self, texts: Sequence[str]) -> None:
        """Begin to embed a batch that will be asked for once."""
        batch = tuple(texts)
        self._announced[batch] = self._executor.submit(self._timed, batch)

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Embed `texts` `[B]` to unit vectors `[B, D]`."""
        announced = self._announced.pop(tuple(texts), None)
        if announced is None:
            return self._encoder.encode(texts)
        began = time.perf_counter()
        embeddings, seconds = announced.result()
        self.seconds_ahead += max(seconds - (time.perf_counter() - began), 0.0)
        return embeddings

    def _timed(self, texts: Sequence[str]) -> tuple[Embeddings, float]:
        began = time.perf_counter()
        return self._encoder.encode(texts), time.perf_counter() - began
