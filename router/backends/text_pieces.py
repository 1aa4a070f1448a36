"""Token ids to text: whole answers, and the pieces of an answer that is still being written."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import decoders
from transformers import PreTrainedTokenizerBase

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
    """The answer of one row, as it grows token by token."""

    def __init__(
        self, detokenizer: Detokenizer, end_ids: Collection[int], limit: int, *, in_pieces: bool
    ) -> None:
        """`limit` is on the tokens, the end token not counted; `in_pieces` as they become final."""
        self._detokenizer = detokenizer
        self._end_ids = end_ids
        self._limit = limit
        self._in_pieces = in_pieces
        self._tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens written, the end token not counted."""
        return len(self._tokens)

    def add(self, token: int) -> str:
        """Take the row's next token; returns the text that became final with it.

        `finish_reason` says whether it was the last one. The pieces concatenate to `text`.
        """
        if token in self._end_ids:
            self.finish_reason = "stop"
        else:
            self._tokens.append(token)
            if len(self._tokens) == self._limit:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            text = self._detokenizer.text(self._tokens)
        else:
            text = self._detokenizer.settled(self._tokens) if self._in_pieces else ""
        piece = text[len(self.text) :]
        self.text += piece
        return piece
