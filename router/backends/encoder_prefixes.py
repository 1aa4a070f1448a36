"""Prefixes of an encoder: learned keys and values in the self-attention of each of its layers.

An encoder has no cache to put them into. Each row instead gets a placeholder per virtual token in
front of its text, and what the layers' key and value projections say of the placeholders is
replaced by the learned vectors. The text then attends to exactly those (P-tuning v2, Liu et al.
2022, section 3.2); what becomes of the placeholders themselves, nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from router.backends.rows import Row
from router.errors import IncompatibleModelError

# The names of the two projections in BART, T5 and BERT, and those who took after them.
_NAMES = (("k_proj", "v_proj"), ("k", "v"), ("key", "value"))
# A text would not attend to its whole input, nor to a prefix.
_SPARSE = ("attention_window", "block_size", "encoder_attention_type", "local_radius")

Projections = tuple[nn.Linear, nn.Linear]
_Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def key_value_projections(encoder: nn.Module, config: object) -> list[Projections]:
    """What computes the keys and the values of each self-attention of `encoder`, layer by layer.

    Raises:
        IncompatibleModelError: none of that name and shape, or attention that is not to everything.
    """
    found: list[Projections] = []
    for module in encoder.modules():
        for names in _NAMES:
            keys, values = (getattr(module, name, None) for name in names)
            if isinstance(keys, nn.Linear) and isinstance(values, nn.Linear):
                found.append((keys, values))
    sizes = {layer.out_features for layers in found for layer in layers}
    if len(sizes) != 1 or any(getattr(config, name, None) is not None for name in _SPARSE):
        raise IncompatibleModelError(
            "method prefix",
            f"{type(encoder).__name__} has no self-attention that could take one",
            "tune with --method prompt",
        )
    return found


@contextmanager
def prefixes_in(layers: Sequence[Projections], rows: Sequence[Row]) -> Iterator[None]:
    """Within, the encoder reads a batch of `rows` (laid out from the left) with their prefixes.

    Belongs to one thread at a time.
    """
    prefixes = {i: row.prefix for i, row in enumerate(rows) if row.prefix is not None}
    if not prefixes:
        yield
        return
    device = next(iter(prefixes.values())).device
    lengths = [len(prefix) for prefix in prefixes.values()]
    row_of = torch.tensor(list(prefixes), device=device).repeat_interleave(
        torch.tensor(lengths, device=device)
    )
    column = torch.cat([torch.arange(length, device=device) for length in lengths])
    vectors = torch.cat(list(prefixes.values())).view(sum(lengths), len(layers), 2, -1)

    def replacing(layer: int, part: int) -> _Hook:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.index_put((row_of, column), vectors[:, layer, part].to(output.dtype))

        return hook

    with ExitStack() as hooks:
        for number, projections in enumerate(layers):
            for part, projection in enumerate(projections):
                hooks.enter_context(projection.register_forward_hook(replacing(number, part)))
        yield


@contextmanager
def captured(layers: Sequence[Projections]) -> Iterator[list[Tensor]]:
    """Within, the list collects what every projection computes: keys and values of each layer."""
    seen: list[Tensor] = []
    with ExitStack() as hooks:
        for projection in (projection for pair in layers for projection in pair):
            hooks.enter_context(
                projection.register_forward_hook(lambda _, __, output: seen.append(output))
            )
        yield seen
