"""A head as bytes: it survives, and what is damaged is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from router.compiling import HEAD_KINDS, compile_head
from router.errors import CorruptArtifactError
from router.examples import NEIGHBOURS
from router.head import Head, best_row_per_task, digest, empty_head, with_thresholds
from router.pooled_moments import PooledMoments
from router.tasks import Policy, TaskKey
from tests.catalogs import random_task, wide_background

DIMENSION = 6


def a_head(kind: str = "auto", tasks: int = 3) -> Head:
    rng = np.random.default_rng(0)
    pool = PooledMoments(DIMENSION)
    pool.update(
        random_task(f"task-{n}", rng, rows=20, dimension=DIMENSION, clusters=1 + n % 3)
        for n in range(tasks)
    )
    return compile_head(
        pool,
        policy=Policy(head=kind),
        encoder="numbers:1",
        dimension=DIMENSION,
        background=wide_background(DIMENSION),
    )


HEAD = a_head()
BYTES = HEAD.to_bytes()
HEADER = 8 + int.from_bytes(BYTES[:8], "little")


@pytest.mark.parametrize("kind", [*HEAD_KINDS, "none"])
def test_a_head_survives_being_written_and_read(kind: str) -> None:
    head = empty_head("numbers:1", DIMENSION) if kind == "none" else a_head(kind)
    content = head.to_bytes()
    read = Head.from_bytes(content)
    for field in (
        "kind",
        "encoder",
        "tasks",
        "thresholds",
        "ambiguity_margin",
        "closeness_weight",
    ):
        assert getattr(read, field) == getattr(head, field)
    assert dict(read.summary) == dict(head.summary)
    for field in ("rows", "row_task", "center", "held_out"):
        np.testing.assert_array_equal(getattr(read, field), getattr(head, field))
    assert read.to_bytes() == content == head.to_bytes()
    vectors = np.random.default_rng(1).normal(size=(5, DIMENSION)).astype(np.float32)
    if head.tasks:
        assert read.scores(vectors).tobytes() == head.scores(vectors).tobytes()


def test_names_of_any_alphabet_and_infinite_thresholds_survive() -> None:
    head = replace(
        HEAD,
        encoder="größe:天気",
        tasks=(TaskKey("a.b_c-D", 1), TaskKey("a", 22), TaskKey("a", 3)),
        thresholds=(-np.inf, np.inf, 1e-300),
        ambiguity_margin=float("inf"),
    )
    read = Head.from_bytes(head.to_bytes())
    assert read.tasks == head.tasks
    assert read.thresholds == head.thresholds
    assert read.ambiguity_margin == float("inf")
    assert read.encoder == head.encoder


@pytest.mark.parametrize("kind", ["auto", "lda"])
def test_scores_are_those_of_rows_centre_background_and_examples(kind: str) -> None:
    head = a_head(kind)
    assert head.background is not None
    vectors = np.random.default_rng(1).normal(size=(7, DIMENSION)).astype(np.float32)
    centered = vectors.astype(np.float64) - head.center
    scores = centered @ head.rows[:, :-1].T + head.rows[:, -1]
    scores -= np.einsum("bd,de,be->b", centered, head.background, centered)[:, None]
    expected = np.stack(
        [scores[:, head.row_task == task].max(1) for task in range(len(head.tasks))], axis=1
    )
    assert (head.examples is not None) == (kind == "auto")
    if head.examples is not None:
        directions = head.examples.whitening
        units = centered - centered @ directions @ directions.T
        units /= np.linalg.norm(units, axis=1, keepdims=True)
        cosines = units @ (head.examples.vectors.T / 2.0**15) + head.examples.biases
        per_task = np.split(cosines, head.examples.starts[1:-1], axis=1)
        near = np.stack([np.sort(each, 1)[:, -NEIGHBOURS:].mean(1) for each in per_task], axis=1)
        expected += head.closeness_weight * near
    np.testing.assert_allclose(head.scores(vectors), expected, rtol=1e-3, atol=1e-3)


def test_the_best_task_is_the_one_with_the_highest_score_and_the_first_of_equals() -> None:
    head = a_head()
    vectors = np.random.default_rng(1).normal(size=(50, DIMENSION)).astype(np.float32)
    found = head.best_tasks(vectors)
    np.testing.assert_array_equal(found, head.scores(vectors).argmax(1))
    same = replace(head, rows=np.repeat(head.rows[:1], len(head.rows), axis=0), examples=None)
    assert not same.best_tasks(vectors).any()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_a_task_scores_as_its_best_row(counts: list[int], seed: int) -> None:
    row_task = np.repeat(np.arange(len(counts)), counts)
    scores = np.random.default_rng(seed).normal(size=(3, len(row_task))).astype(np.float32)
    expected = [[row[row_task == task].max() for task in range(len(counts))] for row in scores]
    np.testing.assert_array_equal(best_row_per_task(scores, row_task), expected)


def test_a_calibration_replaces_the_thresholds_and_nothing_else() -> None:
    held_out = np.zeros(3, np.int32)
    head = with_thresholds(HEAD, np.array([1, 2, 3], np.float32), 0.5, held_out, {"x": 1.0})
    assert (head.thresholds, head.ambiguity_margin, head.summary) == (
        (1.0, 2.0, 3.0),
        0.5,
        {"x": 1},
    )
    assert head.rows is HEAD.rows


def test_a_digest_is_sha256_in_hexadecimal() -> None:
    assert digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# Damage


def rebuilt(
    change: Callable[[dict[str, Any], dict[str, Any]], None],
) -> bytes:
    """The head's bytes after a change to its tensors or its description."""
    tensors = dict(load(BYTES))
    about = json.loads(json.loads(BYTES[8:HEADER])["__metadata__"]["head"])
    change(tensors, about)
    return save(tensors, metadata={"head": json.dumps(about)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: tensors.pop("rows"),
        lambda tensors, about: tensors.pop("row_task"),
        lambda tensors, about: tensors.pop("thresholds"),
        lambda tensors, about: tensors.pop("center"),
        lambda tensors, about: tensors.pop("held_out"),
        lambda tensors, about: tensors.update(rows=tensors["rows"][:-1].copy()),
        lambda tensors, about: tensors.update(rows=tensors["rows"][:, :-1].copy()),
        lambda tensors, about: tensors.update(rows=tensors["rows"][0].copy()),
        lambda tensors, about: tensors.update(rows=tensors["rows"] * np.nan),
        lambda tensors, about: tensors.update(center=tensors["center"] * np.inf),
        lambda tensors, about: tensors.update(center=np.zeros((), np.float32)),
        lambda tensors, about: tensors.update(background=tensors["background"] * np.nan),
        lambda tensors, about: tensors.update(background=np.eye(3, dtype=np.float32)),
        lambda tensors, about: tensors.update(thresholds=np.zeros(2)),
        lambda tensors, about: tensors.update(row_task=tensors["row_task"] + 1),
        lambda tensors, about: tensors.update(row_task=np.zeros_like(tensors["row_task"])),
        lambda tensors, about: about.update(format=1),
        lambda tensors, about: about.pop("format"),
        lambda tensors, about: about.pop("closeness_weight"),
        lambda tensors, about: tensors.pop("example_starts"),
        lambda tensors, about: tensors.pop("example_biases"),
        lambda tensors, about: tensors.update(examples=tensors["examples"][:-1].copy()),
        lambda tensors, about: tensors.update(examples=tensors["examples"][:, :-1].copy()),
        lambda tensors, about: tensors.update(examples=tensors["examples"].astype(np.float32)),
        lambda tensors, about: tensors.update(example_biases=tensors["example_biases"] * np.nan),
        lambda tensors, about: tensors.update(example_starts=tensors["example_starts"][1:].copy()),
        lambda tensors, about: tensors.update(example_starts=tensors["example_starts"] + 1),
        lambda tensors, about: tensors.update(example_starts=np.array([0, 40, 20, 60])),
        lambda tensors, about: about.pop("tasks"),
        lambda tensors, about: about.update(tasks=about["tasks"][:-1]),
        lambda tensors, about: about.update(tasks=[["only a name"]] * 3),
        lambda tensors, about: about.update(tasks=7),
        lambda tensors, about: about.update(ambiguity_margin="wide"),
        lambda tensors, about: about.update(ambiguity_margin=None),
    ],
)
def test_a_head_that_does_not_fit_together_is_refused(
    change: Callable[[dict[str, Any], dict[str, Any]], None],
) -> None:
    with pytest.raises(CorruptArtifactError, match="compiled head"):
        Head.from_bytes(rebuilt(change))


def test_the_unchanged_head_is_accepted_when_rebuilt() -> None:
    assert Head.from_bytes(rebuilt(lambda tensors, about: None)).to_bytes() == BYTES


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"not a head",
        b"\xff" * 100,
        BYTES[:7],
        BYTES[: HEADER - 1],
        BYTES[:HEADER],
        BYTES[:-1],
        BYTES + b"\0",
        save({"rows": np.zeros((1, 2), np.float32)}),
        save({}, metadata={"head": "{}"}),
        save({}, metadata={"head": "[]"}),
        save({}, metadata={"head": "7"}),
        save({}, metadata={"head": "{"}),
        save({}, metadata={"other": "{}"}),
    ],
)
def test_bytes_that_are_no_head_are_refused(content: bytes) -> None:
    with pytest.raises(CorruptArtifactError, match="any registration compiles a new head"):
        Head.from_bytes(content)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, HEADER - 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_a_damaged_description_is_refused_or_read_and_never_crashes(
    flips: list[tuple[int, int]],
) -> None:
    content = bytearray(BYTES)
    for position, flip in flips:
        content[position] ^= flip
    with contextlib.suppress(CorruptArtifactError):
        Head.from_bytes(bytes(content))
