"""Tunes encoder prompts: soft prompts of the frozen sentence encoder, for label classifiers.

Embeddings tell apart what texts are about. Where a task's labels are something else (how urgent a
repair is, what kind of thing a question asks for), they need to be told. An encoder prompt tells:
vectors before the embedded tokens, tuned by gradient descent so that the embeddings of texts of one
label come close together, and away from those of the others (supervised contrastive loss, Khosla et
al. 2020, arXiv:2004.11362; of few rows for sentence encoders, SetFit, Tunstall et al. 2022,
arXiv:2209.11055, which moves all weights where this moves 30 KB).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import BertModel

from router.backends.checkpoint import cpu_multiplies_bfloat16
from router.backends.onnx_encoder import POOLED_LAYERS, load_tokenizer, model_folder
from router.backends.prompted_minilm import pooled_states
from router.interfaces import FloatArray, PromptedEncoder

# progress(task, stage, done, total)
Progress = Callable[[str, str, int, int], None]

# Chosen on rows held out of the training files of the example tasks, where 60 steps of 24 rows took
# twice as long and were no better.
LENGTH = 20
MOST_STEPS = 40
_ROWS_PER_STEP = 16
_LEARNING_RATE = 0.03
_WARM_UP_STEPS = 8
_TEMPERATURE = 0.1
_LONGEST_GRADIENT = 1.0
# What a text says of its label it mostly says early, and a step's time grows with the longest text.
_MOST_TOKENS = 96


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
    """Tunes prompts of the embedded encoder, `model`, whose weights stay as they are."""

    def __init__(self, steps: int = MOST_STEPS, device: str = "cpu") -> None:
        """Load the embedded encoder's weights for gradients, of at most 40 steps.

        In bfloat16 where the device multiplies that itself, with attention in plain products, for
        which torch's fused kernel is slow on a CPU.
        """
        fast = device != "cpu" or cpu_multiplies_bfloat16()
        self.model = BertModel.from_pretrained(
            model_folder(),
            dtype=torch.bfloat16 if fast else torch.float32,
            attn_implementation="eager",
        )
        self.model.requires_grad_(False).train(False)
        torch.nn.Module.to(self.model, device)
        self._device = device
        self._steps = min(steps, MOST_STEPS)
        self._tokenizer = load_tokenizer(model_folder(), _MOST_TOKENS)

    def tune(self, job: EncoderPromptJob, progress: Progress = lambda *_: None) -> FloatArray:
        """A prompt `[P, 384]`, float32. Deterministic for a job on the same kind of processor."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(job.texts))]
        labels = torch.from_numpy(job.labels).to(self._device)
        prompt = self._start(job.about).requires_grad_(True)
        optimizer = torch.optim.AdamW([prompt], _LEARNING_RATE, weight_decay=0.0)
        rows = label_pairs(job.labels, random.Random(job.name))
        for step in range(self._steps):
            chosen = [next(rows) for _ in range(min(_ROWS_PER_STEP, len(ids)))]
            vectors = self._embed([ids[i] for i in chosen], prompt)
            [gradient] = torch.autograd.grad(contrastive_loss(vectors, labels[chosen]), [prompt])
            prompt.grad = gradient
            torch.nn.utils.clip_grad_norm_([prompt], _LONGEST_GRADIENT)
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
                group["lr"] = _LEARNING_RATE * warm * (1 - step / self._steps)
            optimizer.step()
            progress(job.name, "encoder prompt", step + 1, self._steps)
        return np.asarray(prompt.detach().cpu().numpy(), np.float32)

    def _start(self, about: str) -> Tensor:
        """The embedded tokens of a text, without positions, repeated up to the length."""
        ids = self._tokenizer.encode(about or "text", add_special_tokens=False).ids
        repeated = torch.tensor((ids * LENGTH)[:LENGTH], device=self._device)
        embeddings = self.model.embeddings
        with torch.no_grad():
            words = embeddings.word_embeddings(repeated)
            kinds = embeddings.token_type_embeddings.weight[0]
            start: Tensor = embeddings.LayerNorm(words + kinds)
        return start.float()

    def _embed(self, ids: Sequence[Sequence[int]], prompt: Tensor) -> Tensor:
        """The unit mean states of the last layer `[B, H]`, under `prompt`."""
        longest = max(map(len, ids))
        tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, of_text in enumerate(ids):
            tokens[row, : len(of_text)] = torch.tensor(of_text)
            mask[row, : len(of_text)] = 1
        [last] = pooled_states(
            self.model,
            tokens.to(self._device),
            mask.to(self._device),
            prompt.expand(len(ids), -1, -1),
            POOLED_LAYERS[-1:],
        )
        return last


class TaskPrompting:
    """Encoder prompts of one task: a `trainer.label_classifier.Prompting`."""

    def __init__(
        self,
        tuner: EncoderPromptTuner,
        encoder: PromptedEncoder,
        job: EncoderPromptJob,
        progress: Progress = lambda *_: None,
    ) -> None:
        self._tuner = tuner
        self._encoder = encoder
        self._job = job
        self._progress = progress

    def tune(self, rows: NDArray[np.int64]) -> FloatArray:
        """An encoder prompt `[P, W]`, tuned on the rows of these numbers."""
        job = self._job
        texts = [job.texts[row] for row in rows]
        return self._tuner.tune(replace(job, texts=texts, labels=job.labels[rows]), self._progress)

    def embed(self, prompt: FloatArray, rows: NDArray[np.int64]) -> FloatArray:
        """The embeddings `[n, D]` of the rows of these numbers under a prompt."""
        texts = [self._job.texts[row] for row in rows]
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
