"""A catalog that moves: tasks are revised, retired and restored in turn, so that it never grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from tests.benchmarks.serving_homes import register_for_routing, write_examples
from trainer.commands import RegisterTask
from trainer.data import read_labelled
from trainer.lifecycle import restore, retire
from trainer.workshop import Workshop


class CatalogMoves:
    """Publishes one catalog revision after the other, of tasks that are registered already."""

    def __init__(
        self,
        workshop: Workshop,
        tasks: Sequence[RegisterTask],
        register: Callable[[Workshop, Sequence[RegisterTask]], None] = register_for_routing,
    ) -> None:
        """`tasks`, at least three, were registered by `register`, which revises them as well."""
        self.made: Counter[str] = Counter()
        self._workshop = workshop
        self._tasks = list(tasks)
        self._register = register
        self._retired = ""
        self._number = 0

    def next(self) -> None:
        """In turn: a task is revised, one is retired, another revised, the retired restored."""
        number, self._number = self._number, self._number + 1
        if number % 4 == 1:
            self._retired = self._tasks[number % len(self._tasks)].name
            retire(self._workshop, self._retired)
            self.made["retire"] += 1
        elif number % 4 == 3:
            restore(self._workshop, self._retired, force="it was here before")
            self._retired = ""
            self.made["restore"] += 1
        else:
            self._revise(number)
            self.made["revise"] += 1

    def _revise(self, number: int) -> None:
        """With other rows of the same task, so that decisions change."""
        live = [task for task in self._tasks if task.name != self._retired]
        task = live[number % len(live)]
        rows = read_labelled(task.data).examples
        kept = [row for place, row in enumerate(rows) if place % 4 != number % 4]
        data = write_examples(self._workshop.home / "revised.jsonl", kept)
        self._register(self._workshop, [replace(task, data=data, revise=True)])
