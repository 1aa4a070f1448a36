"""Decoders with absolute positions: tokens that stand elsewhere than in order.

Models such as BART take the position of a token from the width of their cache, where padding counts
too, and from its place among those that are fed. Here every token is instead put at the position
that it has in its own answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from router.backends.rows import sent

# How the position embeddings of BART, and those who took after it, are told where a token stands.
_WIDTH = "past_key_values_length"
_POSITIONS = "position_ids"


def takes_positions(embedding: nn.Module | None) -> bool:
    """Whether a decoder's module for positions can be told any, for each token."""
    return embedding is not None and _POSITIONS in inspect.signature(embedding.forward).parameters


@contextmanager
def at_positions(embedding: nn.Module | None, positions: Tensor) -> Iterator[None]:
    """Within, the tokens `[B, T]` that are fed are embedded at `positions` `[B, T]`.

    `embedding` is the decoder's module for positions, None where it has none. Belongs to one thread
    at a time.
    """
    if embedding is None:
        yield
        return
    found, where = np.unique(positions.cpu().numpy(), return_inverse=True)
    places, place_of = torch.from_numpy(found), torch.from_numpy(where).view(positions.shape)
    signature = inspect.signature(embedding.forward)

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        call = signature.bind(*args, **kwargs)
        if call.arguments.get(_POSITIONS) is not None:
            call.arguments[_POSITIONS] = sent(places, output.device)
            vectors = module.forward(*call.args, **call.kwargs).flatten(0, -2)
        else:
            vectors = torch.stack([at(module, call, place) for place in places.tolist()])
        chosen: Tensor = vectors[sent(place_of, output.device)]
        return chosen

    def at(module: nn.Module, call: inspect.BoundArguments, place: int) -> Tensor:
        call.arguments[_WIDTH] = place
        vectors: Tensor = module.forward(*call.args, **call.kwargs)
        return vectors.flatten(0, -2)[0]  # that of the first token, which stands at the width

    handle = embedding.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
