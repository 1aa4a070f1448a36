"""The training tasks of the base model, family by family.

A training task gets prompt vectors of its own, so what teaches the base model to be steered is their
number and variety: the same rows return with other label words, other formats and other questions.
Rows are text to text; every generator draws from the `random.Random` that it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from trainer.base_model.corpus import NLI_LABELS, Corpus, LabelledPair, group_by_label

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
"""Two ends of a scale, in words; their embeddings' difference orders any text from one to the other."""


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


def make_tasks(corpus: Corpus, embed: Embed, rng: Random, most_rows: int) -> list[TrainingTask]:
    """All training tasks, shuffled rows, at most `most_rows` each."""
    words = LabelWords(corpus, rng)
    tasks = [
        *written_tasks(corpus),
        *verification_tasks(corpus, words, rng),
        *choice_tasks(corpus, rng),
        *entailment_tasks(corpus, words, rng, most_rows),
        *entailment_choice_tasks(corpus, rng),
        *intent_tasks(corpus, words, rng, most_rows),
        *pair_tasks(corpus, embed, words, rng, most_rows),
        *passage_tasks(corpus, words, rng, most_rows),
        *copy_tasks(corpus, rng, most_rows),
        *record_tasks(corpus, rng, most_rows),
        *slot_tasks(corpus),
        *rewriting_tasks(corpus, rng, most_rows),
        *semantic_tasks(corpus, embed, words, rng, most_rows),
    ]
    return [_shuffled(task, rng, most_rows) for task in tasks if len(task.rows) >= 40]


def _shuffled(task: TrainingTask, rng: Random, most_rows: int) -> TrainingTask:
    rows = list(dict.fromkeys(task.rows))
    rng.shuffle(rows)
    return TrainingTask(task.name, task.family, task.instruction, rows[:most_rows])


class LabelWords:
    """Draws the words that a task's classes are called by."""

    def __init__(self, corpus: Corpus, rng: Random) -> None:
        found: dict[str, int] = {}
        for pair in corpus.entailment:
            for word in re.findall(r"[a-z]{3,8}", pair.second.lower()):
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


def _answers(meanings: Sequence[str], words: Sequence[str]) -> str:
    """The part of an instruction that says which word stands for what."""
    if list(meanings) == list(words):
        return "Choose one of: " + ", ".join(words[:20]) + "."
    return "; ".join(f"{word}: {what}" for what, word in zip(meanings[:10], words, strict=False))


def _truncated(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])


# ---- tasks that people wrote ---------------------------------------------------------------------


def written_tasks(corpus: Corpus) -> Iterator[TrainingTask]:
    """Each instruction task as it is."""
    for name, task in corpus.instruction_tasks.items():
        yield TrainingTask(name, "written", task.instruction, task.rows)


def verification_tasks(corpus: Corpus, words: LabelWords, rng: Random) -> Iterator[TrainingTask]:
    """Is this the right output? The wrong one is the output of another row of the same task."""
    for name, task in corpus.instruction_tasks.items():
        if len({wanted for _, wanted in task.rows}) < 20:
            continue
        yes, no = words.yes_no()
        field = rng.choice(("answer", "candidate", "output", "response", "reply", "statement"))
        order = rng.choice(("{x}\n{field}: {y}", "{x}\n{field}: {y}", "{field}: {y}\n{x}"))
        rows = []
        for given, wanted in task.rows:
            right = rng.random() < 0.5
            shown = wanted if right else _another(task.rows, wanted, rng)
            text = order.format(x=_truncated(given, 130), field=field, y=_truncated(shown, 40))
            rows.append((text, yes if right else no))
        about = f"Is the {field} right or not? {_answers(('right', 'wrong'), (yes, no))}"
        yield TrainingTask(f"verify_{name}", "verification", f"{about} {task.instruction}", rows)


def choice_tasks(corpus: Corpus, rng: Random) -> Iterator[TrainingTask]:
    """Which of two outputs is the right one?"""
    for name, task in corpus.instruction_tasks.items():
        if len({wanted for _, wanted in task.rows}) < 20 or rng.random() < 0.3:
            continue
        letters = rng.choice(CHOICES)
        rows = []
        for given, wanted in task.rows:
            pair = [_truncated(wanted, 30), _truncated(_another(task.rows, wanted, rng), 30)]
            rows.append(_two_choices(_truncated(given, 110), pair, letters, rng))
        about = f"Which is right? Choose between {letters[0]} and {letters[1]}. {task.instruction}"
        yield TrainingTask(f"choose_{name}", "choice", about, rows)


def _another(rows: Sequence[Row], wanted: str, rng: Random) -> str:
    for _ in range(20):
        shown = rng.choice(rows)[1]
        if shown != wanted:
            return shown
    return "nothing"


def _two_choices(question: str, right_first: list[str], letters: Sequence[str], rng: Random) -> Row:
    """The question with two options in random order, and the letter of the right one."""
    place = rng.randrange(2)
    options = right_first if place == 0 else right_first[::-1]
    lines = (f"{letter}: {option}" for letter, option in zip(letters, options, strict=True))
    return "\n".join([question, *lines]), letters[place]


# ---- entailment ----------------------------------------------------------------------------------

_NLI_WORDS = (
    NLI_LABELS,
    ("yes", "maybe", "no"),
    ("true", "unknown", "false"),
    ("follows", "may be", "impossible"),
    ("agree", "unrelated", "disagree"),
)
_NLI_QUESTION = "What is the logical relationship between the two sentences?"


def entailment_tasks(
    corpus: Corpus, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """SNLI and SciTail with three or two classes, many formats, many label words."""
    for number in range(28):
        pattern = PAIR_FORMATS[number % len(PAIR_FORMATS)]
        classes: Sequence[str] = NLI_LABELS
        if number < 10:
            said: Sequence[str] = _NLI_WORDS[number % len(_NLI_WORDS)]
        elif number < 16:
            said = words.arbitrary(3)
        else:
            positive = rng.choice(NLI_LABELS)
            classes = (positive, f"not {positive}")
            said = words.yes_no()
        about = f"{_NLI_QUESTION} {_answers(classes, said)}"
        rows = _nli_rows(corpus.entailment, pattern, classes, said, rng, most_rows)
        yield TrainingTask(f"entailment_{number}", "entailment", about, rows)
    for number in range(6):
        said = words.yes_no()
        classes = ("entailment", "not_entailment")
        about = f"Does the evidence support the claim? {_answers(('supported', 'not'), said)}"
        pattern = PAIR_FORMATS[number % len(PAIR_FORMATS)]
        rows = _nli_rows(corpus.science_entailment, pattern, classes, said, rng, most_rows)
        yield TrainingTask(f"science_entailment_{number}", "entailment", about, rows)


def _nli_rows(
    pairs: Sequence[LabelledPair],
    pattern: str,
    classes: Sequence[str],
    said: Sequence[str],
    rng: Random,
    most_rows: int,
) -> list[Row]:
    """A class that is not in `classes` counts as the last one."""
    rows = []
    for pair in rng.sample(pairs, min(len(pairs), most_rows)):
        place = classes.index(pair.label) if pair.label in classes else len(classes) - 1
        rows.append((pattern.format(a=pair.first, b=pair.second), said[place]))
    return rows


def entailment_choice_tasks(corpus: Corpus, rng: Random) -> Iterator[TrainingTask]:
    """Which of two hypotheses follows from, or contradicts, the same premise?"""
    by_premise: dict[str, dict[str, str]] = {}
    for pair in corpus.entailment:
        by_premise.setdefault(pair.first, {})[pair.label] = pair.second
    questions = {
        "entailment": 'Which sentence follows from "{a}"?',
        "contradiction": 'Which sentence contradicts "{a}"?',
        "neutral": 'Which sentence may be true, but need not be, given "{a}"?',
    }
    for wanted, question in questions.items():
        for letters in CHOICES[:3]:
            rows = []
            for premise, known in by_premise.items():
                others = [label for label in known if label != wanted]
                if wanted in known and others:
                    pair_shown = [known[wanted], known[rng.choice(others)]]
                    asked = question.format(a=premise)
                    rows.append(_two_choices(asked, pair_shown, letters, rng))
            about = f"Choose between {letters[0]} and {letters[1]}: the {wanted} of the sentence."
            yield TrainingTask(f"choose_{wanted}_{letters[0]}", "choice", about, rows)


# ---- intents -------------------------------------------------------------------------------------


def intent_tasks(
    corpus: Corpus, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """Name the intent or the domain of a command: all of them, or a few, by name or by any word."""
    by_intent = group_by_label(corpus.commands)
    by_request = group_by_label(corpus.requests)
    by_domain = group_by_label([(text, intent.split("_")[0]) for text, intent in corpus.commands])
    plans: list[tuple[str, dict[str, list[str]], int]] = [("intent", by_intent, len(by_intent))]
    plans += [("domain", by_domain, len(by_domain)), ("request", by_request, len(by_request))]
    plans += [("intent", by_intent, rng.choice((2, 3, 4, 6, 8, 12, 20))) for _ in range(40)]
    plans += [("domain", by_domain, rng.choice((2, 3, 4, 6, 10))) for _ in range(10)]
    plans += [("request", by_request, rng.choice((2, 3, 4, 5, 7))) for _ in range(10)]
    for number, (what, groups, count) in enumerate(plans):
        chosen = rng.sample(sorted(groups), count)
        named = [_spaced(label) for label in chosen]
        said = named if number < 3 or rng.random() < 0.5 else list(words.arbitrary(count))
        pattern = rng.choice(TEXT_FORMATS)
        rows = [
            (pattern.format(x=text), word)
            for label, word in zip(chosen, said, strict=True)
            for text in groups[label]
        ]
        rng.shuffle(rows)
        about = f"What is the {what} of the text? {_answers(named, said)}"
        yield TrainingTask(f"{what}_{number}", "intents", about, rows[:most_rows])


def _spaced(label: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).replace("_", " ").lower()


# ---- pairs ---------------------------------------------------------------------------------------


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
            about = f"{_spaced(what)}? {_answers(('same', 'different'), (same, different))}"
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
    """A sentence and its split form; for negatives two of its words change places, or it is another."""
    pairs = []
    for place, (whole, first, second) in enumerate(corpus.splits):
        said, alike = f"{first} {second}", rng.random() < 0.5
        if not alike:
            other = corpus.splits[(place + 1) % len(corpus.splits)]
            said = f"{other[1]} {other[2]}" if rng.random() < 0.25 else _swapped(said, rng)
        pairs.append((whole, said, alike and said != whole))
    return pairs


def _swapped(text: str, rng: Random) -> str:
    """The text with two of its longer words in each other's place."""
    tokens = text.split()
    long_ones = [place for place, word in enumerate(tokens) if len(word) > 4]
    if len(long_ones) < 2:
        return text[::-1]
    first, second = rng.sample(long_ones, 2)
    tokens[first], tokens[second] = tokens[second], tokens[first]
    return " ".join(tokens)


def _same_question_pairs(corpus: Corpus, embed: Embed, rng: Random) -> list[LikePair]:
    """Questions whose embeddings are nearly equal, against ones that are only on the same subject."""
    texts = [text for text, _ in rng.sample(corpus.questions, min(12000, len(corpus.questions)))]
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
    for text in _captions(corpus):
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


def _captions(corpus: Corpus) -> list[str]:
    return sorted({pair.second for pair in corpus.entailment if len(pair.second.split()) > 5})


# ---- passages ------------------------------------------------------------------------------------


def passage_tasks(
    corpus: Corpus, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """What comes next, what is missing, what is out of order, where a text comes from."""
    splits = corpus.splits
    for letters in CHOICES[:3]:
        rows = []
        for _, first, second in rng.sample(splits, min(most_rows, len(splits))):
            asked = f'Which sentence comes after "{first}"?'
            rows.append(_two_choices(asked, [second, rng.choice(splits)[2]], letters, rng))
        about = f"Which sentence comes next? Choose between {letters[0]} and {letters[1]}."
        yield TrainingTask(f"next_sentence_{letters[0]}", "choice", about, rows)
    for number in range(5):
        intact, changed = words.yes_no()
        rows = []
        for text in rng.sample(_sentences(corpus), min(most_rows, 6000)):
            keep = rng.random() < 0.5
            rows.append((text if keep else _swapped(text, rng), intact if keep else changed))
        about = f"Are the words in order? {_answers(('in order', 'changed'), (intact, changed))}"
        yield TrainingTask(f"word_order_{number}", "pairs", about, rows)
    kinds = {
        "encyclopedia": [first for _, first, _ in splits],
        "caption": _captions(corpus),
        "command": [text for text, _ in corpus.commands + corpus.requests],
        "question": [text for text, _ in corpus.questions],
        "story": [_truncated(text, 60) for text in corpus.narratives],
    }
    for number in range(6):
        said = list(kinds) if number < 2 else list(words.arbitrary(len(kinds)))
        rows = [
            (text, word)
            for texts, word in zip(kinds.values(), said, strict=True)
            for text in rng.sample(texts, min(len(texts), most_rows // 5))
        ]
        about = f"Which kind of text is it? {_answers(list(kinds), said)}"
        yield TrainingTask(f"kind_of_text_{number}", "semantics", about, rows)
    for number in range(4):
        good, bad = words.yes_no()
        rows = [
            (text, good if rating >= 0.8 else bad)
            for text, rating in corpus.questions
            if rating >= 0.8 or rating <= 0.4
        ]
        about = f"Is the question well formed? {_answers(('well formed', 'not'), (good, bad))}"
        yield TrainingTask(f"well_formed_{number}", "pairs", about, rows)


def _sentences(corpus: Corpus) -> list[str]:
    return [half for _, *halves in corpus.splits for half in halves] + _captions(corpus)


# ---- copying -------------------------------------------------------------------------------------


def copy_tasks(corpus: Corpus, rng: Random, most_rows: int) -> Iterator[TrainingTask]:
    """Copy a part of the text: by place, by neighbour, by kind, whole."""
    sentences = _sentences(corpus)

    def clean(text: str) -> list[str]:
        return re.findall(r"[A-Za-z]+|\d+", text)

    places = {"first": 0, "second": 1, "third": 2, "last": -1, "last but one": -2}
    for said, place in places.items():
        rows = [(t, clean(t)[place]) for t in rng.sample(sentences, most_rows) if len(clean(t)) > 4]
        yield TrainingTask(f"{said}_word", "copying", f"Copy the {said} word of the text.", rows)
    rows = [(t, max(clean(t), key=len)) for t in rng.sample(sentences, most_rows) if clean(t)]
    yield TrainingTask("longest_word", "copying", "Copy the longest word of the text.", rows)
    rows = [(text, text) for text in rng.sample(sentences, most_rows) if len(text.split()) < 20]
    yield TrainingTask("whole_text", "copying", "Copy the text.", rows)
    rows = [
        (text, found.group())
        for text in [*sentences, *(text for text, _ in corpus.requests)]
        if (found := re.search(r"\b\d+\b", text)) and len(re.findall(r"\b\d+\b", text)) == 1
    ]
    yield TrainingTask("number", "copying", "Copy the number in the text.", rows)
    rows = [
        (text, names[0])
        for _, text, _ in corpus.splits
        if len(names := re.findall(r"(?<=[a-z] )[A-Z][a-z]+(?: [A-Z][a-z]+)*", text)) == 1
    ]
    yield TrainingTask("only_name", "copying", "Copy the name that the text mentions.", rows)
    rows = [
        (text, names[-1])
        for text, *_ in corpus.splits
        if len(names := re.findall(r"(?<=[a-z] )[A-Z][a-z]+(?: [A-Z][a-z]+)*", text)) >= 2
    ]
    yield TrainingTask("last_name", "copying", "Copy the last name in the text.", rows)
    for said, offset in (("after", 1), ("before", -1)):
        rows = []
        for text in rng.sample(sentences, most_rows):
            if len(tokens := clean(text)) > 6:
                place = rng.randrange(1, len(tokens) - 1)
                if tokens.count(tokens[place]) == 1:
                    rows.append((f"word: {tokens[place]}\n{text}", tokens[place + offset]))
        about = f"Copy the word {said} the given word."
        yield TrainingTask(f"word_{said}", "copying", about, rows)
    rows = []
    for text in rng.sample(sentences, most_rows):
        if len(tokens := text.split()) > 10:
            start = rng.randrange(1, len(tokens) - 5)
            end = start + rng.randrange(1, 5)
            hole = [*tokens[:start], '"', *tokens[start:end], '"', *tokens[end:]]
            rows.append((" ".join(hole), " ".join(tokens[start:end])))
    yield TrainingTask("quoted_words", "copying", "Copy the words between quotation marks.", rows)


_PEOPLE = (
    "Anna Ben Clara David Ella Frank Grace Henry Ida Jack Kate Liam Maria Noah Olga Paul Rosa Sam"
    " Tina Victor Wendy Yusuf Zoe Amir Chloe Diego Emma Hugo Ines Jonas Lena Marco Nina Omar"
).split()
_THINGS = (
    "book lamp bicycle guitar ticket coat parcel key camera chair letter jacket phone basket drum"
    " ladder clock carpet mirror bottle blanket hammer puzzle painting notebook kettle"
).split()
_EVENTS = (
    ("{who} gave the {what} to {other} in {place} on {day}.", "who what other place day"),
    ("On {day} {who} met {other} in {place}, not in {wrong}.", "day who other place wrong"),
    ("{who} moved from {wrong} to {place} with {other}.", "who wrong place other"),
    ("The {what} was sent by {who} to {other}, who lives in {place}.", "what who other place"),
    ("{other} lost the {what} in {place}; {who} found it on {day}.", "other what place who day"),
    ("We asked {other} first, but it was {who} who paid for the {what}.", "other who what"),
    ("{who} used to work in {wrong}. Since {day} the office is in {place}.", "who wrong day place"),
    (
        "Not the {instead} but the {what} broke when {who} visited {place}.",
        "instead what who place",
    ),
)
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday January March June".split()
_FIELDS = "name colour town price owner size code team month material rank status maker".split()


def record_tasks(corpus: Corpus, rng: Random, most_rows: int) -> Iterator[TrainingTask]:
    """Read one field out of a record, or one role out of a made-up event with distractors."""
    capitals = corpus.instruction_tasks.get("task1146_country_capital")
    places = [city for _, city in capitals.rows] if capitals else ["Oslo", "Lima", "Rome", "Cairo"]
    values = sorted({word for text, _ in corpus.requests for word in text.split() if len(word) > 3})
    for place in range(3):
        rows = []
        for _ in range(most_rows):
            fields = rng.sample(_FIELDS, rng.randrange(2, 6))
            held = {field: rng.choice(values) for field in fields}
            asked = fields[min(place, len(fields) - 1)]
            shown = list(held.items())
            rng.shuffle(shown)
            record = rng.choice((", ", "; ", "\n")).join(f"{k}: {v}" for k, v in shown)
            rows.append((f"{asked}?\n{record}", held[asked]))
        about = "Copy the value of the field that is asked for."
        yield TrainingTask(f"record_{place}", "copying", about, rows)
    questions = {
        "who": "Who did it?",
        "other": "Who is the other person?",
        "what": "Which thing is it about?",
        "place": "In which town is it?",
        "day": "When was it?",
    }
    for role, question in questions.items():
        usable = [event for event, roles in _EVENTS if role in roles.split()]
        for form in range(2):
            rows = []
            for _ in range(most_rows // 2):
                who, other = rng.sample(_PEOPLE, 2)
                what, instead = rng.sample(_THINGS, 2)
                here, wrong = rng.sample(places, 2)
                held = dict(who=who, other=other, what=what, instead=instead, place=here)
                held |= dict(wrong=wrong, day=rng.choice(_DAYS))
                text = rng.choice(usable).format(**held)
                extra = rng.choice(corpus.splits)[2] if form else ""
                rows.append((f"{text} {extra}".strip(), held[role]))
            yield TrainingTask(f"event_{role}_{form}", "copying", question, rows)


_SLOTS = {
    "party_size": (r"\bfor (\w+) people\b", "BookRestaurant", "For how many people is the table?"),
    "restaurant_place": (
        r"(?<! \d) in ([a-z ]{4,30})$",
        "BookRestaurant",
        "In which place is the restaurant?",
    ),
    "weather_place": (r" (?:in|for) ([a-z ]{4,30})$", "GetWeather", "For which place is it?"),
    "rating": (r"\b(\w+) (?:out of|of) \w+\b", "RateBook", "How many points are given?"),
    "best_rating": (r"\bout of (\w+)\b", "RateBook", "Out of how many points?"),
    "rated_book": (r"^(?:rate|give) (?:the )?(.{4,40}?) \w+ (?:out of|stars|points)", "RateBook",
                   "Which book is rated?"),
    "playlist": (r"\b(?:to|onto|on) (?:my |the )?(.{3,30}?) playlist\b", "AddToPlaylist",
                 "To which playlist is it added?"),
    "added_music": (r"^add (.{3,40}?) (?:to|onto) (?:my|the)\b", "AddToPlaylist", "What is added?"),
    "artist": (r" by ([a-z ]{4,30}?)(?: on .*)?$", "PlayMusic", "Which artist is it by?"),
    "music_service": (r" (?:on|using|from|through) ([a-z ]{4,20})$", "PlayMusic",
                      "On which service is it played?"),
    "wanted_work": (r"\b(?:called|named|titled) (.{3,40})$", "SearchCreativeWork",
                    "What is the work called?"),
    "film": (r"\b(?:see|watch) (.{3,40}?)(?: at .*)?$", "SearchScreeningEvent", "Which film is it?"),
}  # fmt: skip


def slot_tasks(corpus: Corpus) -> Iterator[TrainingTask]:
    """Copy a detail out of a request: Snips, by patterns of our own."""
    for name, (pattern, intent, question) in _SLOTS.items():
        rows = [
            (text, found.group(1).strip())
            for text, label in corpus.requests
            if label == intent and (found := re.search(pattern, text))
        ]
        yield TrainingTask(f"slot_{name}", "copying", question, rows)


# ---- rewriting -----------------------------------------------------------------------------------


def rewriting_tasks(corpus: Corpus, rng: Random, most_rows: int) -> Iterator[TrainingTask]:
    """Fill in what is missing, put words in order, split and join sentences."""
    sentences = _sentences(corpus)
    questions = [text for text, _ in corpus.questions]
    for name, texts in (("sentence", sentences), ("question", questions)):
        for longest in (1, 4):
            rows = []
            for text in rng.sample(texts, min(len(texts), most_rows)):
                if len(tokens := text.split()) > longest + 4:
                    start = rng.randrange(1, len(tokens) - longest)
                    end = start + rng.randrange(1, longest + 1)
                    shown = " ".join([*tokens[:start], "[MASK]", *tokens[end:]])
                    rows.append((shown, " ".join(tokens[start:end])))
            about = f"Write what is missing in the {name}: at most {longest} words."
            yield TrainingTask(f"missing_{name}_{longest}", "rewriting", about, rows)
    rows = []
    for text in rng.sample(_captions(corpus), most_rows):
        tokens = text.split()
        if len(tokens) <= 12:
            rows.append((" ".join(rng.sample(tokens, len(tokens))), text))
    yield TrainingTask("unshuffle", "rewriting", "Put the words in order.", rows)
    rows = []
    for text in rng.sample(sentences, most_rows):
        kept = [word for word in text.split() if rng.random() > 0.2]
        if 4 < len(kept) < 25:
            rows.append((" ".join(kept), text))
    yield TrainingTask("restore", "rewriting", "Write the whole sentence.", rows)
    rows = [(whole, f"{first} {second}") for whole, first, second in corpus.splits]
    yield TrainingTask("split_sentence", "rewriting", "Split the sentence into two.", rows)
    rows = [(f"{first}\n{second}", whole) for whole, first, second in corpus.splits]
    yield TrainingTask("join_sentences", "rewriting", "Join the two sentences.", rows)
    rows = [(first, second) for _, first, second in corpus.splits]
    yield TrainingTask("continue", "rewriting", "Write what comes next.", rows)


# ---- meaning, as the encoder sees it -------------------------------------------------------------


def semantic_tasks(
    corpus: Corpus, embed: Embed, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """Classes that the encoder's own embeddings define: regions, and places along a scale.

    They teach the decoder to read any direction of meaning out of the encoder when a prompt asks
    for it, with as many classes and whichever label words.
    """
    pools = {
        "encyclopedia": [whole for whole, *_ in corpus.splits],
        "caption": _captions(corpus),
        "question": [text for text, _ in corpus.questions],
        "story": [_truncated(text, 80) for text in corpus.narratives],
    }
    pools = {name: rng.sample(texts, min(len(texts), 8000)) for name, texts in pools.items()}
    pools["mixed"] = [text for texts in pools.values() for text in texts[:2500]]
    vectors = {name: embed(texts) for name, texts in pools.items()}
    ends = embed([end for axis in AXES for end in axis])
    names = list(pools)
    for number in range(40):
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
    """Which of `count` random texts is nearest? A class is named by its most telling word, or any."""
    anchors = rng.sample(range(len(texts)), count)
    for _ in range(3):  # a few rounds of k-means make the regions natural
        nearest = np.argmax(vectors @ vectors[anchors].T, axis=1)
        means = [vectors[nearest == region].mean(axis=0) for region in range(count)]
        anchors = [int(np.argmax(vectors @ mean)) for mean in means]
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
    about = f"What is the topic of the text? {_answers(telling, said)}"
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
