"""Prepared rows on the training device, and batches made of them without leaving it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.base_model.start import END, PAD, START

LONGEST_PROMPT = 24
USUAL_PROMPT = 20
SHORTEST_PROMPT = 8

_WIDTHS = (48, 72, 104, 144, 232)
_OUTPUT_WIDTHS = (8, 40)
_IGNORED = -100


@dataclass(frozen=True, slots=True)
class SlotShares:
    """What the prompt slot of a training row holds: learned vectors, the instruction, nothing."""

    learned: float = 0.6
    text: float = 0.35


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows.

    Attributes:
        tokens: Encoder input [B, L]: `PROMPT [CLS] text [SEP]`, padded on the right.
        vectors: Index of a learned prompt vector where the slot holds one, else -1 [B, L].
        mask: 1 where the prompt or the text is [B, L].
        decoder: Decoder input, `[CLS] output` [B, T].
        labels: What the decoder should say, `output [SEP]`, -100 elsewhere [B, T].
    """

    tokens: Tensor
    vectors: Tensor
    mask: Tensor
    decoder: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Rows that fit the same widths, to be drawn by weight."""

    rows: Tensor
    cumulative: Tensor
    width: int
    output_width: int
    count: int


class TrainingRows:
    """All training rows, drawn by their family's share.

    Args:
        prepared: What `prepare` wrote.
        shares: A family's share of the training; a family that is not named is left out.
        batch_tokens: Encoder positions of a batch, padding included.
        device: Where the rows are kept and batches are made.
        slots: What the prompt slots hold.
        seed: Batches repeat for equal seeds.
    """

    def __init__(
        self,
        prepared: Path,
        shares: dict[str, float],
        batch_tokens: int,
        device: torch.device,
        slots: SlotShares,
        seed: int = 0,
    ) -> None:
        described = json.loads((prepared / "tasks.json").read_text())
        families = [task["family"] for task in described]
        self.instructions: list[list[int]] = [task["instruction"] for task in described]
        self._slots = slots
        self._device = device
        self._random = torch.Generator(device).manual_seed(seed)
        with np.load(prepared / "rows.npz") as file:
            stored = {name: file[name] for name in file.files}
        lengths = stored["lengths"].astype(np.int64)
        weights = _row_weights(stored["task"], families, shares)

        def put(values: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(values).to(device)

        self._tokens = put(stored["tokens"].astype(np.int32))
        self._starts = put(np.concatenate([[0], np.cumsum(lengths)[:-1]]))
        self._lengths = put(lengths)
        self._task = put(stored["task"].astype(np.int64))
        self._input = put(stored["input"].astype(np.int64))
        self._output = put(stored["output"].astype(np.int64))
        longest = max(map(len, self.instructions))
        padded = [ids + [PAD] * (longest - len(ids)) for ids in self.instructions]
        self._instructions = put(np.array(padded, np.int64))
        self._instruction_lengths = put(np.array([max(1, len(ids)) for ids in self.instructions]))
        inputs = lengths[stored["input"]]
        outputs = lengths[stored["output"]]
        self._buckets = self._make_buckets(inputs, outputs, weights, batch_tokens)
        totals = [float(bucket.cumulative[-1]) / bucket.count for bucket in self._buckets]
        self._bucket_shares = np.cumsum(totals) / np.sum(totals)
        self._choose = np.random.default_rng(seed)

    def _make_buckets(
        self,
        inputs: NDArray[np.int64],
        outputs: NDArray[np.int64],
        weights: NDArray[np.float64],
        batch_tokens: int,
    ) -> list[_Bucket]:
        buckets = []
        width_of = np.searchsorted(_WIDTHS, inputs + 2 + LONGEST_PROMPT)
        output_width_of = np.searchsorted(_OUTPUT_WIDTHS, outputs + 1)
        for i, width in enumerate(_WIDTHS):
            for j, output_width in enumerate(_OUTPUT_WIDTHS):
                fitting = (width_of == i) & (output_width_of == j) & (weights > 0)
                rows = np.flatnonzero(fitting)
                if not len(rows):
                    continue
                cumulative = torch.from_numpy(np.cumsum(weights[rows])).to(self._device)
                on_device = torch.from_numpy(rows).to(self._device)
                count = max(1, batch_tokens // width)
                buckets.append(_Bucket(on_device, cumulative, width, output_width, count))
        return buckets

    def draw(self) -> Batch:
        """A random batch of one bucket."""
        chosen = int(np.searchsorted(self._bucket_shares, self._choose.random()))
        bucket = self._buckets[min(chosen, len(self._buckets) - 1)]
        total = bucket.cumulative[-1]
        at = self._uniform(bucket.count).double() * total
        places = torch.searchsorted(bucket.cumulative, at).clamp(max=len(bucket.rows) - 1)
        return self._assemble(bucket.rows[places], bucket.width, bucket.output_width)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._device

    def framed_texts(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """`[CLS] text [SEP]` of rows, padded on the right [B, width], and its length [B, 1]."""
        start = self._starts[self._input[rows]][:, None]
        length = self._lengths[self._input[rows]][:, None]
        place = torch.arange(width, device=self._device)[None, :] - 1
        text = self._tokens[(start + place).clamp(0, len(self._tokens) - 1)].long()
        text = torch.where(place < 0, START, torch.where(place < length, text, PAD))
        return torch.where(place == length, END, text), length + 2

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._random, device=self._device)

    def _assemble(self, rows: Tensor, width: int, output_width: int) -> Batch:
        """Lay out `PROMPT [CLS] text [SEP]` for each row, by arithmetic on positions."""
        task = self._task[rows][:, None]
        text_start = self._starts[self._input[rows]][:, None]
        text_length = self._lengths[self._input[rows]][:, None]
        learned, slot_length = self._draw_slots(task, width - text_length - 2)
        position = torch.arange(width, device=self._device)[None, :]
        in_slot = position < slot_length
        place = position - slot_length - 1  # 0 at the text's first token
        in_text = (place >= 0) & (place < text_length)
        text = self._tokens[(text_start + place).clamp(0, len(self._tokens) - 1)].long()
        instruction = self._instructions[task, position % self._instruction_lengths[task]]
        tokens = torch.full_like(text, PAD)
        tokens = torch.where(in_slot & ~learned, instruction, tokens)
        tokens = torch.where(place == -1, START, tokens)
        tokens = torch.where(in_text, text, tokens)
        tokens = torch.where(place == text_length, END, tokens)
        vectors = torch.where(in_slot & learned, task * LONGEST_PROMPT + position, -1)
        mask = (place <= text_length).long()
        decoder, labels = self.outputs(rows, output_width)
        return Batch(tokens, vectors, mask, decoder, labels)

    def _draw_slots(self, task: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each slot holds learned vectors, and how long it is. Both [B, 1]."""
        kind, usual, length, form = self._uniform(4, len(task), 1)
        learned = kind < self._slots.learned
        text = ~learned & (kind < self._slots.learned + self._slots.text)
        span = LONGEST_PROMPT - SHORTEST_PROMPT + 1
        varied = (length * span).long() + SHORTEST_PROMPT
        vectors = torch.where(usual < 0.6, USUAL_PROMPT, varied)
        # half of the texts are cut or repeated to a prompt's length, as new prompts begin
        written = torch.where(form < 0.5, vectors, self._instruction_lengths[task])
        written = torch.minimum(written, room)
        return learned, torch.where(learned, vectors, torch.where(text, written, 0))

    def outputs(self, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Decoder inputs [B, width] of rows, and what the decoder should say."""
        start = self._starts[self._output[rows]][:, None]
        length = self._lengths[self._output[rows]][:, None]
        position = torch.arange(width, device=self._device)[None, :]
        said = self._tokens[(start + position).clamp(max=len(self._tokens) - 1)].long()
        labels = torch.where(position < length, said, _IGNORED)
        labels = torch.where(position == length, END, labels)
        decoder = torch.where(labels[:, :-1] >= 0, labels[:, :-1], PAD)
        first = torch.full((len(rows), 1), START, device=self._device)
        return torch.cat([first, decoder], 1), labels


def _row_weights(
    task: NDArray[np.uint16], families: list[str], shares: dict[str, float]
) -> NDArray[np.float64]:
    """Within a family a task counts by the square root of its rows."""
    counts = np.bincount(task, minlength=len(families)).clip(min=1)
    roots = np.sqrt(counts)
    of_family = dict.fromkeys(shares, 0.0)
    for family, root in zip(families, roots, strict=True):
        if family in of_family:
            of_family[family] += root
    per_row = [
        shares[family] / of_family[family] / root if family in shares else 0.0
        for family, root in zip(families, roots, strict=True)
    ]
    return np.array(per_row)[task]
