"""Token ids to text: whole answers, and the pieces of an answer that is still being written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from router.interfaces import FinishReason

_REPLACEMENT_CHARACTER = "\ufffd"


class Detokenizer:
    """Turns token ids into text, and says how much of it later tokens cannot change."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # WordPiece lost the spaces of its text, so `isn ' t` is put together again, and a word
        # may still change after it was decoded. Other tokenizers keep their spaces.
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._rejoins_words = isinstance(getattr(backend, "decoder", None), decoders.WordPiece)

    def text(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        return str(
            self._tokenizer.decode(
                list(ids),
                skip_special_tokens=True,
                clean_up_tokenization_spaces=self._rejoins_words,
            )
        )

    def settled(self, ids: Sequence[int]) -> str:
        """The beginning of `text(ids)` that stays the same whatever tokens follow.

        Bytes of an unfinished character decode to U+FFFD and are held back.
        """
        text = self.text(ids)
        if self._rejoins_words:
            return text[: max(text.rfind(" "), 0)]
        return text.rstrip(_REPLACEMENT_CHARACTER)


class RowWriter:
    """The answer of one row, as it grows token by token.

    The pieces given to `on_piece` concatenate to `text`.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        end_ids: Collection[int],
        on_piece: Callable[[str], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._detokenizer = detokenizer
        self._end_ids = end_ids
        self._on_piece = on_piece
        self._cancelled = cancelled
        self._tokens: list[int] = []
        self._stopped_by: FinishReason | None = None
        self.text = ""

    @property
    def finish_reason(self) -> FinishReason:
        """Why the row ended; `length` if nothing but the limit on new tokens ended it."""
        return self._stopped_by or "length"

    @property
    def output_tokens(self) -> int:
        """Tokens written, the end token not counted."""
        return len(self._tokens)

    def is_cancelled(self) -> bool:
        """Whether the caller gave the row up; asked once a step until the row ends."""
        if self._stopped_by is None and self._cancelled is not None and self._cancelled():
            self._stopped_by = "cancelled"
        return self._stopped_by == "cancelled"

    def add(self, token: int) -> None:
        """Take the row's next token; ignored once the row has ended."""
        if self._stopped_by is not None:
            return
        if token in self._end_ids:
            self._stopped_by = "stop"
            return
        self._tokens.append(token)
        if self._on_piece is not None:
            self._emit(self._detokenizer.settled(self._tokens))

    def finish(self) -> None:
        """Give out what was held back."""
        self._emit(self._detokenizer.text(self._tokens))

    def _emit(self, text: str) -> None:
        piece = text[len(self.text) :]
        if piece:
            self.text += piece
            if self._on_piece is not None:
                self._on_piece(piece)


class BatchStreamer(BaseStreamer):
    """Hands each step's tokens `[B]` of a `generate` call to the writers of their rows."""

    def __init__(self, writers: Sequence[RowWriter]) -> None:
        self._writers = writers

    def put(self, value: torch.Tensor) -> None:
        """Take one token per row; what the decoder starts from comes first, as `[B, S]`."""
        if value.ndim == 1:
            for writer, token in zip(self._writers, value.tolist(), strict=True):
                writer.add(token)

    def end(self) -> None:
        """All rows have ended."""
        for writer in self._writers:
            writer.finish()


class CancelledRows(StoppingCriteria):
    """Ends the rows that their callers gave up, and no others."""

    def __init__(self, writers: Sequence[RowWriter]) -> None:
        self._writers = writers

    def __call__(
        self,
        input_ids: torch.LongTensor,
        scores: torch.FloatTensor,  # noqa: ARG002
        **kwargs: object,  # noqa: ARG002
    ) -> torch.BoolTensor:
        """Per row, whether to stop `[B]`."""
        stop = [writer.is_cancelled() for writer in self._writers]
        return torch.tensor(stop, device=input_ids.device)  # type: ignore[return-value]
