"""The base model's input from a text and the passages that came with it, by the task's template.

A template is text with `{input}` once and `{context}` at most once. Passages come best first, one a
line. Without passages, `{context}` and the white space around the template are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from router.errors import InvalidInputError

# Inputs that exceed the model's window lose passages, the last ones first, and never the text. This
# order also leaves the text next to the soft prompt.
DEFAULT_TEMPLATE = "{input}\n{context}"
MAX_TEMPLATE_BYTES = 4096
PASSAGE_SEPARATOR = "\n"

_INPUT, _CONTEXT = "{input}", "{context}"
_FIELDS = re.compile(r"\{(input|context)\}")


class FilledTemplate(str):
    """A filled template: a text that knows which part of it are passages.

    What does not fit a model's window is cut from their end.
    """

    __slots__ = ("after", "before", "passages")

    before: str
    passages: str
    after: str

    def __new__(cls, before: str, passages: str, after: str) -> FilledTemplate:
        """The text `before` + `passages` + `after`."""
        filled = super().__new__(cls, before + passages + after)
        filled.before, filled.passages, filled.after = before, passages, after
        return filled


def fill(template: str, text: str, context: Sequence[str] = ()) -> str:
    """`template` with the text and the passages in it; an empty one is `DEFAULT_TEMPLATE`.

    Braces in the text and in the passages stay what they are.
    """
    template = template or DEFAULT_TEMPLATE
    if not context:
        return template.replace(_CONTEXT, "").strip().replace(_INPUT, text)
    before, found, after = template.partition(_CONTEXT)
    if not found:
        return template.replace(_INPUT, text)
    return FilledTemplate(
        before.replace(_INPUT, text), PASSAGE_SEPARATOR.join(context), after.replace(_INPUT, text)
    )


def check_template(template: str, field: str = "template") -> str:
    """`template`, if it can be filled; empty for the default.

    Raises:
        InvalidInputError: too long, without `{input}`, or with one of the fields more than once.
    """
    size = len(template.encode(errors="surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise InvalidInputError(
            field, f"{size} bytes", f"shorten it to at most {MAX_TEMPLATE_BYTES} bytes"
        )
    if not template:
        return template
    fields = _FIELDS.findall(template)
    if fields.count("input") != 1 or fields.count("context") > 1:
        raise InvalidInputError(
            field,
            template,
            "write {input} once, and {context} at most once, like '{context} {input}'",
        )
    if "\x00" in template or any("\ud800" <= c <= "\udfff" for c in template):
        raise InvalidInputError(field, repr(template), "remove NUL and surrogate characters")
    return template
