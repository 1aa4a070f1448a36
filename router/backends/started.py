"""A batch whose inputs have been read, to be continued with output tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, slots=True)
class Started:
    """A batch whose inputs have been read: what continuing it with output tokens needs.

    `next_logits` `[B, V]` are for the next output token. Without an encoder `mask` `[B, S]` covers
    all that was read and written. With one it covers the inputs, `encoded` `[B, S, H]` is the
    encoder's output, and `written` `[B, T]` covers what the decoder was fed.
    """

    next_logits: Tensor
    cache: Cache
    mask: Tensor
    encoded: Tensor | None = None
    written: Tensor | None = None

    @property
    def decoder_mask(self) -> Tensor:
        """What each row may attend to of what the decoder remembers `[B, S]`."""
        return self.mask if self.written is None else self.written

    def select(self, rows: Tensor) -> Started:
        """The rows of these indices `[N]`, repeats allowed."""
        if remembers_all(self.cache):
            # The gradient of this takes a tenth of the time that the one of indexing takes.
            chosen = partial(torch.index_select, dim=0, index=rows)
            cache = _with_states(self.cache, chosen, chosen)
        else:
            cache = _shallow_copy(self.cache)
            cache.batch_select_indices(rows)
        return Started(
            self.next_logits[rows],
            cache,
            self.mask[rows],
            None if self.encoded is None else self.encoded[rows],
            None if self.written is None else self.written[rows],
        )

    def trimmed(self) -> Started:
        """Without the columns at the edges that are padding in every row.

        Only for what `remembers_all`.
        """
        columns = self.decoder_mask.any(0).nonzero()
        begin = int(columns[0])
        trimmed = replace(self, cache=_with_states(self.cache, lambda part: part[:, :, begin:]))
        if self.written is None:
            return replace(trimmed, mask=self.mask[:, begin:])
        end = int(self.mask.any(0).nonzero()[-1]) + 1
        return replace(
            trimmed,
            cache=_with_states(trimmed.cache, cross=lambda part: part[:, :, :end]),
            mask=self.mask[:, :end],
            encoded=None if self.encoded is None else self.encoded[:, :end],
            written=self.written[:, begin:],
        )


def remembers_all(cache: Cache) -> bool:
    """Whether every layer keeps all keys and values, so that rows can be padded and put together.

    Layers with a sliding window or a recurrent state do not.
    """
    if isinstance(cache, EncoderDecoderCache):
        return remembers_all(cache.self_attention_cache) and remembers_all(
            cache.cross_attention_cache
        )
    return type(cache) is DynamicCache and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def put_together(parts: Sequence[Started]) -> Started:
    """One batch of the rows of all `parts`, each of which `remembers_all`.

    What the decoder remembers is padded on the left, so that all rows end where the next token
    comes; the encoder's output on the right, as it is laid out.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    width = max(part.decoder_mask.shape[1] for part in parts)
    inputs = max(part.mask.shape[1] for part in parts)

    def left(tensor: Tensor, columns: int) -> Tensor:
        return functional.pad(tensor, (columns, 0))

    def right(tensor: Tensor, columns: int) -> Tensor:
        return functional.pad(tensor, (0, columns))

    decoder_masks = [left(part.decoder_mask, width - part.decoder_mask.shape[1]) for part in parts]
    joined = Started(
        torch.cat([part.next_logits for part in parts]),
        _cat([part.cache for part in parts], width, inputs),
        torch.cat(decoder_masks),
    )
    if first.written is None:
        return joined
    encoded = [
        functional.pad(part.encoded, (0, 0, 0, inputs - part.encoded.shape[1]))
        for part in parts
        if part.encoded is not None
    ]
    return replace(
        joined,
        mask=torch.cat([right(part.mask, inputs - part.mask.shape[1]) for part in parts]),
        encoded=torch.cat(encoded),
        written=torch.cat(decoder_masks),
    )


_Change = Callable[[Tensor], Tensor]


def _with_states(cache: Cache, own: _Change | None = None, cross: _Change | None = None) -> Cache:
    """`cache` with changed keys and values `[B, heads, S, size]`.

    `own` changes those of the decoder's own tokens, `cross` those of the encoder's output.
    """
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(
            _with_states(cache.self_attention_cache, own),
            _with_states(cache.cross_attention_cache, cross),
        )
    twin = _shallow_copy(cache)
    if own is not None:
        for layer in _layers(twin):
            layer.keys, layer.values = (own(states) for states in _states(layer))
    return twin


def _cat(caches: Sequence[Cache], width: int, inputs: int, *, pad_left: bool = True) -> Cache:
    """The rows of all caches, padded to `width`, or to `inputs` where of the encoder's output."""
    first = caches[0]
    if isinstance(first, EncoderDecoderCache):
        pairs = cast("Sequence[EncoderDecoderCache]", caches)
        return EncoderDecoderCache(
            _cat([pair.self_attention_cache for pair in pairs], width, inputs),
            _cat([pair.cross_attention_cache for pair in pairs], inputs, inputs, pad_left=False),
        )
    twin = _shallow_copy(first)
    for number, layer in enumerate(_layers(twin)):
        both = zip(*(_states(_layers(cache)[number]) for cache in caches), strict=True)
        layer.keys, layer.values = (
            torch.cat([_padded(states, width, pad_left) for states in parts]) for parts in both
        )
    return twin


def _padded(states: Tensor, width: int, pad_left: bool) -> Tensor:
    columns = width - states.shape[2]
    return functional.pad(states, (0, 0, columns, 0) if pad_left else (0, 0, 0, columns))


def _layers(cache: Cache) -> list[DynamicLayer]:
    return cast("list[DynamicLayer]", cache.layers)


def _states(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, heads, S, size]` of a layer that has read something."""
    return cast("Tensor", layer.keys), cast("Tensor", layer.values)


def _shallow_copy(cache: Cache) -> Cache:
    """A cache of the same tensors: selecting its rows and adding to it leave `cache` as it is."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(
            _shallow_copy(cache.self_attention_cache), _shallow_copy(cache.cross_attention_cache)
        )
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
