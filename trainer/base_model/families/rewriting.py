"""Fill in what is missing, put words in order, split and join sentences."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from trainer.base_model.corpus import Corpus
from trainer.base_model.families.task import TrainingTask, captions, sentences


def rewriting_tasks(corpus: Corpus, rng: Random, most_rows: int) -> Iterator[TrainingTask]:
    """Fill in what is missing, put words in order, split and join sentences."""
    whole_sentences = sentences(corpus)
    questions = [text for text, _ in corpus.questions]
    for name, texts in (("sentence", whole_sentences), ("question", questions)):
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
    for text in rng.sample(captions(corpus), most_rows):
        tokens = text.split()
        if len(tokens) <= 12:
            rows.append((" ".join(rng.sample(tokens, len(tokens))), text))
    yield TrainingTask("unshuffle", "rewriting", "Put the words in order.", rows)
    rows = []
    for text in rng.sample(whole_sentences, most_rows):
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
