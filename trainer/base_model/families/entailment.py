"""Does a sentence follow from another? SNLI and SciTail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from trainer.base_model.corpus import NLI_LABELS, Corpus, LabelledPair
from trainer.base_model.families.task import (
    CHOICES,
    PAIR_FORMATS,
    LabelWords,
    Row,
    TrainingTask,
    answers,
    two_choices,
)

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
        about = f"{_NLI_QUESTION} {answers(classes, said)}"
        rows = _nli_rows(corpus.entailment, pattern, classes, said, rng, most_rows)
        yield TrainingTask(f"entailment_{number}", "entailment", about, rows)
    for number in range(6):
        said = words.yes_no()
        classes = ("entailment", "not_entailment")
        about = f"Does the evidence support the claim? {answers(('supported', 'not'), said)}"
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
                    rows.append(two_choices(asked, pair_shown, letters, rng))
            about = f"Choose between {letters[0]} and {letters[1]}: the {wanted} of the sentence."
            yield TrainingTask(f"choose_{wanted}_{letters[0]}", "choice", about, rows)
