"""Tasks that people wrote; is this output right; which of two outputs is right?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from trainer.base_model.corpus import Corpus, InstructionTask
from trainer.base_model.families.task import (
    CHOICES,
    LabelWords,
    Row,
    TrainingTask,
    answers,
    truncated,
    two_choices,
)


def written_tasks(corpus: Corpus) -> Iterator[TrainingTask]:
    """Each instruction task as it is."""
    for name, task in corpus.instruction_tasks.items():
        yield TrainingTask(name, "written", task.instruction, task.rows)


def verification_tasks(corpus: Corpus, words: LabelWords, rng: Random) -> Iterator[TrainingTask]:
    """Is this the right output? The wrong one is the output of another row of the same task."""
    for name, task in _numbered(corpus, 3):
        if len({wanted for _, wanted in task.rows}) < 20:
            continue
        yes, no = words.yes_no()
        field = rng.choice(("answer", "candidate", "output", "response", "reply", "statement"))
        order = rng.choice(("{x}\n{field}: {y}", "{x}\n{field}: {y}", "{field}: {y}\n{x}"))
        rows = []
        for given, wanted in task.rows:
            right = rng.random() < 0.5
            shown = wanted if right else _another(task.rows, wanted, rng)
            text = order.format(x=truncated(given, 130), field=field, y=truncated(shown, 40))
            rows.append((text, yes if right else no))
        about = f"Is the {field} right or not? {answers(('right', 'wrong'), (yes, no))}"
        yield TrainingTask(f"verify_{name}", "verification", f"{about} {task.instruction}", rows)


def choice_tasks(corpus: Corpus, rng: Random) -> Iterator[TrainingTask]:
    """Which of two outputs is the right one?"""
    for name, task in _numbered(corpus, 2):
        if len({wanted for _, wanted in task.rows}) < 20:
            continue
        letters = rng.choice(CHOICES)
        rows = []
        for given, wanted in task.rows:
            pair = [truncated(wanted, 30), truncated(_another(task.rows, wanted, rng), 30)]
            rows.append(two_choices(truncated(given, 110), pair, letters, rng))
        about = f"Which is right? Choose between {letters[0]} and {letters[1]}. {task.instruction}"
        yield TrainingTask(f"choose_{name}", "choice", about, rows)


def _numbered(corpus: Corpus, times: int) -> Iterator[tuple[str, InstructionTask]]:
    """Every instruction task several times; each time other wrong outputs are drawn for it."""
    for name, task in corpus.instruction_tasks.items():
        for number in range(times):
            yield f"{name}_{number}", task


def _another(rows: Sequence[Row], wanted: str, rng: Random) -> str:
    for _ in range(20):
        shown = rng.choice(rows)[1]
        if shown != wanted:
            return shown
    return "nothing"
