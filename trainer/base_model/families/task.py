"""A training task, and what the families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from trainer.base_model.corpus import Corpus

Row = tuple[str, str]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to unit vectors [N, H]."""

PAIR_FORMATS = (
    "sentence 1: {a}\nsentence 2: {b}",
    "premise: {a}\nhypothesis: {b}",
    "context: {a}\nclaim: {b}",
    "claim: {b}\nevidence: {a}",
    "{a}\n{b}",
    "first sentence: {a}\nsecond sentence: {b}",
    "text: {a}\nquestion: is it true that {b}",
)
TEXT_FORMATS = ("{x}", "{x}", "Text: {x}", "text: {x}", "Title: {x}", "input: {x}", "message: {x}")


YES_NO = (
    ("yes", "no"),
    ("true", "false"),
    ("right", "wrong"),
    ("correct", "incorrect"),
    ("good", "bad"),
    ("same", "different"),
    ("positive", "negative"),
    ("1", "0"),
    ("accept", "reject"),
)
CHOICES = (("A", "B"), ("1", "2"), ("first", "second"), ("left", "right"), ("X", "Y"))


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One task of the base model's training.

    Attributes:
        name: Unique.
        family: What its share of the training is reckoned by.
        instruction: Put in the prompt slot as text in some rows, and the start of its vectors.
        rows: Input and output.
    """

    name: str
    family: str
    instruction: str
    rows: list[Row]


class LabelWords:
    """Draws the words that a task's classes are called by."""

    def __init__(self, corpus: Corpus, rng: Random) -> None:
        found: dict[str, int] = {}
        for pair in corpus.entailment:
            for word in re.findall(r"\b[a-z]{3,8}\b", pair.second.lower()):
                found[word] = found.get(word, 0) + 1
        common = sorted(found, key=lambda word: -found[word])
        self._words = common[60:1200]
        self._rng = rng

    def arbitrary(self, count: int) -> tuple[str, ...]:
        """Words that have nothing to do with the classes."""
        return tuple(self._rng.sample(self._words, count))

    def yes_no(self, arbitrary: float = 0.4) -> tuple[str, str]:
        """A natural pair of words, or with probability `arbitrary` any two."""
        if self._rng.random() < arbitrary:
            first, second = self.arbitrary(2)
            return first, second
        return self._rng.choice(YES_NO)


def answers(meanings: Sequence[str], words: Sequence[str]) -> str:
    """The part of an instruction that says which word stands for what."""
    if list(meanings) == list(words):
        return "Choose one of: " + ", ".join(words[:20]) + "."
    return "; ".join(f"{word}: {what}" for what, word in zip(meanings[:10], words, strict=False))


def truncated(text: str, words: int) -> str:
    """The text's first words."""
    return " ".join(text.split(" ")[:words])


def two_choices(question: str, right_first: list[str], letters: Sequence[str], rng: Random) -> Row:
    """The question with two options in random order, and the letter of the right one."""
    place = rng.randrange(2)
    options = right_first if place == 0 else right_first[::-1]
    lines = (f"{letter}: {option}" for letter, option in zip(letters, options, strict=True))
    return "\n".join([question, *lines]), letters[place]


def spaced(label: str) -> str:
    """A label such as `alarm_set` or `PlayMusic` as words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").lower()


def swapped(text: str, rng: Random) -> str:
    """The text with two of its longer words in each other's place."""
    tokens = text.split()
    long_ones = [place for place, word in enumerate(tokens) if len(word) > 4]
    if len(long_ones) < 2:
        return text[::-1]
    first, second = rng.sample(long_ones, 2)
    tokens[first], tokens[second] = tokens[second], tokens[first]
    return " ".join(tokens)


def captions(corpus: Corpus) -> list[str]:
    """SNLI's hypotheses: short sentences about pictures."""
    return sorted({pair.second for pair in corpus.entailment if len(pair.second.split()) > 5})


def sentences(corpus: Corpus) -> list[str]:
    """Sentences from Wikipedia, and captions."""
    return [half for _, *halves in corpus.splits for half in halves] + captions(corpus)
