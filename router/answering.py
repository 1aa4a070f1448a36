"""Answers from the base model under a task's soft prompt, batched over calls and tasks.

A task with a closed set of outputs gets the most probable one; a task of free text is generated.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from router.batching import BatchLimits, MicroBatcher, about_tokens
from router.generation_queue import GenerationQueue
from router.interfaces import (
    Generation,
    LanguageModel,
    Observer,
    PromptedEncoder,
    PromptedInput,
    Scores,
)
from router.label_classifier import ClassifierInput, read_evidence
from router.observing import UNOBSERVED
from router.turns import ModelThread


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask of the base model.

    `outputs` are the closed set to choose from, or None for free text of at most
    `max_output_tokens`. `classified` is what the task's label classifier reads, where it has one.
    """

    input: PromptedInput
    outputs: tuple[str, ...] | None
    max_output_tokens: int
    classified: ClassifierInput | None = None


def choose_labels(
    model: LanguageModel, encoder: PromptedEncoder | None, questions: Sequence[Question]
) -> list[tuple[int, Scores]]:
    """The index of the output that each question of a closed set is answered with, and the scores.

    The base model and the label classifiers decide together.
    """
    scored = model.score(
        [question.input for question in questions],
        [question.outputs or () for question in questions],
    )
    evidence = read_evidence([question.classified for question in questions], encoder)
    return [
        (scores.best if found is None else found.best(scores.log_probabilities), scores)
        for found, scores in zip(evidence, scored, strict=True)
    ]


class Answerer:
    """Answers questions; those of concurrent calls share the base model's batches.

    Labels are scored in batches, free text is written by one running batch. The two take turns with
    the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        limits: BatchLimits,
        observer: Observer = UNOBSERVED,
        model_thread: ModelThread | None = None,
        encoder: PromptedEncoder | None = None,
    ) -> None:
        """`limits` hold for labels and for free text, each; `model_thread` is that of `model`.

        `encoder` reads texts under the encoder prompts of label classifiers.
        `observer` is told of the queues `scoring` and `generating`.
        """
        self.model = model
        self._encoder = encoder
        self._model_thread = model_thread or ModelThread()
        self._scoring = MicroBatcher(
            self._choose, _count_tokens, limits, name="scoring", observer=observer
        )
        self._generating = GenerationQueue(model, limits, self._model_thread, observer)

    @property
    def queued(self) -> dict[str, int]:
        """Questions in each queue, those that are being answered included."""
        return {
            "scoring": self._scoring.unfinished,
            "generating": self._generating.unfinished,
        }

    async def answer(self, question: Question) -> AsyncGenerator[str | Generation]:
        """Pieces of text as they become final, then the whole `Generation`.

        Closing the iterator takes the question out of its queue, and free text out of the running
        batch before its next step.

        Raises:
            OverloadedError: too many questions are waiting.
        """
        if question.outputs is not None:
            [generation] = await self._scoring.submit([question])
            yield generation.text
            yield generation
            return
        written = self._generating.write(question.input, question.max_output_tokens)
        async with aclosing(written) as steps:
            async for step in steps:
                yield step

    def close(self) -> None:
        """Wait for the batch of scores and the step that are running, and end the threads."""
        self._generating.close()
        self._scoring.close()

    def _choose(self, questions: Sequence[Question]) -> list[Generation]:
        """In the worker thread: the most probable output of each question."""
        chosen_labels = self._model_thread.run(
            partial(choose_labels, self.model, self._encoder, questions)
        )
        answers = []
        for question, (chosen, scores) in zip(questions, chosen_labels, strict=True):
            answers.append(
                Generation(
                    (question.outputs or ())[chosen],
                    "label",
                    scores.input_tokens,
                    scores.output_tokens[chosen],
                    scores.truncated,
                )
            )
        return answers


def _count_tokens(questions: Sequence[Question]) -> list[int]:
    return [about_tokens(question.input.text) for question in questions]
