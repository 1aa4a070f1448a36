"""What a request may ask for. The checks name the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.errors import InvalidInputError

# What a string field costs beside its bytes: a tag and a length.
_FIELD_BYTES = 8
MAX_REQUEST_KEY_BYTES = 256


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request. Sizes of text are in bytes of UTF-8."""

    max_text_bytes: int = 32 * 1024
    max_batch_texts: int = 256
    max_top_k: int = 100
    max_context_passages: int = 32
    default_output_tokens: int = 64
    max_output_tokens: int = 512

    @property
    def max_request_bytes(self) -> int:
        """The largest message that can hold a request within the other limits."""
        texts = (self.max_batch_texts + 1) * (self.max_text_bytes + _FIELD_BYTES)
        return texts + MAX_REQUEST_KEY_BYTES + _FIELD_BYTES

    def check_text(self, text: str, field: str = "text") -> None:
        """Raises InvalidInputError: empty, over-long, a NUL, or half of a surrogate pair."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                field, f"a lone surrogate at character {error.start}", "send well-formed Unicode"
            ) from None
        if size > self.max_text_bytes:
            raise InvalidInputError(
                field, f"{size} bytes", f"send at most {self.max_text_bytes} bytes of UTF-8"
            )
        if not text.strip():
            raise InvalidInputError(field, repr(text), "send a text that is not empty")
        if "\0" in text:
            raise InvalidInputError(
                field, f"a NUL at character {text.index(chr(0))}", "remove the NUL characters"
            )

    def check_texts(self, texts: Sequence[str], field: str = "texts") -> None:
        """Raises InvalidInputError: no text, too many, or a bad one (`texts[3]`)."""
        if not 1 <= len(texts) <= self.max_batch_texts:
            raise InvalidInputError(
                field, f"{len(texts)} texts", f"send 1 to {self.max_batch_texts} texts"
            )
        for position, text in enumerate(texts):
            self.check_text(text, f"{field}[{position}]")

    def check_top_k(self, top_k: int) -> None:
        """Raises InvalidInputError: negative or over the limit."""
        if not 0 <= top_k <= self.max_top_k:
            raise InvalidInputError("top_k", top_k, f"send 0 (none) to {self.max_top_k}")

    def check_request_key(self, key: str) -> None:
        """Raises InvalidInputError: over-long, or half of a surrogate pair. Empty is no key."""
        try:
            size = len(key.encode())
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                "request_key",
                f"a lone surrogate at character {error.start}",
                "send well-formed Unicode",
            ) from None
        if size > MAX_REQUEST_KEY_BYTES:
            raise InvalidInputError(
                "request_key",
                f"{size} bytes",
                f"send at most {MAX_REQUEST_KEY_BYTES} bytes of UTF-8, such as a digest",
            )

    def check_context(self, context: Sequence[str], text: str) -> None:
        """Raises InvalidInputError: too many passages, a bad one, or too long with the text."""
        if len(context) > self.max_context_passages:
            raise InvalidInputError(
                "context",
                f"{len(context)} passages",
                f"send at most {self.max_context_passages} passages",
            )
        for position, passage in enumerate(context):
            self.check_text(passage, f"context[{position}]")
        size = sum(len(part.encode()) for part in (*context, text))
        if size > self.max_text_bytes:
            raise InvalidInputError(
                "context",
                f"{size} bytes with the text",
                f"send at most {self.max_text_bytes} bytes of context and text together",
            )

    def output_tokens(self, requested: int) -> int:
        """How many tokens an answer may have, where `requested` of them were asked for.

        Raises InvalidInputError: negative or over the limit.
        """
        if not 0 <= requested <= self.max_output_tokens:
            raise InvalidInputError(
                "max_output_tokens",
                requested,
                f"send 1 to {self.max_output_tokens}, or 0 for {self.default_output_tokens}",
            )
        return requested or self.default_output_tokens
