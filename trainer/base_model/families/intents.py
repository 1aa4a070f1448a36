"""Name the intent or the domain of a command."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from trainer.base_model.corpus import Corpus, group_by_label
from trainer.base_model.families.task import TEXT_FORMATS, LabelWords, TrainingTask, answers, spaced


def intent_tasks(
    corpus: Corpus, words: LabelWords, rng: Random, most_rows: int
) -> Iterator[TrainingTask]:
    """Name the intent or the domain of a command: all of them, or a few, by name or by any word."""
    by_intent = group_by_label(corpus.commands)
    by_request = group_by_label(corpus.requests)
    by_domain = group_by_label([(text, intent.split("_")[0]) for text, intent in corpus.commands])
    plans: list[tuple[str, dict[str, list[str]], int]] = [("intent", by_intent, len(by_intent))]
    plans += [("domain", by_domain, len(by_domain)), ("request", by_request, len(by_request))]
    plans += [("intent", by_intent, rng.choice((2, 3, 4, 6, 8, 12, 20))) for _ in range(80)]
    plans += [("domain", by_domain, rng.choice((2, 3, 4, 6, 10))) for _ in range(20)]
    plans += [("request", by_request, rng.choice((2, 3, 4, 5, 7))) for _ in range(20)]
    for number, (what, groups, count) in enumerate(plans):
        chosen = rng.sample(sorted(groups), count)
        named = [spaced(label) for label in chosen]
        said = named if number < 3 or rng.random() < 0.5 else list(words.arbitrary(count))
        pattern = rng.choice(TEXT_FORMATS)
        rows = [
            (pattern.format(x=text), word)
            for label, word in zip(chosen, said, strict=True)
            for text in groups[label]
        ]
        rng.shuffle(rows)
        about = f"What is the {what} of the text? {answers(named, said)}"
        yield TrainingTask(f"{what}_{number}", "intents", about, rows[:most_rows])
