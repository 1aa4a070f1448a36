"""The head: the function from an embedding to task scores, compiled for one catalog revision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from router.approximate_index import ApproximateIndex
from router.errors import CorruptArtifactError
from router.examples import Closeness, Examples
from router.interfaces import FloatArray
from router.probability import MatchProbability
from router.quadratic_form import QuadraticForm
from router.tasks import TaskKey
from router.tensor_file import tensor_file

HEAD_FORMAT = 3
ROWS_TENSOR = "rows"

_ROW_BLOCKS = "row_blocks"

CALIBRATION_STEPS = 20
CALIBRATION_LEVELS = tuple(step / CALIBRATION_STEPS for step in range(1, CALIBRATION_STEPS))
"""Q levels of the quantiles of scores that a head keeps, to tell drift."""


@dataclass(frozen=True)
class Head:
    """Scores for all tasks from one inner-product search, and the thresholds that go with them.

    The score of row m for an embedding x `[D]` is `rows[m] . [x - center ; 1] + offset(x)`, where
    `offset(x) = -(x - center)' background (x - center)` is the same for all rows, so that it
    matters for rejection and not for the order. A task scores as its best row. Where the head has
    `examples`, the closeness to a task's examples is added, times `closeness_weight`.

    rows `[M, D + 1]`, row_task `[M]`, thresholds `[K]`, center `[D]`, background `[D, D]` or None.
    `held_out` `[N]` is the number of the task that each stored row was routed to by a head that
    was fitted without it (-1: rejected), in the order of `tasks` and, within a task, of its rows.
    `calibration` `[K, 1 + Q]` tells of the rows that each task scored best for so, accepted or not:
    how many they are, and quantiles of their scores (NaN for none). None in heads of old.
    `approximate` finds the rows that are likely to be the best, where they are many.
    """

    kind: str
    encoder: str
    tasks: tuple[TaskKey, ...]
    rows: FloatArray
    row_task: NDArray[np.int64]
    thresholds: tuple[float, ...]
    ambiguity_margin: float
    center: FloatArray
    background: FloatArray | None
    held_out: NDArray[np.int32]
    summary: Mapping[str, float]
    probability: MatchProbability | None = None
    examples: Examples | None = None
    closeness_weight: float = 0.0
    calibration: NDArray[np.float64] | None = None
    approximate: ApproximateIndex | None = None

    @cached_property
    def number_of(self) -> Mapping[TaskKey, int]:
        """The number of each task."""
        return dict(zip(self.tasks, range(len(self.tasks)), strict=True))

    def row_ends(self, rows: Mapping[TaskKey, int]) -> NDArray[np.int64]:
        """Where each task's rows end `[K]` in `held_out`; `rows` is how many a task stores.

        Which never changes, so that it is asked for once.
        """
        ends: NDArray[np.int64] | None = self.__dict__.get("_row_ends")
        if ends is None:
            ends = np.cumsum([*map(rows.__getitem__, self.tasks)], dtype=np.int64)
            self.__dict__["_row_ends"] = ends
        return ends

    def queries(self, vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Embeddings `[B, D]` to queries `[B, D + 1]` for the rows, and score offsets `[B]`."""
        queries = self._queries(vectors)
        return queries, self._offsets(queries[:, :-1])

    def closeness(self) -> Closeness | None:
        """What the examples add to the scores of queries; None where the head has none."""
        return self._closeness

    def scores(self, vectors: FloatArray) -> FloatArray:
        """Scores `[B, K]` of every task for embeddings `[B, D]`. For evaluation, not serving."""
        queries, offsets = self.queries(vectors)
        return self._scores(queries) + offsets[:, None]

    def best_tasks(self, vectors: FloatArray) -> NDArray[np.int64]:
        """The number of the best task `[B]` for embeddings `[B, D]`. For evaluation, not serving.

        Of equals the first, as in the index.
        """
        best: NDArray[np.int64] = self._scores(self._queries(vectors)).argmax(1)
        return best

    def _queries(self, vectors: FloatArray) -> FloatArray:
        queries = np.ones((len(vectors), len(self.center) + 1), np.float32)
        np.subtract(vectors, self.center, out=queries[:, :-1])
        return queries

    def _scores(self, queries: FloatArray) -> FloatArray:
        scores = best_row_per_task(queries @ self.rows.T, self.row_task)
        closeness = self.closeness()
        if closeness is not None:
            closeness.add_to(scores, queries[:, :-1])
        return scores

    def to_bytes(self) -> bytes:
        """A safetensors file; equal heads give equal bytes."""
        return b"".join(self.to_file())

    def to_file(self, row_blocks: Sequence[str] = ()) -> list[memoryview]:
        """The bytes of `to_bytes`, in parts.

        With `row_blocks` the rows are not among them, but the digests of the files that have them.
        """
        tensors: dict[str, NDArray[np.generic]] = {
            "row_task": self.row_task,
            "thresholds": np.array(self.thresholds, np.float64),
            "center": self.center,
            "held_out": self.held_out,
        }
        if not row_blocks:
            tensors[ROWS_TENSOR] = self.rows
        if self.background is not None:
            tensors["background"] = self.background
        if self.examples is not None:
            tensors["examples"] = self.examples.vectors
            tensors["example_biases"] = self.examples.biases
            tensors["example_starts"] = self.examples.starts
            tensors["whitening"] = self.examples.whitening
        if self.calibration is not None:
            tensors["calibration"] = self.calibration
        if self.approximate is not None:
            tensors["approximate_projection"] = self.approximate.projection
            tensors["approximate_index"] = self.approximate.content
        about = {
            "format": HEAD_FORMAT,
            "kind": self.kind,
            "encoder": self.encoder,
            "tasks": self.tasks,
            "ambiguity_margin": self.ambiguity_margin,
            "closeness_weight": self.closeness_weight,
            "summary": dict(self.summary),
        }
        if self.probability is not None:
            about["probability"] = asdict(self.probability)
        metadata = {"head": json.dumps(about, sort_keys=True)}
        if row_blocks:
            metadata[_ROW_BLOCKS] = json.dumps(row_blocks)
        return tensor_file(tensors, metadata)

    @classmethod
    def from_bytes(
        cls, content: bytes, read_block: Callable[[str], FloatArray] | None = None
    ) -> Head:
        """The head that `to_file` wrote. `read_block` gives the rows of a block by its digest.

        Raises:
            CorruptArtifactError: not a head, of another format, or inconsistent in itself.
        """
        try:
            tensors = load(content)
            about = json.loads(_metadata(content)["head"])
            if about["format"] != HEAD_FORMAT:
                raise ValueError(f"format {about['format']}")
            blocks = row_blocks(content)
            if blocks and read_block is not None:
                tensors[ROWS_TENSOR] = np.concatenate([read_block(block) for block in blocks])
            head = cls(
                about["kind"],
                about["encoder"],
                tuple(TaskKey(*key) for key in about["tasks"]),
                tensors[ROWS_TENSOR],
                tensors["row_task"],
                tuple(tensors["thresholds"].tolist()),
                float(about["ambiguity_margin"]),
                tensors["center"],
                tensors.get("background"),
                tensors["held_out"],
                about["summary"],
                MatchProbability(**about["probability"]) if "probability" in about else None,
                _examples(tensors),
                float(about["closeness_weight"]),
                tensors.get("calibration"),
                _approximate(tensors),
            )
            head._check()
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(
                "compiled head", error, "publish again: any registration compiles a new head"
            ) from error
        return head

    def _check(self) -> None:
        dimension = len(self.center)
        floats: Sequence[FloatArray] = [self.rows, self.center]
        if self.background is not None:
            floats = [*floats, self.background]
        if not (
            self.rows.ndim == 2
            and self.rows.shape[1] == dimension + 1
            and self.row_task.shape == (len(self.rows),)
            and set(np.unique(self.row_task)) == set(range(len(self.tasks)))
            and len(self.thresholds) == len(self.tasks)
            and (self.background is None or self.background.shape == (dimension, dimension))
            and (
                self.calibration is None
                or self.calibration.shape == (len(self.tasks), 1 + len(CALIBRATION_LEVELS))
            )
            and all(np.isfinite(array).all() for array in floats)
            and (self.examples is None or self.examples.fit(len(self.tasks), dimension))
            and (self.approximate is None or self.approximate.fits(*self.rows.shape))
        ):
            raise ValueError("shapes or values do not fit together")

    def _offsets(self, centered: FloatArray) -> FloatArray:
        if self._form is None:
            return np.zeros(len(centered), np.float32)
        return -self._form.of(centered)

    @cached_property
    def _closeness(self) -> Closeness | None:
        if self.examples is None:
            return None
        return Closeness(self.examples, self.closeness_weight)

    @cached_property
    def _form(self) -> QuadraticForm | None:
        return None if self.background is None else QuadraticForm(self.background)


def empty_head(encoder: str, dimension: int) -> Head:
    """The head of a catalog with no live task: everything is unknown."""
    return Head(
        kind="none",
        encoder=encoder,
        tasks=(),
        rows=np.zeros((0, dimension + 1), np.float32),
        row_task=np.zeros(0, np.int64),
        thresholds=(),
        ambiguity_margin=0.0,
        center=np.zeros(dimension, np.float32),
        background=None,
        held_out=np.zeros(0, np.int32),
        summary={},
    )


def with_thresholds(
    head: Head,
    thresholds: Sequence[float],
    ambiguity_margin: float,
    held_out: NDArray[np.int32],
    summary: Mapping[str, float],
) -> Head:
    """`head` with its calibration."""
    return replace(
        head,
        thresholds=tuple(float(value) for value in thresholds),
        ambiguity_margin=float(ambiguity_margin),
        held_out=held_out,
        summary=summary,
    )


def best_row_per_task(row_scores: FloatArray, row_task: NDArray[np.int64]) -> FloatArray:
    """Scores of rows `[B, M]` to scores of tasks `[B, K]`; the rows of a task are contiguous.

    They are the same array where every task has one row.
    """
    starts = np.flatnonzero(np.diff(row_task, prepend=-1))
    if len(starts) == len(row_task):
        return row_scores
    last = np.append(starts[1:], len(row_task)) - 1
    # A task has few rows. All tasks' first, second, ... ones at a time: a third of the time that
    # `np.maximum.reduceat` takes.
    best: FloatArray = row_scores.take(starts, axis=1)
    for place in range(1, int((last - starts).max()) + 1):
        np.maximum(best, row_scores.take(np.minimum(starts + place, last), axis=1), out=best)
    return best


def _examples(tensors: Mapping[str, NDArray[Any]]) -> Examples | None:
    if "examples" not in tensors:
        return None
    return Examples(
        tensors["examples"],
        tensors["example_biases"],
        tensors["example_starts"],
        tensors["center"],
        tensors["whitening"],
    )


def _approximate(tensors: Mapping[str, NDArray[Any]]) -> ApproximateIndex | None:
    if "approximate_index" not in tensors:
        return None
    return ApproximateIndex(tensors["approximate_projection"], tensors["approximate_index"])


def digest(content: bytes) -> str:
    """SHA-256 of an artifact, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def row_blocks(content: bytes) -> list[str]:
    """The digests of the files that have a head's rows, from its own; none where that has them.

    Raises:
        KeyError, ValueError: not a head.
    """
    blocks: list[str] = json.loads(_metadata(content).get(_ROW_BLOCKS, "[]"))
    return blocks


def _metadata(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return metadata
