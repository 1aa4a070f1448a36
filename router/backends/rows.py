"""Rows of a batch: token ids with a soft prompt in front, padded and laid out as embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

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
    _length: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once: to ask a tensor for its length takes as long as all else that a row is asked for.
        length = len(self.ids) + (0 if self.prompt is None else len(self.prompt))
        object.__setattr__(self, "_length", length)

    @property
    def embedded(self) -> Tensor | None:
        """The prompt, if it stands before the text as input embeddings `[P, H]`."""
        return self.prompt if self.method == "prompt" else None

    @property
    def prefix(self) -> Tensor | None:
        """The prompt, if it is keys and values of every layer."""
        return self.prompt if self.method == "prefix" else None

    def __len__(self) -> int:
        return self._length


def lay_out(
    rows: Sequence[Row], embed: nn.Module, pad_id: int, *, pad_left: bool
) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, S, H]` of `PROMPT text` rows, and their mask `[B, S]`.

    `embed` gives the input embeddings of token ids. A prefix takes as many positions as it has
    virtual tokens; what stands there does not matter.
    """
    device = next(embed.parameters()).device
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
    text_lengths = np.array([len(row.ids) for row in rows])[:, None]
    text_ends = begin + text_lengths.cumsum()[:, None]
    lengths = np.array([len(row) for row in rows])[:, None]
    prompt_lengths = lengths - text_lengths
    prompt_begins = np.array(
        [0 if row.embedded is None else begin_of[id(row.embedded)] for row in rows]
    )[:, None]
    columns = np.arange(lengths.max()) - (lengths.max() - lengths if pad_left else 0)
    mask = (columns >= 0) & (columns < lengths)
    of_text = text_ends - lengths + columns
    of_prompt = np.where(prompt_begins > 0, prompt_begins + columns, 0)
    places = np.where(mask, np.where(columns < prompt_lengths, of_prompt, of_text), 0)
    tokens = np.fromiter(chain([pad_id], *(row.ids for row in rows)), np.int64)
    texts: Tensor = embed(sent(torch.from_numpy(tokens), device))
    # In float32 up to here: a prompt's gradient is the sum over all rows that it is in.
    vectors = torch.cat([texts[:1].float(), *prompts, texts[1:].float()])
    gathered = vectors.index_select(0, sent(torch.from_numpy(places.reshape(-1)), device))
    embeddings = gathered.view(*places.shape, -1).to(texts.dtype)
    return embeddings, sent(torch.from_numpy(mask.astype(np.int64)), device)


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


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` of the CPU on `device`, without waiting for what a GPU has yet to do."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> Tensor:
    """`rows` as one tensor `[B, T]`, filled up on the right."""
    width = max(len(row) for row in rows)
    return sent(torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows]), device)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of `targets` `[..., T]` under `logits` `[..., T, V]`; 0 where one is `IGNORED`."""
    flat = functional.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(targets.shape)
