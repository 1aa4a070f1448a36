"""Stand-ins for the models, and small real snapshots, for tests of everything around them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from router.answering import Answerer
from router.head import Head
from router.interfaces import (
    Embeddings,
    FinishReason,
    Generation,
    LanguageModel,
    PromptedEncoder,
    PromptedInput,
    Scores,
    Written,
)
from router.routing import Router
from router.server import RouterServer
from router.settings import ServerSettings
from router.snapshot import Snapshot
from router.tasks import DataSummary, PromptSummary, ServedTask, SoftPrompt, TaskRecord
from router.tenant_routers import only
from router.tracing import Tracing

DIMENSION = 4096
HIDDEN_SIZE = 8
PROMPT_TOKENS = 4
WINDOW_WORDS = 256
BASE_MODEL = "fake-base-fingerprint"

TASKS = {
    "weather": ("sun", "rain", "snow"),
    "sport": ("goal", "match", "team"),
    "story": None,
}
"""Tasks of `make_snapshot`: the outputs, or None for free text. A task's name is its centroid."""


class FakeEncoder:
    """Words hash to dimensions; texts that share a word are close. Records its batches.

    `blocked` holds every `encode` back until it is set; `broken` is raised instead of encoding.
    """

    name = "fake-encoder"
    fingerprint = "fake-encoder:1"
    dimension = DIMENSION
    window = WINDOW_WORDS

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[str] = set()
        self.blocked = threading.Event()
        self.blocked.set()
        self.broken: Exception | None = None

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """One token a word, at most the window."""
        return [min(len(text.split()), WINDOW_WORDS) for text in texts]

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Unit vectors of word counts."""
        self.batches.append(list(texts))
        self.threads.add(threading.current_thread().name)
        assert self.blocked.wait(20)
        if self.broken is not None:
            raise self.broken
        vectors = np.zeros((len(texts), DIMENSION), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split()[:WINDOW_WORDS]:
                vectors[row, zlib.crc32(word.encode()) % DIMENSION] += 1
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
        truncated = np.array([len(text.split()) > WINDOW_WORDS for text in texts], np.bool_)
        return Embeddings(vectors, truncated)


class FakeLanguageModel:
    """Scores the outputs that occur in the text best; generates the text's words, one a step.

    `batches` are what was scored or read together. `blocked` holds every one of them back until it
    is set; where `slow` is set, `steps` must be released once for every step of generation. A text
    that is in `broken` cannot be read, and a step fails while `broken_step` is set.
    """

    name = "fake-base"
    fingerprint = BASE_MODEL
    hidden_size = HIDDEN_SIZE

    def __init__(self, *, slow: bool = False) -> None:
        self.batches: list[list[PromptedInput]] = []
        self.blocked = threading.Event()
        self.blocked.set()
        self.slow = slow
        self.steps = threading.Semaphore(0)
        self.stopped_rows: list[str] = []
        self.broken: set[str] = set()
        self.broken_step: Exception | None = None
        self.room = 1000

    def score(
        self, inputs: Sequence[PromptedInput], outputs: Sequence[Sequence[str]]
    ) -> list[Scores]:
        """0 for an output that occurs in the text, -1 for the others. A token is a word."""
        self.begin(inputs)
        return [
            Scores(
                np.array([0.0 if label in item.text else -1.0 for label in labels], np.float32),
                min(len(item.text.split()), WINDOW_WORDS),
                tuple(len(label.split()) for label in labels),
                truncated=len(item.text.split()) > WINDOW_WORDS,
            )
            for item, labels in zip(inputs, outputs, strict=True)
        ]

    def start_batch(self) -> FakeRunningBatch:
        """The words of each text in capitals, until they end or `max_new_tokens`."""
        return FakeRunningBatch(self)

    def generate(self, inputs: Sequence[PromptedInput], max_new_tokens: int) -> list[Generation]:
        """All of them in one batch."""
        batch = self.start_batch()
        rows = [batch.prepare(item, max_new_tokens) for item in inputs]
        assert batch.join(rows) == len(rows)
        answers: dict[int, Generation] = {}
        while len(batch):
            for written in batch.step():
                if written.generation is not None:
                    answers[id(written.row)] = written.generation
        return [answers[id(row)] for row in rows]

    def begin(self, inputs: Sequence[PromptedInput]) -> None:
        """Work on a batch."""
        self.batches.append(list(inputs))
        assert self.blocked.wait(20)
        for item in inputs:
            if item.text in self.broken:
                raise RuntimeError(f"cannot read {item.text}")


@dataclass(eq=False)
class FakeRow:
    """A row of a `FakeRunningBatch`, and how many of its words were written."""

    item: PromptedInput
    limit: int
    words: list[str]
    written: int = 0


class FakeRunningBatch:
    """See `FakeLanguageModel`."""

    def __init__(self, model: FakeLanguageModel) -> None:
        self._model = model
        self._rows: list[FakeRow] = []

    def __len__(self) -> int:
        return len(self._rows)

    def prepare(self, item: PromptedInput, max_new_tokens: int) -> FakeRow:
        """A row of the text's words in capitals."""
        return FakeRow(item, max_new_tokens, item.text.upper().split())

    def join(self, rows: Sequence[FakeRow]) -> int:
        """As many as the model has room for."""
        joining = list(rows[: self._model.room - len(self._rows)])
        if joining:
            self._model.begin([row.item for row in joining])
            self._rows += joining
        return len(joining)

    def step(self) -> list[Written[FakeRow]]:
        """One word for every row."""
        if self._model.slow:
            assert self._model.steps.acquire(timeout=20)
        if self._model.broken_step is not None:
            raise self._model.broken_step
        return [self._write(row) for row in list(self._rows)]

    def drop(self, row: FakeRow) -> None:
        """Let a row leave."""
        self._rows.remove(row)
        self._model.stopped_rows.append(row.item.text)

    def _write(self, row: FakeRow) -> Written[FakeRow]:
        if row.written < min(row.limit, len(row.words)):
            row.written += 1
            return Written(row, f"{row.words[row.written - 1]} ", None)
        self._rows.remove(row)
        text = "".join(f"{word} " for word in row.words[: row.written])
        reason: FinishReason = "length" if row.written == row.limit else "stop"
        ended = Generation(text, reason, len(row.words), row.written, truncated=False)
        return Written(row, "", ended)


class FixedLive:
    """Serves the snapshot that it is given."""

    def __init__(self, snapshot: Snapshot, newest_revision: int = 0, problem: str = "") -> None:
        self.snapshot = snapshot
        self.newest_revision = newest_revision or snapshot.revision
        self.problem = problem


def make_task(name: str, outputs: tuple[str, ...] | None, number: int = 0) -> ServedTask:
    """A task with a prompt `[4, 8]` that is filled with its number."""
    record = TaskRecord(
        name=name,
        revision=1,
        created_at="2026-11-24T01:02:03.456+00:00",
        description=f"all about {name}",
        instruction=f"say something about {name}",
        outputs=outputs,
        data=DataSummary("d" * 64, rows=80, train_rows=64, validation_rows=16),
        encoder=FakeEncoder.fingerprint,
        embeddings_sha256="e" * 64,
        prompt=PromptSummary(
            sha256="f" * 64,
            tokens=PROMPT_TOKENS,
            hidden_size=HIDDEN_SIZE,
            base_model=BASE_MODEL,
            base_model_name="fake-base",
            metric="accuracy",
            scores={"prompt": 0.75, "majority": 0.5},
            settings={},
            steps=10,
            seconds=1.0,
        ),
    )
    values = np.full((PROMPT_TOKENS, HIDDEN_SIZE), number, np.float32)
    return ServedTask(record, SoftPrompt(values, BASE_MODEL))


def without_prompt(task: ServedTask) -> ServedTask:
    """The same task, only routed to."""
    return ServedTask(replace(task.record, prompt=None))


def make_snapshot(revision: int = 3, tasks: Sequence[ServedTask] = ()) -> Snapshot:
    """A real snapshot of `tasks` (default: TASKS). A text fits the tasks whose names are in it."""
    served = list(tasks) or [make_task(name, TASKS[name], n) for n, name in enumerate(TASKS)]
    centroids = FakeEncoder().encode([task.record.name for task in served]).vectors
    head = Head(
        kind="nearest-mean",
        encoder=FakeEncoder.fingerprint,
        tasks=tuple(task.record.key for task in served),
        rows=np.concatenate([centroids, np.zeros((len(served), 1), np.float32)], axis=1),
        row_task=np.arange(len(served)),
        thresholds=(0.3,) * len(served),
        ambiguity_margin=0.05,
        center=np.zeros(DIMENSION, np.float32),
        background=None,
        held_out=np.zeros(0, np.int32),
        summary={},
    )
    return Snapshot.build(revision, head, {task.record.name: task for task in served})


def make_router(
    encoder: FakeEncoder | None = None,
    model: LanguageModel | None = None,
    live: FixedLive | None = None,
    settings: ServerSettings | None = None,
    prompted: PromptedEncoder | None = None,
) -> Router:
    """A router over fakes. Without `model` it only routes; `prompted` reads encoder prompts."""
    settings = settings or make_settings()
    answerer = None
    if model is not None:
        answerer = Answerer(model, settings.answer_batches, encoder=prompted)
    return Router(
        live or FixedLive(make_snapshot()),
        encoder or FakeEncoder(),
        answerer,
        settings.limits,
        settings.routing_batches,
    )


def make_settings(**changes: Any) -> ServerSettings:
    """Settings for a server on any free port."""
    return replace(ServerSettings(home=Path("unused"), listen="127.0.0.1:0"), **changes)


@contextlib.contextmanager
def running_server(
    router: Router, settings: ServerSettings | None = None, tracing: Tracing | None = None
) -> Iterator[str]:
    """A real server on a real port, in a thread with an event loop of its own."""
    server = RouterServer(only(router), settings or make_settings(), "1.2.3", tracing)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server-loop")
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
        router.close()
        if router.answerer is not None:
            router.answerer.close()
