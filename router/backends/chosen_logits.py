"""Logits at some positions of a batch only.

The vocabulary is most of what a small model computes: where outputs of different lengths stand in
one batch, logits of the padding would cost more than all else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def logits_only_at(network: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within, `network` gives logits `[1, N, V]`, those at `positions` `[N]` of all `B * T`.

    A network that makes them in a way of its own gives all of them; `chosen` takes both. Belongs to
    one thread at a time.
    """
    projection = network.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(projection, nn.Module):
        yield
        return

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        states, *others = args
        return (states.flatten(0, -2).index_select(0, positions)[None], *others)

    handle = projection.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def chosen(logits: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Logits `[N, V]` at `positions`, from what a network gave for a batch of `shape` (B, T)."""
    if logits.shape[:2] == (1, len(positions)) != shape:
        return logits[0]
    return logits.flatten(0, 1).index_select(0, positions)
