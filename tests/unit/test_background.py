"""What the encoder makes of text in general."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from router.backends.onnx_encoder import OnnxMiniLM
from router.background import TEXTS, measure_background, when_needed
from router.interfaces import Embeddings
from tests.catalogs import DIMENSION, PlaceEncoder


class CountingEncoder(PlaceEncoder):
    batches = 0

    def encode(self, texts: Sequence[str]) -> Embeddings:
        self.batches += 1
        return super().encode(texts)


def test_the_shipped_texts_are_many_all_different_and_none_is_empty() -> None:
    texts = TEXTS.read_text(encoding="utf-8").splitlines()
    assert len(texts) >= 300
    assert len({text.lower() for text in texts}) == len(texts)
    assert all(text == text.strip() and text for text in texts)


def test_mean_and_covariance_are_those_of_the_texts_embeddings() -> None:
    encoder = PlaceEncoder()
    vectors = encoder.encode(TEXTS.read_text(encoding="utf-8").splitlines()).vectors
    background = measure_background(encoder)
    np.testing.assert_allclose(background.mean, vectors.mean(0), atol=1e-6)
    centered = vectors.astype(np.float64) - vectors.mean(0)
    np.testing.assert_allclose(
        background.covariance, centered.T @ centered / len(vectors), atol=1e-6
    )
    assert background.covariance.shape == (DIMENSION, DIMENSION)


def test_an_encoder_has_the_same_background_on_every_call() -> None:
    first, second = (measure_background(PlaceEncoder()) for _ in range(2))
    assert first.mean.tobytes() == second.mean.tobytes()
    assert first.covariance.tobytes() == second.covariance.tobytes()


def test_it_is_measured_once_and_not_before_somebody_needs_it() -> None:
    encoder = CountingEncoder()
    background = when_needed(encoder)
    assert encoder.batches == 0
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: background(), range(8)))
    assert encoder.batches == 1
    assert all(each is found[0] for each in found)


def test_the_embedded_encoder_has_a_background(encoder: OnnxMiniLM) -> None:
    background = measure_background(encoder)
    assert background.covariance.shape == (1152, 1152)
    assert np.linalg.eigvalsh(background.covariance).min() > -1e-9
    assert 0.1 < np.linalg.norm(background.mean) < 0.9
