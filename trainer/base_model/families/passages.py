"""What comes next, what is out of order, where a text comes from."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from trainer.base_model.corpus import Corpus
from trainer.base_model.families.task import (
    CHOICES,
    LabelWords,
    TrainingTask,
    answers,
    captions,
    sentences,
    swapped,
    truncated,
    two_choices,
)


def passage_tasks(
    corpus: Corpus, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """What comes next, what is missing, what is out of order, where a text comes from."""
    splits = corpus.splits
    for letters in CHOICES[:3]:
        rows = []
        for _, first, second in rng.sample(splits, min(most_rows, len(splits))):
            asked = f'Which sentence comes after "{first}"?'
            rows.append(two_choices(asked, [second, rng.choice(splits)[2]], letters, rng))
        about = f"Which sentence comes next? Choose between {letters[0]} and {letters[1]}."
        yield TrainingTask(f"next_sentence_{letters[0]}", "choice", about, rows)
    for number in range(5):
        intact, changed = words.yes_no()
        rows = []
        for text in rng.sample(sentences(corpus), min(most_rows, 6000)):
            keep = rng.random() < 0.5
            rows.append((text if keep else swapped(text, rng), intact if keep else changed))
        about = f"Are the words in order? {answers(('in order', 'changed'), (intact, changed))}"
        yield TrainingTask(f"word_order_{number}", "pairs", about, rows)
    kinds = {
        "encyclopedia": [first for _, first, _ in splits],
        "caption": captions(corpus),
        "command": [text for text, _ in corpus.commands + corpus.requests],
        "question": [text for text, _ in corpus.questions],
        "story": [truncated(text, 60) for text in corpus.narratives],
    }
    for number in range(6):
        said = list(kinds) if number < 2 else list(words.arbitrary(len(kinds)))
        rows = [
            (text, word)
            for texts, word in zip(kinds.values(), said, strict=True)
            for text in rng.sample(texts, min(len(texts), most_rows // 5))
        ]
        about = f"Which kind of text is it? {answers(list(kinds), said)}"
        yield TrainingTask(f"kind_of_text_{number}", "semantics", about, rows)
    for number in range(4):
        good, bad = words.yes_no()
        rows = [
            (text, good if rating >= 0.8 else bad)
            for text, rating in corpus.questions
            if rating >= 0.8 or rating <= 0.4
        ]
        about = f"Is the question well formed? {answers(('well formed', 'not'), (good, bad))}"
        yield TrainingTask(f"well_formed_{number}", "pairs", about, rows)
