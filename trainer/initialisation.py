"""Where a soft prompt starts from, before it is tuned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from router.backends.torch_model import TorchLanguageModel
from trainer.commands import Initialisation


def initial_prompt(
    model: TorchLanguageModel,
    kind: Initialisation,
    length: int,
    text: str,
    seed: int,
) -> Tensor:
    """A prompt `[P, H]`, float32, on the model's device.

    `text` repeats the embeddings of `text` (an instruction and the labels) up to the length;
    `vocabulary` takes the embeddings of random tokens (Lester et al. 2021, section 3.2); `random`
    draws a normal distribution as wide as the vocabulary. The last two are known to learn slower.
    """
    if kind == "text":
        return model.text_embeddings(text, length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocabulary_size, (length,), generator=generator)
    sampled = model.token_embeddings(tokens.tolist())
    if kind == "vocabulary":
        return sampled
    noise = torch.randn(sampled.shape, generator=generator).to(sampled.device)
    return noise * sampled.std() + sampled.mean()


def initial_text(instruction: str, labels: Sequence[str] | None) -> str:
    """What a prompt that starts from text says: the instruction, then every label."""
    return " ".join([instruction, *(labels or ())]).strip()
