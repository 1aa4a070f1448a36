"""What is announced is embedded meanwhile, in the same batches, and once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from router.interfaces import Embeddings
from tests.fakes import FakeEncoder
from trainer.embedding_ahead import EncoderAhead


class WatchedEncoder(FakeEncoder):
    """Waits for `go` in other threads than the main one."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def encode(self, texts: Sequence[str]) -> Embeddings:
        if threading.current_thread() is not threading.main_thread():
            assert self.go.wait(10)
        return super().encode(texts)


def test_announced_texts_are_embedded_beside_and_once_and_others_when_they_are_asked_for() -> None:
    encoder = WatchedEncoder()
    with ThreadPoolExecutor(1) as executor:
        ahead = EncoderAhead(encoder, executor)
        ahead.announce(["a", "b"])
        ahead.announce(["c"])
        others = ahead.encode(["a"])
        assert encoder.batches == [["a"]]
        encoder.go.set()
        announced = ahead.encode(["a", "b"])
    assert encoder.batches == [["a"], ["a", "b"], ["c"]]
    np.testing.assert_array_equal(announced.vectors, FakeEncoder().encode(["a", "b"]).vectors)
    np.testing.assert_array_equal(others.vectors, announced.vectors[:1])
    ahead.encode(["a", "b"])
    assert encoder.batches[3:] == [["a", "b"]]


def test_time_that_nobody_waited_for_is_counted_once_the_texts_are_asked_for() -> None:
    class SlowEncoder(FakeEncoder):
        def encode(self, texts: Sequence[str]) -> Embeddings:
            time.sleep(0.2)
            return super().encode(texts)

    with ThreadPoolExecutor(1) as executor:
        ahead = EncoderAhead(SlowEncoder(), executor)
        ahead.announce(["a"])
        executor.submit(lambda: None).result()
        assert ahead.seconds_ahead == 0
        ahead.encode(["a"])
        assert 0.2 <= ahead.seconds_ahead < 2
        before = ahead.seconds_ahead
        ahead.encode(["b"])
        assert ahead.seconds_ahead == before
