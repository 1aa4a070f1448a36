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

from router.interfaces import Encoder

if TYPE_CHECKING:
    from router.fitting import Background

TEXTS = Path(__file__).with_name("general_texts.txt")


def measure_background(encoder: Encoder) -> Background:
    """Mean and covariance of the encoder's embeddings of the shipped texts."""
    from router.fitting import Background

    vectors = encoder.encode(TEXTS.read_text(encoding="utf-8").splitlines()).vectors
    vectors = vectors.astype(np.float64)
    return Background(vectors.mean(0), np.cov(vectors.T, bias=True))


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
