"""The background: what an encoder makes of text in general.

A task's inputs are told from what belongs to no task by comparing them with text in general. The
project ships 320 texts for that, written for it: requests, questions, notices, adverts and excerpts
of all kinds. Embedding them takes a second or less, so that every encoder gets a background.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from router.interfaces import Encoder, FloatArray

if TYPE_CHECKING:
    from router.fitting import Background

TEXTS = Path(__file__).with_name("general_texts.txt")


def general_texts() -> list[str]:
    """The shipped texts."""
    return TEXTS.read_text(encoding="utf-8").splitlines()


def embed_general_texts(encoder: Encoder) -> FloatArray:
    """The encoder's embeddings `[N, D]` of the shipped texts."""
    return encoder.encode(general_texts()).vectors


def background_of(vectors: FloatArray) -> Background:
    """Mean and covariance of embeddings `[N, D]`."""
    from router.fitting import Background

    exact = vectors.astype(np.float64)
    return Background(exact.mean(0), np.cov(exact.T, bias=True))


def measure_background(encoder: Encoder) -> Background:
    """Mean and covariance of the encoder's embeddings of the shipped texts."""
    return background_of(embed_general_texts(encoder))


def when_needed(encoder: Encoder) -> Callable[[], Background]:
    """Measures the background at the first call and remembers it, for all threads.

    A server needs none to route: only to explain, and to compile a head anew.
    """
    lock = threading.Lock()
    measured: list[Background] = []

    def background() -> Background:
        with lock:
            if not measured:
                measured.append(measure_background(encoder))
            return measured[0]

    return background
