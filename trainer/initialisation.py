"""Where a soft prompt starts from, before it is tuned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from router.backends.torch_model import TorchLanguageModel
from router.tasks import PromptMethod
from trainer.commands import Initialisation
from trainer.example_prompt import example_prompt


def initial_prompt(
    model: TorchLanguageModel,
    kind: Initialisation,
    length: int,
    instruction: str,
    labels: Sequence[str] | None,
    rows: Sequence[tuple[str, str]],
    seed: int,
    method: PromptMethod = "prompt",
) -> Tensor:
    """A prompt `[P, W]`, float32, on the model's device; `rows` are the training rows.

    A prefix starts as the keys and values that the layers compute for what a prompt would be.

    `examples` puts every label beside the mean encoder state of its rows (see
    `trainer.example_prompt`), and is `text` where that cannot be made; `text` repeats the
    embeddings of the instruction and the labels up to the length; `vocabulary` takes the embeddings
    of random tokens (Lester et al. 2021, section 3.2); `random` draws a normal distribution as wide
    as the vocabulary. The last two are known to learn slower.
    """
    prompt = _embedded(model, kind, length, instruction, labels, rows, seed)
    return prompt if method == "prompt" else model.keys_and_values(prompt)


def _embedded(
    model: TorchLanguageModel,
    kind: Initialisation,
    length: int,
    instruction: str,
    labels: Sequence[str] | None,
    rows: Sequence[tuple[str, str]],
    seed: int,
) -> Tensor:
    """The prompt `[P, H]` as input embeddings."""
    if kind == "examples" and labels is not None:
        made = example_prompt(model, length, instruction, labels, rows)
        if made is not None:
            return made.detach()
    if kind in ("examples", "text"):
        return model.text_embeddings(" ".join([instruction, *(labels or ())]).strip(), length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocabulary_size, (length,), generator=generator)
    sampled = model.token_embeddings(tokens.tolist())
    if kind == "vocabulary":
        return sampled
    noise = torch.randn(sampled.shape, generator=generator).to(sampled.device)
    return noise * sampled.std() + sampled.mean()
