"""Prefixes of a causal model: learned keys and values as what its cache holds before the text.

Prefix-tuning, Li and Liang 2021, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from router.backends.prompted_network import PrefixShape
from router.backends.started import remembers_all
from router.errors import IncompatibleModelError


def check_cache(cache: object, *, takes_positions: bool) -> None:
    """Refuse a model whose `cache`, after one token, shows that it cannot take a prefix.

    Raises:
        IncompatibleModelError: a layer does not attend to all tokens, or layers differ.
    """
    reason = ""
    if not takes_positions:
        reason = "it takes no position ids, so that padding would move the text"
    elif not isinstance(cache, DynamicCache) or not remembers_all(cache):
        reason = "not all of its layers attend to all tokens (sliding windows, recurrent layers)"
    elif len({part.shape for part in _parts(cache)}) != 1:
        reason = "its layers have keys and values of several shapes"
    if reason:
        raise IncompatibleModelError("method prefix", reason, "tune with --method prompt")


def prefix_of_cache(cache: DynamicCache, shape: PrefixShape) -> Tensor:
    """The prefix `[P, W]`, float32, of the first row of a cache."""
    # [heads, P, head size] -> [P, heads * head size], layer by layer, keys before values.
    parts = [part[0].transpose(0, 1).flatten(1).float() for part in _parts(cache)]
    return torch.cat(parts, dim=1).view(-1, shape.width)


def cache_of_prefixes(
    prefixes: Sequence[Tensor | None],
    shape: PrefixShape,
    config: PreTrainedConfig,
    dtype: torch.dtype,
) -> tuple[DynamicCache, Tensor]:
    """A new cache that holds each row's prefix (at least one has one), padded on the left.

    Returns it with the mask `[B, P]` of what is prefix in it. Differentiable in the prefixes.
    """
    distinct = {id(prefix): prefix for prefix in prefixes if prefix is not None}
    longest = max(len(prefix) for prefix in distinct.values())
    place_of = {key: place for place, key in enumerate(distinct, start=1)}
    # Every distinct prefix once, then one gather; row 0 is for rows that have none.
    padded = [functional.pad(p, (0, 0, longest - len(p), 0)) for p in distinct.values()]
    known = torch.stack([torch.zeros_like(padded[0]), *padded])
    places = [0 if prefix is None else place_of[id(prefix)] for prefix in prefixes]
    gathered = known[torch.tensor(places, device=known.device)].to(dtype)
    # [B, P, W] -> [layers, 2, B, heads, P, head size]
    parts = gathered.view(len(places), longest, shape.layers, 2, shape.heads, shape.head_size)
    parts = parts.permute(2, 3, 0, 4, 1, 5)
    lengths = [0 if prefix is None else len(prefix) for prefix in prefixes]
    begin = longest - torch.tensor(lengths, device=known.device)[:, None]
    mask = torch.arange(longest, device=known.device) >= begin
    return DynamicCache(
        ddp_cache_data=[(layer[0], layer[1]) for layer in parts], config=config
    ), mask


def _parts(cache: DynamicCache) -> list[Tensor]:
    """Keys and values `[B, heads, P, head size]` of each layer in turn."""
    layers = cast("list[DynamicLayer]", cache.layers)
    return [cast("Tensor", part) for layer in layers for part in (layer.keys, layer.values)]
