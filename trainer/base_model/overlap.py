"""Keeps benchmark text out of the training rows."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

GRAM_WORDS = 13
"""Texts that share this many consecutive words are taken to be copies of each other."""

_SHORTEST_LINE = 4
_PREFIX = re.compile(r"^[A-Za-z ]{1,20}\d?:\s*")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class BenchmarkText:
    """The texts of the benchmarks, to be asked whether a training text repeats one of them.

    A text repeats a benchmark if it, or one of its lines without the line's `name:`, is equal to a
    benchmark text or line after normalisation (lower case, letters and digits alone), or if it
    shares 13 consecutive words with a text given as `long_texts`.
    """

    def __init__(self, texts: Iterable[str], long_texts: Iterable[str]) -> None:
        self._exact = {form for text in texts for form in _forms(text)}
        grams = [_gram_hashes(_words(text)) for text in long_texts]
        self._grams = np.unique(np.concatenate([*grams, np.empty(0, np.uint64)]))

    def repeats(self, text: str) -> bool:
        """Whether `text` must not be trained on."""
        if any(form in self._exact for form in _forms(text)):
            return True
        grams = _gram_hashes(_words(text))
        if not len(grams) or not len(self._grams):
            return False
        places = np.searchsorted(self._grams, grams).clip(max=len(self._grams) - 1)
        return bool((self._grams[places] == grams).any())


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _forms(text: str) -> set[str]:
    """The normalised text, and its lines where they are long enough to identify a text."""
    lines = [_words(_PREFIX.sub("", line)) for line in text.splitlines()]
    forms = {" ".join(line) for line in lines if len(line) >= _SHORTEST_LINE}
    forms.add(" ".join(_words(text)))
    return forms - {""}


@functools.lru_cache(maxsize=2**20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _gram_hashes(words: list[str]) -> NDArray[np.uint64]:
    """One hash per run of `GRAM_WORDS` words; empty for shorter texts."""
    count = len(words) - GRAM_WORDS + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.array([_word_hash(word) for word in words], np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(GRAM_WORDS):
        total = total * _MULTIPLIER + hashes[offset : offset + count]
    return total
