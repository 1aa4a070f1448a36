"""The training tasks of the base model, family by family.

A training task gets prompt vectors of its own, so what teaches the base model to be steered is
their number and variety: the same rows return with other label words, formats and questions.
Rows are text to text; every generator draws from the `random.Random` that it is given.
"""

from __future__ import annotations

from random import Random

from trainer.base_model.corpus import Corpus
from trainer.base_model.families.copying import copy_tasks, record_tasks, slot_tasks
from trainer.base_model.families.entailment import entailment_choice_tasks, entailment_tasks
from trainer.base_model.families.intents import intent_tasks
from trainer.base_model.families.opinions import answer_type_tasks, opinion_tasks
from trainer.base_model.families.pairs import pair_tasks
from trainer.base_model.families.passages import passage_tasks
from trainer.base_model.families.rewriting import rewriting_tasks
from trainer.base_model.families.semantics import semantic_tasks
from trainer.base_model.families.task import Embed, LabelWords, TrainingTask
from trainer.base_model.families.written import choice_tasks, verification_tasks, written_tasks

__all__ = ["TrainingTask", "make_tasks"]


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
        *opinion_tasks(corpus, words, rng, most_rows),
        *answer_type_tasks(corpus, words, rng),
    ]
    return [_shuffled(task, rng, most_rows) for task in tasks if len(task.rows) >= 40]


def _shuffled(task: TrainingTask, rng: Random, most_rows: int) -> TrainingTask:
    rows = list(dict.fromkeys(task.rows))
    rng.shuffle(rows)
    return TrainingTask(task.name, task.family, task.instruction, rows[:most_rows])
