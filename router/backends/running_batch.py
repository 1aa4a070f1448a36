"""Continuous batching: rows that join and leave a batch of answers between its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from router.backends.rows import Row
from router.backends.started import Started, put_together, remembers_all
from router.backends.text_pieces import RowWriter
from router.errors import InvalidInputError
from router.interfaces import Generation, PromptedInput, Written

if TYPE_CHECKING:
    from router.backends.torch_model import TorchLanguageModel

# Bounds memory: positions of all rows, each as long as the longest may become.
_MAX_POSITIONS = 8192
# How far numbers may move with padding, of their own size, in float32 and in 16 bits.
_ROUNDING = 1e-3
_HALF_ROUNDING = 3e-2
_TRIED_TOKENS = 4


@dataclass(slots=True, eq=False)
class AnswerRow:
    """One row of a running batch: what to read, and what was written. `limit` is in tokens."""

    row: Row
    limit: int
    truncated: bool
    writer: RowWriter
    gone: bool = False

    @property
    def positions(self) -> int:
        """Positions of the input and of the longest answer."""
        return len(self.row) + self.limit

    def generation(self) -> Generation | None:
        """The answer, once it has ended."""
        reason = self.writer.finish_reason
        if reason is None:
            return None
        tokens = len(self.row.ids), self.writer.output_tokens
        return Generation(self.writer.text, reason, *tokens, self.truncated)


@dataclass(slots=True)
class _Group:
    """Rows that share every forward pass. `only_read`: nothing has been written for them yet."""

    rows: list[AnswerRow]
    started: Started
    only_read: bool = True

    @property
    def next_tokens(self) -> Tensor:
        """The most probable ones `[B]`."""
        return self.started.next_logits.argmax(-1)

    def without_gone(self) -> _Group:
        """The rows that are still being written."""
        staying = [place for place, row in enumerate(self.rows) if not row.gone]
        if len(staying) == len(self.rows) or not staying:
            return _Group(self.rows if staying else [], self.started, self.only_read)
        places = torch.tensor(staying, device=self.started.mask.device)
        started = self.started.select(places)
        return _Group(
            [self.rows[place] for place in staying],
            started.trimmed() if remembers_all(started.cache) else started,
            self.only_read,
        )


class TorchRunningBatch:
    """See `router.interfaces.RunningBatch`.

    Rows that have written more and less share a forward pass, those of fewer tokens padded on the
    left, where the model allows it. Otherwise (sliding windows, recurrent layers) those that joined
    together do.
    """

    def __init__(self, model: TorchLanguageModel, *, in_pieces: bool = True) -> None:
        """`in_pieces`: text is given out as it becomes final, not only with the whole answer."""
        self._model = model
        self._in_pieces = in_pieces
        self._groups: list[_Group] = []

    def __len__(self) -> int:
        return len(self._rows())

    def prepare(self, item: PromptedInput, max_new_tokens: int) -> AnswerRow:
        """Tokenize a row. It may join any batch of its model.

        Raises:
            InvalidInputError: no token is asked for.
            IncompatibleModelError: the prompt is of another width, or leaves no room in the window.
        """
        [row] = self.prepare_all([item], max_new_tokens)
        return row

    def prepare_all(self, items: Sequence[PromptedInput], max_new_tokens: int) -> list[AnswerRow]:
        """`prepare` for several rows; those of equal prompts share them."""
        if max_new_tokens < 1:
            raise InvalidInputError("max_new_tokens", max_new_tokens, "ask for at least 1")
        limits = [min(max_new_tokens, self._model.room_for_answer(item)) for item in items]
        return [
            AnswerRow(row, limit, text.truncated, self._model.writer(limit, self._in_pieces))
            for (row, text), limit in zip(self._model.rows_of(items, limits), limits, strict=True)
        ]

    def join(self, rows: Sequence[AnswerRow]) -> int:
        """Read the first ones of `rows`, as many as there is room for; returns how many."""
        inside = self._rows()
        longest = max((row.positions for row in inside), default=0)
        joining: list[AnswerRow] = []
        for row in rows:
            longest = max(longest, row.positions)
            count = len(inside) + len(joining) + 1
            if count > 1 and count * longest > _MAX_POSITIONS:
                break
            joining.append(row)
        if joining:
            started = self._model.read_batch([row.row for row in joining])
            self._groups.append(_Group(joining, started))
        return len(joining)

    def drop(self, row: AnswerRow) -> None:
        """Let a row leave before it has ended; its memory is free with the next step."""
        row.gone = True

    def step(self) -> list[Written[AnswerRow]]:
        """Write the next token of every row."""
        groups = [group.without_gone() for group in self._groups]
        groups = [group for group in groups if group.rows]
        begun = self._put_together([group for group in groups if not group.only_read])
        for group in begun:
            group.started = self._model.advance_batch(group.started, group.next_tokens)
        self._groups = [*begun, *(group for group in groups if group.only_read)]
        return [written for group in self._groups for written in self._write(group)]

    def _put_together(self, groups: list[_Group]) -> list[_Group]:
        if len(groups) < 2 or not self._model.mixes_lengths:
            return groups
        rows = [row for group in groups for row in group.rows]
        started = put_together([group.started for group in groups])
        return [_Group(rows, started, only_read=False)]

    def _write(self, group: _Group) -> list[Written[AnswerRow]]:
        group.only_read = False
        written = []
        for row, token in zip(group.rows, group.next_tokens.tolist(), strict=True):
            piece = row.writer.add(token)
            generation = row.generation()
            row.gone = generation is not None
            if piece or generation is not None:
                written.append(Written(row, piece, generation))
        return written

    def _rows(self) -> list[AnswerRow]:
        return [row for group in self._groups for row in group.rows if not row.gone]


def mixes_lengths(model: TorchLanguageModel) -> bool:
    """Whether rows that have written more and less can take a step together: it is tried.

    They cannot where layers forget tokens, or where a decoder takes padding for tokens.
    """

    def fed(started: Started) -> Started:
        # A step changes the cache that it is given.
        rows = torch.arange(len(started.mask), device=model.device)
        return model.advance_batch(started.select(rows), started.next_logits.argmax(-1))

    [text] = model.tokenize_inputs(["a"], [0], [_TRIED_TOKENS])
    alone = [model.read_batch([Row(None, text.ids)])]
    if not remembers_all(alone[0].cache):
        return False
    for _ in range(_TRIED_TOKENS):
        alone.append(fed(alone[-1]))
    together = fed(put_together([alone[-2], alone[0]])).next_logits
    expected = torch.cat([alone[-1].next_logits, alone[1].next_logits])
    return equal_but_for_rounding(together, expected, model.embedding.dtype)


def equal_but_for_rounding(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether what a network of that type gave in two ways is the same."""
    rounding = _ROUNDING if dtype.itemsize >= 4 else _HALF_ROUNDING
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= rounding * expected.float().abs().max())
