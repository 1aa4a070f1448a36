"""Real catalogs in small: real files and real heads over an encoder that costs nothing."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router import sampling
from router.background import measure_background
from router.catalog import ARTIFACTS_FOLDER, HEADS_FOLDER
from router.fitting import Background
from router.interfaces import Embeddings, FloatArray
from router.loading import CLUSTERS_TENSOR, EMBEDDINGS_TENSOR, PROMPT_TENSOR, ServedModels
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import DataSummary, PromptSummary, TaskKey, TaskRecord
from trainer import head_writer
from trainer.clustering import cluster
from trainer.commands import PolicyChange
from trainer.workshop import Published, Workshop

DIMENSION = 24
HIDDEN_SIZE = 8
PROMPT_TOKENS = 4
BASE_MODEL = "small-base:1"


class PlaceEncoder:
    """A text's first word is a place, and the rest of it moves it a little. Deterministic."""

    name = "places"
    fingerprint = "places:1:own:window-64:numpy"
    dimension = DIMENSION
    window = 64

    def __init__(self, fingerprint: str = fingerprint) -> None:
        self.fingerprint = fingerprint

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """A token a word."""
        return [len(text.split()) for text in texts]

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Unit vectors `[B, 24]`."""
        vectors = np.zeros((len(texts), DIMENSION), np.float32)
        for row, text in enumerate(texts):
            place = _normal(text.split()[0])
            vectors[row] = place / np.linalg.norm(place) + 0.1 * _normal(text)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Embeddings(vectors, np.zeros(len(texts), np.bool_))


def texts_of(place: str, count: int, start: int = 0) -> list[str]:
    """Texts that lie near one place."""
    return [f"{place} {number}" for number in range(start, start + count)]


def write_rows(path: Path, texts: Iterable[str], outputs: Sequence[str] = ("yes", "no")) -> Path:
    """A JSONL file of these inputs, with the outputs in turn."""
    rows = [
        {"input": text, "output": outputs[number % len(outputs)]}
        for number, text in enumerate(texts)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def new_workshop(home: Path) -> Workshop:
    """A workshop with the small encoder."""
    return Workshop(home, PlaceEncoder())


def served_models(base_model: str | None = BASE_MODEL) -> ServedModels:
    """What a server with the small encoder demands of a catalog."""
    return ServedModels(PlaceEncoder.fingerprint, DIMENSION, place_background, base_model)


@functools.cache
def place_background() -> Background:
    """What the small encoder makes of text in general."""
    return measure_background(PlaceEncoder())


def wide_background(dimension: int) -> Background:
    """Text in general that lies in all directions alike."""
    return Background(np.zeros(dimension), np.eye(dimension) / dimension)


def new_record(
    workshop: Workshop,
    name: str,
    *,
    revision: int = 1,
    texts: Sequence[str] = (),
    with_prompt: bool = False,
    base_model: str = BASE_MODEL,
    **changes: Any,
) -> TaskRecord:
    """Store the files of a task and make its record."""
    texts = list(texts) or texts_of(name, 20)
    vectors = workshop.encoder.encode(texts).vectors
    rows = {
        EMBEDDINGS_TENSOR: to_fixed_point(vectors),
        CLUSTERS_TENSOR: cluster(vectors)[:, None],
    }
    prompt = None
    if with_prompt:
        values = prompt_values(name, revision)
        prompt = PromptSummary(
            sha256=workshop.artifacts.write_tensors({PROMPT_TENSOR: values}),
            tokens=PROMPT_TOKENS,
            hidden_size=HIDDEN_SIZE,
            base_model=base_model,
            base_model_name="small-base",
            metric="accuracy",
            scores={"prompt": 0.75, "majority": 0.5, "instruction": 0.5, "no_prompt": 0.25},
            settings={"steps": 10},
            steps=10,
            seconds=1.5,
        )
    about: dict[str, Any] = {
        "description": f"about {name}",
        "instruction": f"answer for {name}",
        "outputs": ("no", "yes"),
        **changes,
    }
    return TaskRecord(
        name=name,
        revision=revision,
        created_at="2026-11-24T01:02:03.456+00:00",
        data=DataSummary("d" * 64, len(texts), len(texts), 0),
        encoder=workshop.encoder.fingerprint,
        embeddings_sha256=workshop.artifacts.write_tensors(rows),
        prompt=prompt,
        **about,
    )


def publish(workshop: Workshop, *names: str, **options: Any) -> Published:
    """Publish new tasks (or, with `revision`, a next revision) in one catalog revision."""
    records = tuple(new_record(workshop, name, **options) for name in names)
    live = {record.name: record.revision for record in records}
    return workshop.publish("register", records=records, live=live)


SAMPLED_ROWS = 8


def pretend_that_catalogs_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are in blocks of four tasks, and decisions sampled at few rows, whatever the size."""
    monkeypatch.setattr(head_writer, "LEAST_TASKS", 4)
    monkeypatch.setattr(head_writer, "_TASKS_PER_BLOCK", 4)
    monkeypatch.setattr(sampling, "MOST_PAIRS", 0)
    monkeypatch.setattr(sampling, "SAMPLED_PAIRS", 1)
    monkeypatch.setattr(sampling, "LEAST_SAMPLED_ROWS", SAMPLED_ROWS)


def publish_few_rows(workshop: Workshop, *names: str, head: str) -> Published:
    """Publish new tasks of six rows each in one catalog revision, under a head of that kind."""
    records = tuple(new_record(workshop, name, texts=texts_of(name, 6)) for name in names)
    return workshop.publish(
        "register",
        records=records,
        live={record.name: 1 for record in records},
        change=PolicyChange(head=head),
    )


def prompt_values(name: str, revision: int = 1) -> FloatArray:
    """The prompt of a task: random, but always the same."""
    return np.resize(_normal(f"{name}@{revision}"), (PROMPT_TOKENS, HIDDEN_SIZE)).astype(np.float32)


def random_task(
    name: str,
    rng: np.random.Generator,
    *,
    rows: int = 20,
    dimension: int = 12,
    clusters: int = 1,
    revision: int = 1,
    spread: float = 0.6,
) -> TaskStatistics:
    """A task whose rows lie around a random direction."""
    center = rng.normal(size=dimension)
    vectors = center / np.linalg.norm(center) + spread / dimension**0.5 * rng.normal(
        size=(rows, dimension)
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    numbers = np.unique(np.arange(rows) % clusters, return_inverse=True)[1].astype(np.int16)
    return TaskStatistics(TaskKey(name, revision), to_fixed_point(vectors), numbers)


def artifact_file(home: Path, sha256: str) -> Path:
    """Where an artifact is stored."""
    return home / ARTIFACTS_FOLDER / sha256[:2] / sha256


def head_file(home: Path, sha256: str) -> Path:
    """Where a compiled head is stored."""
    return home / HEADS_FOLDER / sha256[:2] / sha256


def flip_byte(path: Path, position: int = -1) -> None:
    """Damage a file, as a bad disk would."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def file_digests(folder: Path) -> Mapping[str, str]:
    """The digest of every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _normal(text: str) -> FloatArray:
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    return rng.normal(size=DIMENSION).astype(np.float32)
