"""Do two texts say, ask for, or come from the same?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

import numpy as np

from trainer.base_model.corpus import Corpus, group_by_label
from trainer.base_model.families.task import (
    PAIR_FORMATS,
    Embed,
    LabelWords,
    TrainingTask,
    answers,
    captions,
    spaced,
    swapped,
)


def pair_tasks(
    corpus: Corpus, embed: Embed, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """Do two texts say, or ask for, the same?"""
    sources = {
        "same_intent": _same_intent_pairs(corpus, rng, 2 * most_rows),
        "same_statement": _same_statement_pairs(corpus, rng),
        "same_question": _same_question_pairs(corpus, embed, rng),
        "same_source": _same_source_pairs(corpus, rng, 2 * most_rows),
        "same_missing_word": _same_missing_word_pairs(corpus, rng, 2 * most_rows),
    }
    for what, pairs in sources.items():
        for number in range(6):
            same, different = words.yes_no()
            pattern = rng.choice(PAIR_FORMATS[:-1])
            rows = [
                (pattern.format(a=a, b=b), same if alike else different)
                for a, b, alike in rng.sample(pairs, min(len(pairs), most_rows))
            ]
            about = f"{spaced(what)}? {answers(('same', 'different'), (same, different))}"
            yield TrainingTask(f"{what}_{number}", "pairs", about, rows)


LikePair = tuple[str, str, bool]


def _same_intent_pairs(corpus: Corpus, rng: Random, count: int) -> list[LikePair]:
    """Half of the negatives come from the same domain."""
    by_intent = group_by_label(corpus.commands)
    intents = list(by_intent)
    pairs = []
    for _ in range(count):
        first, alike = rng.choice(intents), rng.random() < 0.5
        others = [other for other in intents if other != first]
        near = [other for other in others if other.split("_")[0] == first.split("_")[0]]
        second = first if alike else rng.choice(near if near and rng.random() < 0.5 else others)
        pairs.append((rng.choice(by_intent[first]), rng.choice(by_intent[second]), alike))
    return [pair for pair in pairs if pair[0] != pair[1]]


def _same_statement_pairs(corpus: Corpus, rng: Random) -> list[LikePair]:
    """A sentence and its split form; in negatives two words are swapped, or it is another's."""
    pairs = []
    for place, (whole, first, second) in enumerate(corpus.splits):
        said, alike = f"{first} {second}", rng.random() < 0.5
        if not alike:
            other = corpus.splits[(place + 1) % len(corpus.splits)]
            said = f"{other[1]} {other[2]}" if rng.random() < 0.25 else swapped(said, rng)
        pairs.append((whole, said, alike and said != whole))
    return pairs


def _same_question_pairs(corpus: Corpus, embed: Embed, rng: Random) -> list[LikePair]:
    """Questions with nearly equal embeddings, against ones that are only on the same subject."""
    texts = [text for text, _ in rng.sample(corpus.questions, min(10000, len(corpus.questions)))]
    vectors = embed(texts)
    pairs: list[LikePair] = []
    for start in range(0, len(texts), 1000):
        likeness = vectors[start : start + 1000] @ vectors.T
        likeness[np.arange(len(likeness)), start + np.arange(len(likeness))] = -1.0
        ranked = np.argpartition(-likeness, 6, axis=1)[:, :6]
        for offset, neighbours in enumerate(ranked):
            for neighbour in neighbours:
                value = likeness[offset, neighbour]
                if value > 0.82:
                    pairs.append((texts[start + offset], texts[neighbour], True))
                elif 0.35 < value < 0.68:
                    pairs.append((texts[start + offset], texts[neighbour], False))
    alike = [pair for pair in pairs if pair[2]]
    unlike = [pair for pair in pairs if not pair[2]]
    return alike + rng.sample(unlike, min(len(unlike), len(alike) + 200))


def _same_source_pairs(corpus: Corpus, rng: Random, count: int) -> list[LikePair]:
    """The two halves of one Wikipedia sentence, or of two."""
    pairs = []
    for _ in range(min(count, len(corpus.splits))):
        one, other = rng.choice(corpus.splits), rng.choice(corpus.splits)
        alike = rng.random() < 0.5
        pairs.append((one[1], one[2] if alike else other[2], alike))
    return pairs


def _same_missing_word_pairs(corpus: Corpus, rng: Random, count: int) -> list[LikePair]:
    """Was the same word taken out of both sentences?"""
    holders: dict[str, list[str]] = {}
    for text in captions(corpus):
        for word in set(re.findall(r"[a-z]{4,}", text.lower())):
            holders.setdefault(word, []).append(text)
    usual = [word for word, texts in holders.items() if 8 <= len(texts) <= 400]
    pairs = []
    for _ in range(count):
        first, alike = rng.choice(usual), rng.random() < 0.5
        second = first if alike else rng.choice(usual)
        texts = (rng.choice(holders[first]), rng.choice(holders[second]))
        pairs.append((_without(texts[0], first), _without(texts[1], second), alike))
    return [pair for pair in pairs if pair[0] != pair[1]]


def _without(text: str, word: str) -> str:
    return re.sub(rf"\b{re.escape(word)}\b", "___", text, flags=re.I)
