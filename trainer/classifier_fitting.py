"""Fits the label classifiers of tasks from their texts, and stores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray, prompted_encoder
from router.loading import CLASSIFIER_TENSOR, ENCODER_PROMPT_TENSOR
from router.tasks import ClassifierSummary
from trainer.label_classifier import fit_classifier
from trainer.workshop import Workshop

# With torch, which is not waited for where no encoder prompt is tuned.
if TYPE_CHECKING:
    from trainer.encoder_prompts import EncoderPromptTuner, TaskPrompting

# progress(task, stage, done, total)
Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True, slots=True)
class LabelledTask:
    """What a classifier is fitted to: a task's inputs `[N]` and which of its `labels` each has.

    `instruction` says what the labels are about, for the encoder prompt.
    """

    name: str
    instruction: str
    labels: tuple[str, ...]
    inputs: Sequence[str]
    outputs: Sequence[str]


class ClassifierFitter:
    """Fits and stores label classifiers, with encoder prompts where the encoder reads them."""

    def __init__(
        self, workshop: Workshop, progress: Progress = lambda *_: None, steps: int | None = None
    ) -> None:
        """`steps` are those of tuning an encoder prompt; None for as many as serve well."""
        self._workshop = workshop
        self._progress = progress
        self._steps = steps
        self._encoder = prompted_encoder(workshop.encoder)
        self._tuner: EncoderPromptTuner | None = None

    def stored(
        self, task: LabelledTask, vectors: FloatArray, *, with_encoder_prompt: bool
    ) -> ClassifierSummary | None:
        """The classifier of a task, or None where it would not help.

        `vectors` `[N, D]` are the plain embeddings of the inputs.
        """
        fitted = fit_classifier(
            vectors,
            task.outputs,
            task.labels,
            self._workshop.encoder.encode(task.labels).vectors,
            self._prompting(task) if with_encoder_prompt else None,
        )
        if fitted is None:
            return None
        tensors: dict[str, NDArray[np.generic]] = {CLASSIFIER_TENSOR: fitted.rows}
        tokens = 0
        if fitted.encoder_prompt is not None:
            tensors[ENCODER_PROMPT_TENSOR] = fitted.encoder_prompt
            tokens = len(fitted.encoder_prompt)
        return ClassifierSummary(
            self._workshop.artifacts.write_tensors(tensors),
            fitted.prompt_weight,
            fitted.accuracy,
            tokens,
        )

    def _prompting(self, task: LabelledTask) -> TaskPrompting | None:
        if self._encoder is None:
            return None
        from trainer.encoder_prompts import (
            MOST_STEPS,
            EncoderPromptJob,
            EncoderPromptTuner,
            TaskPrompting,
        )

        number = {label: n for n, label in enumerate(task.labels)}
        job = EncoderPromptJob(
            task.name,
            " ".join([task.instruction, *task.labels]).strip(),
            task.inputs,
            np.array([number[output] for output in task.outputs]),
        )
        if self._tuner is None:
            self._tuner = EncoderPromptTuner(self._encoder, self._steps or MOST_STEPS)
        return TaskPrompting(self._tuner, self._encoder, job, task.labels, self._progress)
