"""all-MiniLM-L6-v2 on torch, with encoder prompts: to tune them, and to embed on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertModel

from router.backends.checkpoint import cpu_multiplies_bfloat16
from router.errors import InvalidInputError


def pooled_states(
    model: Any,  # noqa: ANN401 - a Hugging Face model of BERT's architecture
    tokens: Tensor,
    mask: Tensor,
    prompts: Tensor,
    layers: Sequence[int],
    weights: Tensor,
) -> list[Tensor]:
    """The unit mean state of each text at each of the L `layers`, `[B, H]`, float32.

    `tokens` and `mask` `[B, T]` are padded on the right; `prompts` `[B, P, H]` stand in front of
    the embedded tokens, have no positions, and are left out of the means. Differentiable in them.
    `weights` `[B, L, T]` are what the tokens count in the means.
    """
    embedded = model.embeddings(input_ids=tokens)
    hidden = torch.cat([prompts.to(embedded.dtype), embedded], dim=1)
    seen = torch.cat([mask.new_ones(prompts.shape[:2]), mask], dim=1)
    hidden_from = torch.finfo(hidden.dtype).min
    attention = ((1 - seen[:, None, None]).to(hidden.dtype) * hidden_from).expand(
        -1, 1, seen.shape[1], -1
    )
    states = [hidden]
    for layer in model.encoder.layer[: max(layers)]:
        found = layer(states[-1], attention)
        states.append(found[0] if isinstance(found, tuple) else found)
    size = prompts.shape[1]
    return unit_means([states[layer][:, size:] for layer in layers], weights)


def unit_means(states: Sequence[Tensor], weights: Tensor) -> list[Tensor]:
    """The unit mean `[B, H]` of each of L `states` `[B, T, H]`, weighted by `[B, L, T]`."""
    return [
        torch.nn.functional.normalize((state.float() * weight[:, :, None]).sum(1), dim=-1)
        for state, weight in zip(states, weights.unbind(1), strict=True)
    ]


def even_weights(mask: Tensor) -> Tensor:
    """Weights `[B, T]` of a mean over the tokens in `mask` `[B, T]`."""
    return mask.float() / mask.sum(1, keepdim=True)


class MiniLMLearner:
    """The embedded encoder for gradients: a `router.interfaces.PromptedLearner`.

    On the processor, in bfloat16 where that multiplies it itself, with attention in plain products,
    for which torch's fused kernel is slow.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, layer: int) -> None:
        """Load the weights of a model folder. `layer` is the one whose states are averaged."""
        self.network = BertModel.from_pretrained(
            folder,
            dtype=torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32,
            attn_implementation="eager",
        )
        self.network.requires_grad_(False).train(False)
        self._tokenizer = tokenizer
        self._layer = layer

    def start(self, text: str, length: int) -> Tensor:
        """The embedded tokens of a text, without positions, repeated up to `length`: `[P, W]`."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise InvalidInputError("start of an encoder prompt", repr(text), "give a text")
        repeated = torch.tensor((ids * length)[:length])
        embeddings = self.network.embeddings
        with torch.no_grad():
            words = embeddings.word_embeddings(repeated)
            kinds = embeddings.token_type_embeddings.weight[0]
            start: Tensor = embeddings.LayerNorm(words + kinds)
        return start.float()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, cut to what a step can take."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def embed(self, ids: Sequence[Sequence[int]], prompt: Tensor) -> Tensor:
        """The unit mean states `[B, H]` of texts under `prompt`, differentiable in it."""
        longest = max(map(len, ids))
        tokens = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, of_text in enumerate(ids):
            tokens[row, : len(of_text)] = torch.tensor(of_text)
            mask[row, : len(of_text)] = 1
        prompts = prompt.expand(len(ids), -1, -1)
        weights = even_weights(mask)[:, None]
        [states] = pooled_states(self.network, tokens, mask, prompts, [self._layer], weights)
        return states
