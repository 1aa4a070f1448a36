"""The embedding cache: what is remembered, for how long, and that it changes no decision."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from router.backends.onnx_encoder import OnnxMiniLM
from router.embedding_cache import _BYTES_BESIDE_A_VECTOR, CachingEncoder
from router.interfaces import Embeddings
from router.routing import Router
from tests.fakes import (
    DIMENSION,
    WINDOW_WORDS,
    FakeEncoder,
    FixedLive,
    make_settings,
    make_snapshot,
)


class Counted:
    """Counts hits and misses."""

    def __init__(self) -> None:
        self.hits = self.misses = 0

    def cache_used(self, *, hits: int, misses: int) -> None:
        self.hits += hits
        self.misses += misses


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def cache(encoder: FakeEncoder) -> CachingEncoder:
    return CachingEncoder(encoder, 1 << 20)


def room_for(texts: int) -> int:
    """Bytes that hold so many texts of the fake encoder."""
    return texts * (4 * DIMENSION + _BYTES_BESIDE_A_VECTOR)


def test_a_text_is_encoded_once(cache: CachingEncoder, encoder: FakeEncoder) -> None:
    first = cache.encode(["rain", "sun"])
    again = cache.encode(["sun", "rain", "snow"])
    assert encoder.batches == [["rain", "sun"], ["snow"]]
    np.testing.assert_array_equal(again.vectors[:2], first.vectors[::-1])
    assert cache.encode(["sun"]).vectors.dtype == np.float32


def test_threads_that_embed_a_text_at_once_get_the_vector_that_is_remembered() -> None:
    class Rounding(FakeEncoder):
        """Gives another vector each time, as rounding in another batch may; two calls at once."""

        both = threading.Barrier(2)

        def encode(self, texts: Sequence[str]) -> Embeddings:
            embeddings = super().encode(texts)
            number = self.both.wait(10)
            return Embeddings(embeddings.vectors + np.float32(number), embeddings.truncated)

    cache = CachingEncoder(Rounding(), 1 << 20)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(cache.encode, [["rain"], ["rain", "sun"]])
    np.testing.assert_array_equal(one.vectors[0], other.vectors[0])
    np.testing.assert_array_equal(cache.encode(["rain"]).vectors[0], one.vectors[0])


def test_a_text_that_comes_twice_in_a_batch_is_encoded_once(
    cache: CachingEncoder, encoder: FakeEncoder
) -> None:
    found = cache.encode(["rain", "sun", "rain"])
    assert encoder.batches == [["rain", "sun"]]
    np.testing.assert_array_equal(found.vectors[0], found.vectors[2])
    assert found.vectors.shape == (3, DIMENSION)


def test_truncation_is_remembered_too(cache: CachingEncoder) -> None:
    texts = ["word " * (WINDOW_WORDS + 1), "word"]
    for _ in range(2):
        assert cache.encode(texts).truncated.tolist() == [True, False]


def test_texts_that_differ_in_anything_are_different_texts(
    cache: CachingEncoder, encoder: FakeEncoder
) -> None:
    texts = ["rain", "Rain", "rain ", "ra in", "räin", "ra\u0308in"]
    cache.encode(texts)
    assert encoder.batches == [texts]


def test_what_was_asked_for_longest_ago_is_forgotten_first(encoder: FakeEncoder) -> None:
    cache = CachingEncoder(encoder, room_for(2))
    cache.encode(["a"])
    cache.encode(["b"])
    cache.encode(["a"])  # a is fresher than b now
    cache.encode(["c"])
    cache.encode(["a"])
    cache.encode(["b"])
    assert encoder.batches == [["a"], ["b"], ["c"], ["b"]]


def test_it_never_holds_more_than_its_room(encoder: FakeEncoder) -> None:
    cache = CachingEncoder(encoder, room_for(10))
    assert cache.capacity == 10
    for start in range(0, 300, 25):  # batches larger than the room
        found = cache.encode([f"text {n}" for n in range(start, start + 25)])
        assert found.vectors.shape == (25, DIMENSION)
        assert len(cache) == 10


def test_remembered_vectors_do_not_keep_their_batch_in_memory(cache: CachingEncoder) -> None:
    cache.encode([f"text {n}" for n in range(100)])
    assert all(vector.base is None for vector, _ in cache._known.values())


def test_remembered_texts_cost_no_tokens(cache: CachingEncoder) -> None:
    cache.encode(["two words"])
    assert cache.count_tokens(["two words", "three more words", "one"]) == [0, 3, 1]
    assert cache.count_tokens([]) == []


def test_nothing_in_gives_nothing_out(cache: CachingEncoder, encoder: FakeEncoder) -> None:
    assert cache.encode([]).vectors.shape == (0, DIMENSION)
    assert encoder.batches == []


def test_an_encoder_that_fails_leaves_nothing_behind(
    cache: CachingEncoder, encoder: FakeEncoder
) -> None:
    encoder.broken = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.encode(["rain"])
    assert len(cache) == 0
    encoder.broken = None
    assert cache.encode(["rain"]).vectors.shape == (1, DIMENSION)


def test_hits_and_misses_are_counted(encoder: FakeEncoder) -> None:
    counted = Counted()
    cache = CachingEncoder(encoder, 1 << 20, counted)  # type: ignore[arg-type]
    cache.encode(["a", "b", "a"])
    cache.encode(["a", "c"])
    assert (counted.hits, counted.misses) == (2, 3)


def test_threads_can_share_it(encoder: FakeEncoder) -> None:
    cache = CachingEncoder(encoder, room_for(20))
    wrong: list[str] = []

    def use(seed: int) -> None:
        chosen = random.Random(seed)
        plain = FakeEncoder()
        for _ in range(100):
            texts = [f"text {chosen.randrange(40)}" for _ in range(5)]
            if not np.array_equal(cache.encode(texts).vectors, plain.encode(texts).vectors):
                wrong.append(str(texts))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cache) <= 20


async def test_decisions_are_the_same_with_and_without(encoder: FakeEncoder) -> None:
    settings = make_settings()
    texts = [f"{name} {n}" for n in range(20) for name in ("weather", "sport", "law")] * 2
    decisions = []
    for used in (encoder, CachingEncoder(FakeEncoder(), room_for(30))):
        live = FixedLive(make_snapshot())
        router = Router(live, used, None, settings.limits, settings.routing_batches)
        decisions.append([await router.route(text, top_k=2) for text in texts])
        router.close()
    assert decisions[0] == decisions[1]


def test_the_real_encoder_is_the_same_encoder_behind_it() -> None:
    real = OnnxMiniLM()
    cache = CachingEncoder(real, 1 << 20)
    assert (cache.name, cache.fingerprint, cache.dimension) == (
        real.name,
        real.fingerprint,
        real.dimension,
    )
    texts = ["will it rain tomorrow", "block my card", "will it rain tomorrow"]
    np.testing.assert_allclose(cache.encode(texts).vectors, real.encode(texts).vectors, atol=1e-6)
