"""A batch whose inputs have been read, to be continued with output tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor
from transformers import Cache, EncoderDecoderCache


@dataclass(frozen=True, slots=True)
class Started:
    """A batch whose inputs have been read: what continuing it with output tokens needs.

    `next_logits` `[B, V]` are for the first output token; `mask` `[B, S]` covers the inputs;
    `encoded` `[B, S, H]` is the encoder's output, if there is an encoder.
    """

    next_logits: Tensor
    cache: Cache
    mask: Tensor
    encoded: Tensor | None = None

    def select(self, rows: Tensor) -> Started:
        """The rows of these indices `[N]`, repeats allowed."""
        cache = _shallow_copy(self.cache)
        cache.batch_select_indices(rows)
        return Started(
            self.next_logits,
            cache,
            self.mask[rows],
            None if self.encoded is None else self.encoded[rows],
        )


def _shallow_copy(cache: Cache) -> Cache:
    """A cache of the same tensors: selecting its rows and adding to it leave `cache` as it is."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(
            _shallow_copy(cache.self_attention_cache), _shallow_copy(cache.cross_attention_cache)
        )
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
