"""Tunes encoder prompts: soft prompts of the frozen sentence encoder, for label classifiers.

Embeddings tell apart what texts are about. Where a task's labels are something else (how urgent a
repair is, what kind of thing a question asks for), they need to be told. An encoder prompt tells:
keys and values of a few virtual tokens, for the later layers (Prefix-Tuning, Li and Liang 2021,
arXiv:2101.00190), tuned by gradient descent so that the embeddings of texts of one label come close
together, and away from those of the others (supervised contrastive loss, Khosla et al. 2020,
arXiv:2004.11362; of few rows for sentence encoders, SetFit, Tunstall et al. 2022, arXiv:2209.11055,
which moves all weights where this moves 48 KB).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.interfaces import FloatArray, HalfArray, PromptedEncoder

# progress(task, stage, done, total)
Progress = Callable[[str, str, int, int], None]

# Chosen on rows held out of the training files of the example tasks and of other tasks with 80 rows
# each: longer ones, more layers, more steps or rows a step took longer and were no better.
LENGTH = 8
MOST_STEPS = 40
_ROWS_PER_STEP = 16
_LEARNING_RATE = 0.1
_WARM_UP_STEPS = 8
_TEMPERATURE = 0.1
_LONGEST_GRADIENT = 1.0
# What a prompt starts from where neither instruction nor labels have words.
_NO_WORDS = "text"


@dataclass(frozen=True, slots=True)
class EncoderPromptJob:
    """What to tune an encoder prompt on: texts, and the number of each one's label.

    `about` is the text that the prompt starts from: instruction and labels. `name` seeds the draws.
    """

    name: str
    about: str
    texts: Sequence[str]
    labels: NDArray[np.int64]


class EncoderPromptTuner:
    """Tunes prompts of an encoder, whose weights stay as they are, in at most 40 steps."""

    def __init__(self, encoder: PromptedEncoder, steps: int = MOST_STEPS) -> None:
        self.learner = encoder.for_gradients()
        self._steps = min(steps, MOST_STEPS)

    def tune(self, job: EncoderPromptJob, progress: Progress = lambda *_: None) -> HalfArray:
        """A prompt `[P, W]`. Deterministic for a job on the same kind of processor."""
        labels = torch.from_numpy(job.labels)
        rows = label_pairs(job.labels, random.Random(job.name))
        batch = min(_ROWS_PER_STEP, len(job.texts))
        steps = [[next(rows) for _ in range(batch)] for _ in range(self._steps)]
        seen = sorted({row for step in steps for row in step})
        texts = dict(zip(seen, self.learner.read([job.texts[row] for row in seen]), strict=True))
        prompt = self.learner.start(job.about.strip() or _NO_WORDS, LENGTH).requires_grad_(True)
        optimizer = torch.optim.AdamW([prompt], _LEARNING_RATE, weight_decay=0.0)
        for step, chosen in enumerate(steps):
            vectors = self.learner.embed([texts[i] for i in chosen], prompt)
            [prompt.grad] = torch.autograd.grad(contrastive_loss(vectors, labels[chosen]), [prompt])
            torch.nn.utils.clip_grad_norm_([prompt], _LONGEST_GRADIENT)
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
                group["lr"] = _LEARNING_RATE * warm * (1 - step / self._steps)
            optimizer.step()
            progress(job.name, "encoder prompt", step + 1, self._steps)
        return np.asarray(prompt.detach().numpy(), np.float16)


class TaskPrompting:
    """Encoder prompts of one task: a `trainer.label_classifier.Prompting`."""

    def __init__(
        self,
        tuner: EncoderPromptTuner,
        encoder: PromptedEncoder,
        job: EncoderPromptJob,
        labels: Sequence[str],
        progress: Progress = lambda *_: None,
    ) -> None:
        """`labels` `[C]` are the words of the numbers in the job."""
        self._tuner = tuner
        self._labels = labels
        self._encoder = encoder
        self._job = job
        self._progress = progress

    @property
    def tuned_dimensions(self) -> slice:
        """Those of the encoder."""
        return self._encoder.tuned_dimensions

    def tune(self, rows: NDArray[np.int64]) -> HalfArray:
        """An encoder prompt `[P, W]`, tuned on the rows of these numbers."""
        job = self._job
        texts = [job.texts[row] for row in rows]
        return self._tuner.tune(replace(job, texts=texts, labels=job.labels[rows]), self._progress)

    def embed(self, prompt: HalfArray, rows: NDArray[np.int64]) -> FloatArray:
        """The embeddings `[n, D]` of the rows of these numbers under a prompt."""
        return self._under(prompt, [self._job.texts[row] for row in rows])

    def embed_labels(self, prompt: HalfArray) -> FloatArray:
        """The embeddings `[C, D]` of the labels' words under a prompt."""
        return self._under(prompt, self._labels)

    def _under(self, prompt: HalfArray, texts: Sequence[str]) -> FloatArray:
        return self._encoder.encode_prompted(texts, [prompt] * len(texts))


def contrastive_loss(vectors: Tensor, labels: Tensor) -> Tensor:
    """How far unit vectors `[B, H]` of one label are from each other, next to all of the batch.

    For each row, the mean over the others of its label of -log of their share in the softmax of
    the cosines, divided by the temperature; rows without such others count as 0.
    """
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    cosines = (vectors @ vectors.T / _TEMPERATURE).masked_fill(itself, -torch.inf)
    same = (labels[:, None] == labels[None]) & ~itself
    shares = cosines.log_softmax(1).masked_fill(~same, 0.0)
    return -(shares.sum(1) / same.sum(1).clamp(min=1)).mean()


def label_pairs(labels: NDArray[np.int64], draw: random.Random) -> Iterator[int]:
    """Row numbers, all of them in one order after another; rows come in pairs of one label.

    Without pairs, where labels are many, hardly a row would meet another one of its label.
    """
    of_label = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    while True:
        pairs = []
        for rows in of_label:
            draw.shuffle(rows)
            pairs += [rows[i : i + 2] for i in range(0, len(rows), 2)]
        draw.shuffle(pairs)
        yield from (row for pair in pairs for row in pair)
