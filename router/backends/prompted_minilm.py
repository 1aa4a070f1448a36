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
from router.backends.minilm_graph import HEADS, HIDDEN, UNPROMPTED_LAYERS
from router.backends.rows import batches
from router.errors import InvalidInputError

_READ_ROWS = 32
# Positions of padding that cost less than the fixed work of one more forward and backward pass.
_MAX_PADDING = 48


def pooled_states(
    model: Any,  # noqa: ANN401 - a Hugging Face model of BERT's architecture
    tokens: Tensor,
    mask: Tensor,
    prompts: Tensor,
    layers: Sequence[int],
    weights: Tensor,
) -> list[Tensor]:
    """The unit mean state of each text at each of the L `layers`, `[B, H]`, float32.

    `tokens` and `mask` `[B, T]` are padded on the right; `prompts` `[B, P, W]` hold keys and values
    for the layers after the `UNPROMPTED_LAYERS`. Differentiable in them.
    `weights` `[B, L, T]` are what the tokens count in the means.
    """
    states = _unprompted(model, tokens, mask)
    states += _prompted(model, states[-1], mask, prompts, max(layers))
    return unit_means([states[layer] for layer in layers], weights)


def _unprompted(
    model: Any,  # noqa: ANN401 - as above
    tokens: Tensor,
    mask: Tensor,
) -> list[Tensor]:
    """States `[B, T, H]` of the embedded tokens and of the layers that know no prompts."""
    states = [model.embeddings(input_ids=tokens)]
    for layer in model.encoder.layer[:UNPROMPTED_LAYERS]:
        states.append(_through(layer, states[-1], mask))
    return states


def _prompted(
    model: Any,  # noqa: ANN401 - as above
    hidden: Tensor,
    mask: Tensor,
    prompts: Tensor,
    last: int,
) -> list[Tensor]:
    """States `[B, T, H]` of the layers from there on to `last`, whose tokens attend to prompts."""
    seen = torch.cat([mask.new_ones(prompts.shape[:2]), mask], dim=1)
    parts = torch.split(prompts.to(hidden.dtype), HIDDEN, dim=2)
    states = []
    for number, layer in enumerate(model.encoder.layer[UNPROMPTED_LAYERS:last]):
        hidden = _through(layer, hidden, seen, parts[2 * number], parts[2 * number + 1])
        states.append(hidden)
    return states


def _through(
    layer: Any,  # noqa: ANN401 - a layer of BERT
    hidden: Tensor,
    seen: Tensor,
    more_keys: Tensor | None = None,
    more_values: Tensor | None = None,
) -> Tensor:
    """What a layer makes of states `[B, T, H]` that attend to those keys and values, and to `seen`.

    `seen` `[B, P + T]`. Attention is written in plain products: on processors, torch's fused kernel
    is slow in the backward pass.
    """
    attention = layer.attention.self
    keys, values = attention.key(hidden), attention.value(hidden)
    if more_keys is not None and more_values is not None:
        keys, values = torch.cat([more_keys, keys], 1), torch.cat([more_values, values], 1)
    queries, keys, values = (
        each.unflatten(2, (HEADS, -1)).transpose(1, 2)
        for each in (attention.query(hidden), keys, values)
    )
    scores = queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5
    scores = scores.masked_fill(seen[:, None, None] == 0, torch.finfo(scores.dtype).min)
    attended = (scores.softmax(3) @ values).transpose(1, 2).flatten(2)
    joined = layer.attention.output(attended, hidden)
    found: Tensor = layer.output(layer.intermediate(joined), joined)
    return found


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

    On the processor, in bfloat16 where that multiplies it itself.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, layer: int) -> None:
        """Load the weights of a model folder. `layer` is the one whose states are averaged."""
        self.network = BertModel.from_pretrained(
            folder, dtype=torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
        )
        self.network.requires_grad_(False).train(False)
        self._tokenizer = tokenizer
        self._layer = layer

    def start(self, text: str, length: int) -> Tensor:
        """The keys and values that the layers compute for a text, repeated up to `length`.

        Its tokens are given no positions: with them, tuning fits few rows faster, and worse.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not ids:
            raise InvalidInputError("start of an encoder prompt", repr(text), "give a text")
        repeated = torch.tensor((ids * length)[:length])
        mask = torch.ones(1, length, dtype=torch.int64)
        embeddings: Any = self.network.embeddings
        layers: Any = self.network.encoder.layer
        parts = []
        with torch.no_grad():
            kinds = embeddings.token_type_embeddings.weight[0]
            hidden = embeddings.LayerNorm(embeddings.word_embeddings(repeated) + kinds)[None]
            for number, layer in enumerate(layers[: self._layer]):
                if number >= UNPROMPTED_LAYERS:
                    attention = layer.attention.self
                    parts += [attention.key(hidden), attention.value(hidden)]
                hidden = _through(layer, hidden, mask)
        return torch.cat(parts, dim=2)[0].float()

    def read(self, texts: Sequence[str]) -> list[Tensor]:
        """What the layers that know no prompts make of texts: `[T, H]` each."""
        ids = [torch.tensor(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]
        states: list[Tensor] = []
        for first in range(0, len(ids), _READ_ROWS):
            rows = ids[first : first + _READ_ROWS]
            tokens, mask = _padded(rows)
            with torch.no_grad():
                read = _unprompted(self.network, tokens, mask)[-1]
            states += [read[row, : len(tokens)] for row, tokens in enumerate(rows)]
        return states

    def embed(self, read: Sequence[Tensor], prompt: Tensor) -> Tensor:
        """The unit mean states `[B, H]` of texts under `prompt`, differentiable in it."""
        means: list[Tensor] = []
        order: list[int] = []
        lengths = [len(text) for text in read]
        for batch in batches(lengths, sum(lengths), _MAX_PADDING):
            hidden, mask = _padded([read[row] for row in batch])
            prompts = prompt.expand(len(batch), -1, -1)
            states = _prompted(self.network, hidden, mask, prompts, self._layer)
            means += unit_means(states[-1:], even_weights(mask)[:, None])
            order += batch
        return torch.cat(means)[torch.tensor(order).argsort()]


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one tensor, and where there is one: `[B, T, ...]`, `[B, T]`."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask.long()
