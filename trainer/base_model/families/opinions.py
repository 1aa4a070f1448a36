"""Is an opinion good or bad? Sentences rated by a lexicon, and reviews made of clauses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from trainer.base_model.corpus import Corpus
from trainer.base_model.families.review_clauses import REVIEWS
from trainer.base_model.families.task import (
    TEXT_FORMATS,
    LabelWords,
    Row,
    TrainingTask,
    answers,
    captions,
)

_GOOD_BAD = (
    ("positive", "negative"),
    ("good", "bad"),
    ("happy", "unhappy"),
    ("yes", "no"),
    ("satisfied", "dissatisfied"),
    ("praise", "complaint"),
    ("great", "terrible"),
    ("1", "0"),
)
_STARS = (
    ("1 star", "2 stars", "3 stars", "4 stars", "5 stars"),
    ("very negative", "negative", "neutral", "positive", "very positive"),
    ("terrible", "bad", "fair", "good", "excellent"),
    ("1", "2", "3", "4", "5"),
)
_THREE = (("negative", "mixed", "positive"), ("bad", "neutral", "good"))
# VADER's compound score is from -1 to 1; its authors call 0.05 the edge of neutral. What is nearer
# to it than this is left out: the lexicon is often wrong there.
_CLEAR = 0.45
_EVEN = 0.05


def opinion_tasks(
    corpus: Corpus, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """Good or bad, and how much: of sentences that people wrote, and of composed reviews."""
    rated = _rated_sentences(corpus)
    clear = [(text, score > 0) for text, score in rated if abs(score) >= _CLEAR]
    reviews = [_review(rng) for _ in range(4 * most_rows)]
    certain = [(text, stars >= 4) for text, stars in reviews if stars != 3]
    for number in range(16):
        source = (clear, certain)[number % 2]
        said = words.arbitrary(2) if number >= 12 else _GOOD_BAD[number // 2 % len(_GOOD_BAD)]
        pattern = rng.choice(TEXT_FORMATS)
        rows = [
            (pattern.format(x=text), said[0] if good else said[1])
            for text, good in _balanced(source, rng)
        ]
        about = f"Is the text positive or negative? {answers(('positive', 'negative'), said)}"
        yield TrainingTask(f"opinion_{number}", "opinions", about, rows[:most_rows])
    for number, levels in enumerate((*_STARS, *_THREE)):
        rows = []
        for text, stars in reviews:
            place = stars - 1 if len(levels) == 5 else (stars > 2) + (stars > 3)
            rows.append((text, levels[place]))
        about = f"How good does the writer find it? {answers(levels, levels)}"
        yield TrainingTask(f"stars_{number}", "opinions", about, rows[:most_rows])
    even = [text for text, score in rated if abs(score) <= _EVEN]
    for number in range(4):
        said = _THREE[number] if number < 2 else words.arbitrary(3)
        rows = [(text, said[2] if good else said[0]) for text, good in clear]
        rows += [(text, said[1]) for text in rng.sample(even, min(len(even), len(clear) // 2))]
        rng.shuffle(rows)
        about = f"Which feeling? {answers(('negative', 'neutral', 'positive'), said)}"
        yield TrainingTask(f"feeling_{number}", "opinions", about, rows[:most_rows])


def _rated_sentences(corpus: Corpus) -> list[tuple[str, float]]:
    """Sentences and short passages with VADER's compound score (Hutto and Gilbert 2014)."""
    analyser = SentimentIntensityAnalyzer()
    texts: list[str] = []
    for passage in corpus.narratives:
        sentences = re.split(r"(?<=[.!?])\s+", passage)
        texts += [" ".join(sentences[i : i + 2]) for i in range(len(sentences))]
        texts += sentences
    texts += captions(corpus)[:3000]
    kept = dict.fromkeys(text for text in texts if 4 <= len(text.split()) <= 70)
    return [(text, float(analyser.polarity_scores(text)["compound"])) for text in kept]


def _review(rng: Random) -> tuple[str, int]:
    """A composed review and its stars, 1 to 5.

    After `but` the last clause decides between the middle three; three stars are even.
    """
    clauses = rng.choice(REVIEWS)
    stars = rng.choice((1, 2, 3, 4, 5))
    good, bad = {1: (0, 2), 2: (1, 2), 3: (1, 1), 4: (2, 1), 5: (2, 0)}[stars]
    if stars in (1, 5) and rng.random() < 0.45:  # short ones
        good, bad = min(good, 1), min(bad, 1)
    parts = [*_pick(clauses.good, good, rng), *_pick(clauses.bad, bad, rng)]
    # What weighs less comes first: "nice room, but ...".
    if stars == 4:
        parts = [*parts[2:], *parts[:2]]
    text = _joined(parts, contrast=stars in (2, 4), rng=rng)
    if rng.random() < 0.5:
        neutral = rng.choice(clauses.neutral)
        text = f"{neutral}. {text}" if rng.random() < 0.6 else f"{text}. {neutral}"
    return _styled(text, rng), stars


def _pick(clauses: Sequence[str], count: int, rng: Random) -> list[str]:
    return rng.sample(list(clauses), count)


def _joined(parts: Sequence[str], *, contrast: bool, rng: Random) -> str:
    if not contrast or len(parts) < 2:
        return rng.choice((". ", ", and ", "; ", ", ")).join(parts)
    rest = rng.choice((". ", " and ", ", ")).join(parts[1:])
    turn = rng.choice((", but {}", ". However, {}", ". Still, {}", "; all the same {}", ", yet {}"))
    return parts[0] + turn.format(rest)


def _styled(text: str, rng: Random) -> str:
    sentences = [part[:1].upper() + part[1:] for part in text.split(". ")]
    text = ". ".join(sentences)
    style = rng.random()
    if style < 0.3:
        return text.lower()
    if style < 0.4:
        return text + "!"
    return text + "."


def _balanced(rated: Sequence[tuple[str, bool]], rng: Random) -> list[tuple[str, bool]]:
    good = [row for row in rated if row[1]]
    bad = [row for row in rated if not row[1]]
    count = min(len(good), len(bad))
    rows = [*rng.sample(good, count), *rng.sample(bad, count)]
    rng.shuffle(rows)
    return rows


def answer_type_tasks(corpus: Corpus, words: LabelWords, rng: Random) -> Iterator[TrainingTask]:
    """What kind of answer does a question ask for? Told by its question words."""
    kinds: dict[str, list[str]] = {kind: [] for kind in _ANSWER_TYPES}
    for text, _ in corpus.questions:
        for kind, pattern in _ANSWER_TYPES.items():
            if re.search(pattern, text.lower()):
                kinds[kind].append(text)
                break
    names = list(kinds)
    for number in range(8):
        chosen = names if number < 2 else rng.sample(names, rng.choice((3, 4, 5)))
        said = chosen if number % 2 == 0 else list(words.arbitrary(len(chosen)))
        rows: list[Row] = []
        for kind, word in zip(chosen, said, strict=True):
            rows += [(text, word) for text in rng.sample(kinds[kind], min(len(kinds[kind]), 600))]
        rng.shuffle(rows)
        about = f"What does the question ask for? {answers(chosen, said)}"
        yield TrainingTask(f"answer_type_{number}", "semantics", about, rows)


_ANSWER_TYPES = {
    "number": r"\bhow (many|much|tall|far|deep|high|long is|big|heavy|old|fast|hot)\b"
    r"|\bwhat (is the )?(number|percentage|population|distance|temperature|price|cost)\b",
    "time": r"^when\b|\b(what|which) (year|day|date|month|century|time)\b"
    r"|\bhow long (did|does|do)\b",
    "place": r"^where\b"
    r"|\b(what|which) (country|city|state|continent|island|town|place|river|county)\b",
    "person": r"^who\b|\bwhose\b"
    r"|\b(what|which) (man|woman|person|king|president|author|actor|actress|singer|player)\b",
    "reason": r"^why\b|\bwhat (is the reason|causes?|caused)\b",
    "manner": r"^how (do|does|did|can|to|is|are)\b",
    "meaning": r"\bwhat (does .* mean|is the (meaning|definition))\b|\bdefinition\b",
    "yes or no": r"^(is|are|was|were|do|does|did|can|could|has|have|should|will)\b",
    "thing": r"^(what|which)\b",
}
