"""all-MiniLM-L6-v2 on torch, with encoder prompts: to tune them, and to embed on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pooled_states(
    model: Any,  # noqa: ANN401 - a Hugging Face model of BERT's architecture
    tokens: Tensor,
    mask: Tensor,
    prompts: Tensor,
    layers: Sequence[int],
) -> list[Tensor]:
    """The unit mean state of each text at each of the `layers`, `[B, H]`, float32.

    `tokens` and `mask` `[B, T]` are padded on the right; `prompts` `[B, P, H]` stand in front of
    the embedded tokens, have no positions, and are left out of the means. Differentiable in them.
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
    weights = mask[:, :, None]
    return [
        torch.nn.functional.normalize(
            (states[layer][:, size:].float() * weights).sum(1) / weights.sum(1), dim=-1
        )
        for layer in layers
    ]
