"""Classes that the encoder's own embeddings define: regions, and places along a scale."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from trainer.base_model.corpus import Corpus
from trainer.base_model.families.task import (
    TEXT_FORMATS,
    Embed,
    LabelWords,
    Row,
    TrainingTask,
    answers,
    captions,
    truncated,
)

LEVELS = (
    ("very low", "low", "medium", "high", "very high"),
    ("very negative", "negative", "neutral", "positive", "very positive"),
    ("1", "2", "3", "4", "5"),
    ("never", "rarely", "sometimes", "often", "always"),
)
AXES = (
    ("wonderful, great, excellent, love", "terrible, awful, horrible, hate"),
    ("happy, glad, fun", "sad, sorry, crying"),
    ("I recommend it, I liked it", "a waste of time, I was disappointed"),
    ("praise, thanks, nice work", "complaint, problem, broken"),
    ("polite formal language", "rude informal slang"),
    ("science, physics, biology", "art, music, poetry"),
    ("sport, match, team, player", "politics, government, election"),
    ("business, money, company, market", "family, children, home"),
    ("computers, software, internet", "nature, animals, plants"),
    ("history, ancient, century", "today, modern, new"),
    ("food, cooking, restaurant", "travel, city, road"),
    ("health, doctor, disease", "school, university, education"),
    ("a person, a man, a woman", "a place, a town, a river"),
    ("a book, a film, an album", "a company, an organisation"),
    ("building, house, church", "vehicle, car, ship, aircraft"),
    ("a question", "a statement"),
    ("danger, violence, war", "peace, calm, safety"),
    ("certain, definitely, fact", "maybe, perhaps, possibly"),
    ("many people, a crowd", "one person alone"),
    ("outdoors, street, field", "indoors, room, kitchen"),
    ("fast, running, moving", "slow, sitting, standing still"),
    ("religion, society, culture", "mathematics, numbers, calculation"),
    ("weather, rain, sun", "music, song, band"),
    ("cause, because, reason", "effect, result, consequence"),
)
"""Two ends of a scale, in words; the difference of their embeddings orders any text along it."""


def semantic_tasks(
    corpus: Corpus, embed: Embed, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """Classes that the encoder's own embeddings define: regions, and places along a scale.

    They teach the decoder to read any direction of meaning out of the encoder when a prompt asks
    for it, with as many classes and whichever label words.
    """
    pools = {
        "encyclopedia": [whole for whole, *_ in corpus.splits],
        "caption": captions(corpus),
        "question": [text for text, _ in corpus.questions],
        "story": [truncated(text, 80) for text in corpus.narratives],
    }
    pools = {name: rng.sample(texts, min(len(texts), 6000)) for name, texts in pools.items()}
    pools["mixed"] = [text for texts in pools.values() for text in texts[:2500]]
    vectors = {name: embed(texts) for name, texts in pools.items()}
    ends = embed([end for axis in AXES for end in axis])
    names = list(pools)
    for number in range(60):
        pool = names[number % len(names)]
        count = rng.choice((2, 3, 4, 5, 7, 10, 14))
        yield _region_task(number, pools[pool], vectors[pool], count, words, rng, most_rows)
    for number, axis in enumerate(AXES):
        scale = ends[2 * number] - ends[2 * number + 1]
        for pool in rng.sample(names, 3):
            places = vectors[pool] @ scale
            order = np.argsort(-places)
            for levels in (rng.choice(LEVELS),) if rng.random() < 0.4 else (words.yes_no(),):
                rows = _levels(pools[pool], order, levels, rng)
                about = f"From {axis[0]} to {axis[1]}: choose one of {', '.join(levels)}."
                name = f"scale_{number}_{pool}"
                yield TrainingTask(name, "semantics", about, rows[:most_rows])


def _region_task(
    number: int,
    texts: Sequence[str],
    vectors: NDArray[np.float32],
    count: int,
    words: LabelWords,
    rng: Random,
    most_rows: int,
) -> TrainingTask:
    """Which of `count` texts is nearest? A class is called by its most telling word, or any."""
    anchors = rng.sample(range(len(texts)), count)
    for _ in range(3):  # a few rounds of k-means make the regions natural
        nearest = np.argmax(vectors @ vectors[anchors].T, axis=1)
        members = [vectors[nearest == region] for region in range(count)]
        anchors = [
            int(np.argmax(vectors @ own.mean(axis=0))) if len(own) else anchor
            for own, anchor in zip(members, anchors, strict=True)
        ]
    likeness = vectors @ vectors[anchors].T
    nearest = np.argmax(likeness, axis=1)
    ranked = np.sort(likeness, axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > 0.03
    regions = [
        [texts[int(i)] for i in np.flatnonzero((nearest == region) & clear)]
        for region in range(count)
    ]
    telling = _telling_words(regions)
    distinct = len(set(telling)) == count and all(telling)
    said = telling if distinct and rng.random() < 0.6 else list(words.arbitrary(count))
    pattern = rng.choice(TEXT_FORMATS)
    rows = [
        (pattern.format(x=text), word)
        for region, word in zip(regions, said, strict=True)
        for text in region
    ]
    rng.shuffle(rows)
    about = f"What is the topic of the text? {answers(telling, said)}"
    return TrainingTask(f"region_{number}", "semantics", about, rows[:most_rows])


def _telling_words(regions: Sequence[Sequence[str]]) -> list[str]:
    """For each region, the word whose share of texts most exceeds its share elsewhere."""
    shares: list[dict[str, float]] = []
    for region in regions:
        counts: dict[str, float] = {}
        for text in region:
            for word in set(re.findall(r"[a-z]{4,}", text.lower())):
                counts[word] = counts.get(word, 0.0) + 1.0 / len(region)
        shares.append(counts)
    telling = []
    for place, mine in enumerate(shares):
        others = [share for other, share in enumerate(shares) if other != place]
        excess = {
            word: share - max(other.get(word, 0.0) for other in others)
            for word, share in mine.items()
        }
        telling.append(max(excess, key=excess.__getitem__) if excess else "")
    return telling


def _levels(
    texts: Sequence[str], order: NDArray[np.int64], levels: Sequence[str], rng: Random
) -> list[Row]:
    """Texts in equal bands along a scale; between two bands a tenth of the texts is left out."""
    rows: list[Row] = []
    for place, level in enumerate(levels):
        band = len(order) // len(levels)
        middle = order[place * band + band // 10 : (place + 1) * band - band // 10]
        if len(levels) == 2:  # two classes: the two ends alone
            middle = order[: len(order) // 4] if place == 0 else order[-(len(order) // 4) :]
        rows.extend((texts[i], level) for i in middle)
    rng.shuffle(rows)
    return rows
