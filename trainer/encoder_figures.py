"""Measures encoders: how fast they embed, and how well a labelled file is routed with them."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from router.background import TEXTS, measure_background
from router.compiling import compile_head
from router.errors import InvalidInputError
from router.interfaces import Encoder, FloatArray
from router.pooled_moments import PooledMoments
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import Policy, TaskKey
from trainer.clustering import cluster
from trainer.evaluation_rows import LabelledText, task_names
from trainer.register import Progress

SHORT_TEXT = "will it rain in the hills tomorrow"

_BATCH_TEXTS = 256
_LEAST_SECONDS = 0.5
_TIMED_TEXTS = 30


@dataclass(frozen=True, slots=True)
class HeldOutRouting:
    """How a file's rows are routed by heads that were fitted without them.

    `accuracy` is the share whose best-scoring task is their own, before rejection.
    """

    accuracy: float
    rows: int
    tasks: int


@dataclass(frozen=True, slots=True)
class EncoderFigures:
    """What an encoder is, and what it costs and gives on this machine.

    `texts_per_second` is of the shipped general texts, or the file's, in batches;
    `short_text_ms` the median time of `SHORT_TEXT` alone; `routing` None without a file.
    """

    name: str
    dimension: int
    window: int
    fingerprint: str
    texts_per_second: float
    short_text_ms: float
    routing: HeldOutRouting | None = None


def measure_encoder(
    encoder: Encoder,
    rows: Sequence[LabelledText] = (),
    head: str = "auto",
    progress: Progress = lambda *_: None,
) -> EncoderFigures:
    """Measure `encoder`; with labelled `rows`, also how a `head` on it routes them.

    Raises:
        InvalidInputError: the rows are not at least two tasks of at least two rows each.
    """
    texts = [row.text for row in rows] or TEXTS.read_text(encoding="utf-8").splitlines()
    encoder.encode(texts[:_BATCH_TEXTS])  # a first run allocates what later ones use
    began = time.perf_counter()
    embedded = 0
    vectors: list[FloatArray] = []
    while embedded < len(texts) or time.perf_counter() - began < _LEAST_SECONDS:
        start = embedded % len(texts)
        found = encoder.encode(texts[start : start + _BATCH_TEXTS]).vectors
        if embedded < len(texts):
            vectors.append(found)
        embedded += len(found)
        progress(encoder.name, "embed", min(embedded, len(texts)), len(texts))
    seconds = time.perf_counter() - began
    return EncoderFigures(
        encoder.name,
        encoder.dimension,
        encoder.window,
        encoder.fingerprint,
        embedded / seconds,
        1000 * _median_seconds(encoder),
        _held_out_routing(encoder, rows, np.concatenate(vectors), head) if rows else None,
    )


def routing_rows(path: Path, rows: Sequence[LabelledText]) -> list[LabelledText]:
    """The rows that belong to a task, each input of a task once.

    Raises:
        InvalidInputError: they are not at least two tasks of at least two rows each.
    """
    own = list({(row.task, row.text): row for row in rows if row.task is not None}.values())
    counts = Counter(row.task for row in own)
    if len(counts) < 2:
        raise InvalidInputError(f"{path}", f"{len(counts)} tasks", "give rows of two or more")
    few = [str(task) for task, count in counts.items() if count < 2]
    if few:
        raise InvalidInputError(
            f"{path}", f"one row of {', '.join(few[:5])}", "give at least two rows of each task"
        )
    return own


def _median_seconds(encoder: Encoder) -> float:
    times = []
    for _ in range(_TIMED_TEXTS):
        began = time.perf_counter()
        encoder.encode([SHORT_TEXT])
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def _held_out_routing(
    encoder: Encoder, rows: Sequence[LabelledText], vectors: FloatArray, head: str
) -> HeldOutRouting:
    places: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        places[str(row.task)].append(place)
    names = task_names(places)
    pool = PooledMoments(encoder.dimension)
    pool.update(
        TaskStatistics(TaskKey(names[task], 1), to_fixed_point(mine), cluster(mine))
        for task, own in places.items()
        for mine in [vectors[own]]
    )
    compiled = compile_head(
        pool,
        policy=Policy(head=head),
        encoder=encoder.fingerprint,
        dimension=encoder.dimension,
        background=measure_background(encoder),
    )
    return HeldOutRouting(compiled.summary["held_out_accuracy"], len(rows), len(places))
