"""Decoders with absolute positions: rows of one step that have written more and less.

Models such as BART take the position of a token from the width of their cache, where padding counts
too. Here every row's token is instead put at the position that it has in its own answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# How the position embeddings of BART, and those who took after it, are told where a token stands.
_WIDTH = "past_key_values_length"
_POSITIONS = "position_ids"


@contextmanager
def at_positions(embedding: nn.Module | None, positions: Tensor) -> Iterator[None]:
    """Within, a step of one token a row embeds them at `positions` `[B]`.

    `embedding` is the decoder's module for positions, None where it has none. Belongs to one thread
    at a time.
    """
    if embedding is None:
        yield
        return
    places = positions.tolist()
    signature = inspect.signature(embedding.forward)

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        vector_at = {}
        for place in set(places):
            call = signature.bind(*args, **kwargs)
            call.arguments[_WIDTH] = place
            if call.arguments.get(_POSITIONS) is not None:
                call.arguments[_POSITIONS] = torch.full_like(call.arguments[_POSITIONS], place)
            # All rows of a call stand at the same place: one of them says it all.
            vectors = module.forward(*call.args, **call.kwargs)
            vector_at[place] = vectors.reshape(-1, output.shape[-1])[0]
        return torch.stack([vector_at[place] for place in places])[:, None]

    handle = embedding.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
