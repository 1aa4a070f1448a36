"""Rows of a batch: token ids with a soft prompt in front, padded and laid out as embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from router.tasks import PromptMethod

# The target of a position whose loss does not count.
IGNORED = -100


@dataclass(frozen=True, slots=True)
class TextTokens:
    """An input as token ids, special tokens included, and whether it was cut on the right."""

    ids: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a batch: a soft prompt `[P, W]` (or none) and the input's token ids behind it.

    Rows of the same task should share one tensor object: it is then laid out once. W is what the
    prompt's method makes it: H, or the keys and values of all layers.
    """

    prompt: Tensor | None
    ids: tuple[int, ...]
    method: PromptMethod = "prompt"

    @property
    def embedded(self) -> Tensor | None:
        """The prompt, if it stands before the text as input embeddings `[P, H]`."""
        return self.prompt if self.method == "prompt" else None

    @property
    def prefix(self) -> Tensor | None:
        """The prompt, if it is keys and values of every layer."""
        return self.prompt if self.method == "prefix" else None

    def __len__(self) -> int:
        return len(self.ids) + (0 if self.prompt is None else len(self.prompt))


def lay_out(
    rows: Sequence[Row], embed: nn.Module, pad_id: int, *, pad_left: bool
) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, S, H]` of `PROMPT text` rows, and their mask `[B, S]`.

    `embed` gives the input embeddings of token ids. A prefix takes as many positions as it has
    virtual tokens; what stands there does not matter.
    """
    device = next(embed.parameters()).device
    lengths = [len(row) for row in rows]
    places = np.zeros((len(rows), max(lengths)), np.int64)
    mask = np.zeros_like(places)
    # Every distinct vector once, then one gather: row 0 is the padding, then the prompts,
    # then the tokens of all texts. Placeholders of a prefix are row 0 too.
    prompts: list[Tensor] = []
    begin_of: dict[int, int] = {}
    begin = 1
    for row in rows:
        if row.embedded is not None and id(row.embedded) not in begin_of:
            begin_of[id(row.embedded)] = begin
            prompts.append(row.embedded)
            begin += len(row.embedded)
    for row, length, row_places, row_mask in zip(rows, lengths, places, mask, strict=True):
        span = slice(len(row_places) - length, None) if pad_left else slice(length)
        prompt_length = length - len(row.ids)
        if row.embedded is None:
            in_front = np.zeros(prompt_length, np.int64)
        else:
            first = begin_of[id(row.embedded)]
            in_front = np.arange(first, first + prompt_length)
        row_places[span] = np.concatenate([in_front, np.arange(begin, begin + len(row.ids))])
        row_mask[span] = 1
        begin += len(row.ids)
    tokens = [pad_id, *(token for row in rows for token in row.ids)]
    texts: Tensor = embed(torch.tensor(tokens, device=device))
    # In float32 up to here: a prompt's gradient is the sum over all rows that it is in.
    vectors = torch.cat([texts[:1].float(), *prompts, texts[1:].float()])
    gathered = vectors.index_select(0, torch.from_numpy(places.reshape(-1)).to(device))
    embeddings = gathered.view(*places.shape, -1).to(texts.dtype)
    return embeddings, torch.from_numpy(mask).to(device)


def batches(
    lengths: Sequence[int], max_positions: int, max_padding: int | None = None
) -> Iterator[list[int]]:
    """Indices of `lengths` in batches of similar length, the longest first.

    Each batch is within `max_positions` when padded, `max_padding` of them padding.
    """
    batch: list[int] = []
    longest = padding = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        added = longest - lengths[i]
        too_large = longest * (len(batch) + 1) > max_positions
        if batch and (too_large or (max_padding is not None and padding + added > max_padding)):
            yield batch
            batch = []
        if not batch:
            longest, padding, added = lengths[i], 0, 0
        padding += added
        batch.append(i)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """`rows` as one tensor `[B, T]`, filled up on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of `targets` `[..., T]` under `logits` `[..., T, V]`; 0 where one is `IGNORED`."""
    flat = functional.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape)
