"""What a head costs by itself: its share of a request, and of a publish."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from router.background import measure_background
from router.compiling import compile_head
from router.examples import sample_examples
from router.interfaces import Embeddings, Encoder, FloatArray
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import Policy, TaskKey
from trainer.clustering import cluster

ROWS = 20
CALLS = 400


def synthetic_tasks(vectors: FloatArray, tasks: int, rows: int = ROWS) -> list[TaskStatistics]:
    """Tasks around real embeddings `[N, D]`, that vary as real embeddings do, at half the size."""
    rng = np.random.default_rng(0)
    centered = vectors - vectors.mean(0)
    made = []
    for number in range(tasks):
        center = vectors[rng.integers(len(vectors))]
        drawn = center + 0.5 * centered[rng.integers(len(vectors), size=rows)]
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        made.append(
            TaskStatistics(TaskKey(f"t{number:06}", 1), to_fixed_point(drawn), cluster(drawn))
        )
    return made


def head_at_1000_tasks(encoder: Encoder, rows: Sequence[tuple[str, str]]) -> dict[str, object]:
    """Median time of one decision at 1,000 tasks, and its share of encoding and deciding."""
    texts = [text for text, _ in rows[:: max(len(rows) // 2000, 1)]]
    vectors = encoder.encode(texts).vectors
    background = measure_background(encoder)
    pool = PooledMoments(encoder.dimension)
    pool.update(synthetic_tasks(vectors, 1000))
    figures: dict[str, object] = {"tasks": 1000}
    with threadpool_limits(1):
        encoding = _median_ms(lambda n: encoder.encode([texts[n % len(texts)]]))
        figures["encoding one text, ms"] = f"{encoding:.2f}"
        for kind in ("auto", "lda", "nearest-mean"):
            head = compile_head(
                pool,
                policy=Policy(head=kind),
                encoder=encoder.fingerprint,
                dimension=encoder.dimension,
                background=background,
            )
            if kind == "auto":
                # Also where these tasks give the examples no weight: others would.
                examples = sample_examples(pool.tasks, head.center, background.whitening)
                head = replace(head, examples=examples, closeness_weight=1.0)
            snapshot = Snapshot.build(1, head, {})
            embedded = [encoder.encode([text]) for text in texts[:100]]
            deciding = _median_ms(partial(_decide, snapshot, embedded))
            figures[f"`{kind}`, ms"] = f"{deciding:.3f}"
            figures[f"`{kind}`, share of both"] = deciding / (deciding + encoding)
    return figures


def _decide(snapshot: Snapshot, embedded: Sequence[Embeddings], number: int) -> None:
    snapshot.decide(embedded[number % len(embedded)])


def _median_ms(call: Callable[[int], object]) -> float:
    seconds = []
    for number in range(CALLS):
        began = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[CALLS // 10 :])
