"""Answers from the base model under a task's soft prompt, batched over calls and tasks.

A task with a closed set of outputs gets the most probable one; a task of free text is generated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from router.batching import BatchLimits, MicroBatcher
from router.interfaces import Generation, LanguageModel, Observer, PromptedInput, Scores
from router.label_classifier import LabelEvidence
from router.observing import UNOBSERVED

# Only used to put inputs of similar length together; a token is rarely shorter.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask of the base model.

    `outputs` are the closed set to choose from, or None for free text of at most
    `max_output_tokens`. `evidence` is what the task's label classifier says, where it has one.
    """

    input: PromptedInput
    outputs: tuple[str, ...] | None
    max_output_tokens: int
    evidence: LabelEvidence | None = None

    def choose(self, scores: Scores) -> int:
        """The index of the output that these scores and the evidence are for."""
        if self.evidence is None:
            return scores.best
        return self.evidence.best(scores.log_probabilities)


@dataclass(slots=True, eq=False)
class _Row:
    """A question in the queue; `on_piece` and `cancelled` are called in the worker thread."""

    question: Question
    on_piece: Callable[[str], None]
    cancelled: bool = False


class Answerer:
    """Answers questions; those of concurrent calls share the base model's batches."""

    def __init__(
        self, model: LanguageModel, limits: BatchLimits, observer: Observer = UNOBSERVED
    ) -> None:
        self.model = model
        self._batcher = MicroBatcher(
            self._work, _estimate_tokens, limits, name="answering", kind=_kind, observer=observer
        )

    @property
    def queued(self) -> int:
        """Questions that are waiting or being answered."""
        return self._batcher.unfinished

    async def answer(self, question: Question) -> AsyncGenerator[str | Generation]:
        """Pieces of text as they become final, then the whole `Generation`.

        Closing the iterator stops the row at the model's next step, and frees its place.

        Raises:
            OverloadedError: too many questions are waiting.
        """
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def on_piece(piece: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        row = _Row(question, on_piece)
        batch = asyncio.ensure_future(self._batcher.submit([row]))

        def on_done(done: asyncio.Future[list[Generation]]) -> None:
            # The batch ends after its last piece was put, so that None comes last. Asking for
            # the exception keeps asyncio from reporting one that nobody is left to wait for.
            pieces.put_nowait(None)
            if not done.cancelled():
                done.exception()

        batch.add_done_callback(on_done)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            [generation] = await batch
            yield generation
        finally:
            row.cancelled = True
            batch.cancel()

    def close(self) -> None:
        """Wait for the batch that is running and end its thread."""
        self._batcher.close()

    def _work(self, rows: Sequence[_Row]) -> list[Generation]:
        if rows[0].question.outputs is not None:
            return self._choose(rows)
        return self.model.generate(
            [row.question.input for row in rows],
            rows[0].question.max_output_tokens,
            on_piece=lambda position, piece: rows[position].on_piece(piece),
            cancelled=lambda position: rows[position].cancelled,
        )

    def _choose(self, rows: Sequence[_Row]) -> list[Generation]:
        inputs = [row.question.input for row in rows]
        outputs = [row.question.outputs or () for row in rows]
        answers = []
        for row, candidates, scores in zip(
            rows, outputs, self.model.score(inputs, outputs), strict=True
        ):
            chosen = row.question.choose(scores)
            label = candidates[chosen]
            row.on_piece(label)
            answers.append(
                Generation(
                    label,
                    "label",
                    scores.input_tokens,
                    scores.output_tokens[chosen],
                    scores.truncated,
                )
            )
        return answers


def _estimate_tokens(rows: Sequence[_Row]) -> list[int]:
    return [len(row.question.input.text.encode()) // _BYTES_PER_TOKEN + 1 for row in rows]


def _kind(row: _Row) -> int:
    """Rows of one batch are all scored, or all generated to the same length."""
    return 0 if row.question.outputs is not None else row.question.max_output_tokens
