"""The gate: what a new task does to the others, measured before it is published.

A task is new to a catalog revision also where it is restored, or rolled back to. Tasks that come
together have no head without each other to compare with: of one another they take what goes there.

It compares two heads on the rows that the tasks hold out in turn: the one that is live, and the one
that would be. Nothing is guessed from similarities: a row counts as taken where it went to its own
task before and would go to the new one, by heads that were fitted without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from router.compiling import REJECTED, UNSCORED, held_out_by_task
from router.errors import RefusedError
from router.head import Head, best_row_per_task
from router.interfaces import FloatArray
from router.statistics import FOLDS
from router.tasks import TaskKey

DEFAULT_GATE_LIMIT = 0.05
# One row of twenty is 5 %, and may be anything.
_LEAST_TAKEN_ROWS = 2
# Five rows of eighty are over 5 %, too, and come from a true 5 % every third time: what is refused
# would come from the limit at most this often.
_MOST_CHANCE = 0.15
_NEAR_DUPLICATE = 0.2
# Of a catalog that is calibrated on a sample.
_NEAR_TASKS = 32
_ROWS_OF_NEAR_TASK = 256


@dataclass(frozen=True, slots=True)
class Taken:
    """`taken` of the `rows` held-out rows of `task` went to it before, and would go to `by`.

    Of a `task` that is new itself, all rows that would go to `by`.
    """

    task: TaskKey
    by: TaskKey
    taken: int
    rows: int

    @property
    def share(self) -> float:
        """The share of the task's rows."""
        return self.taken / self.rows

    def is_over(self, limit: float) -> bool:
        """Whether more than `limit` is taken, by more than chance (a one-sided binomial test)."""
        chance = float(binom.sf(self.taken - 1, self.rows, limit))
        return self.share > limit and self.taken >= _LEAST_TAKEN_ROWS and chance <= _MOST_CHANCE


@dataclass(frozen=True, slots=True)
class Suspect:
    """A new row that its own task does not win. `decided` is who does; None: nobody, an outlier.

    `row` is the row's number in the task's stored order.
    """

    task: TaskKey
    row: int
    decided: TaskKey | None


@dataclass(frozen=True, slots=True)
class GateReport:
    """What new tasks would do.

    `taken` are most first. `near_duplicates` are pairs (new, old or new) that are mixed up: the
    shares of either's rows that go to the other add up to a fifth or more. The accuracies are over
    the held-out rows of all old tasks that stay, and count a rejected row as wrong; they are None
    where there is no old task.
    """

    taken: tuple[Taken, ...]
    near_duplicates: tuple[tuple[TaskKey, TaskKey], ...]
    suspects: tuple[Suspect, ...]
    accuracy_before: float | None
    accuracy_after: float | None
    new: tuple[TaskKey, ...] = ()

    def document(self) -> dict[str, object]:
        """What is recorded with the catalog revision."""
        return {
            "taken": [
                {"task": str(t.task), "by": str(t.by), "taken": t.taken, "rows": t.rows}
                for t in self.taken
            ],
            "near_duplicates": [[str(new), str(old)] for new, old in self.near_duplicates],
            "suspects": [
                {"task": str(s.task), "row": s.row, "decided": s.decided and str(s.decided)}
                for s in self.suspects
            ],
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
        }


class InterferenceError(RefusedError):
    """Tasks would take too much of others. `tasks` are those that must be forced."""

    def __init__(self, tasks: Sequence[TaskKey], report: GateReport, limit: float) -> None:
        super().__init__(
            f"effect of {', '.join(map(str, tasks))} on the other tasks",
            _in_words(tasks, report),
            f"merge or separate the tasks, or clean the rows; more than {limit:.1%} of a task needs"
            " --force REASON, or a higher --gate-limit",
        )
        self.tasks = tuple(tasks)
        self.report = report


def measure(
    before: Head | None,
    after: Head,
    rows: Mapping[TaskKey, int],
    new: Sequence[TaskKey],
    vectors: Callable[[TaskKey], FloatArray] | None = None,
) -> GateReport:
    """What `new` tasks do, from the live head and the one that would be.

    `rows` is the number of stored rows of each task of either head. Without `before` (it is
    damaged) every row counts as having gone to its own task.

    Where `after` is calibrated on a sample of the rows, this is too thin to tell of single tasks:
    then the first stored rows of the new tasks and of those nearest to them, from `vectors`, are
    decided among these tasks by the heads as they serve, whose means know the rows.
    """
    now = held_out_by_task(after, rows)
    then = held_out_by_task(before, rows) if before is not None else {}
    if vectors is not None and (after.held_out == UNSCORED).any():
        near = _nearest_tasks(after, new, vectors)
        now.update(_decided_among(after, near, vectors))
        if before is not None:
            known = set(before.tasks)
            then.update(_decided_among(before, [key for key in near if key in known], vectors))
    old = [key for key in now if key not in new and (before is None or key in then)]
    for key in old if before is not None else ():
        # Of a task that is near, there are as many rows in both; else a sample, or all.
        scored = min(len(then[key]), len(now[key]))
        unscored = (then[key][:scored] == UNSCORED) | (now[key][:scored] == UNSCORED)
        then[key], now[key] = then[key][:scored][~unscored], now[key][:scored][~unscored]
    place = {} if before is None else {key: n for n, key in enumerate(before.tasks)}
    own_before = {
        key: then[key] == place[key] if before is not None else np.ones(len(now[key]), bool)
        for key in old
    }
    for key in new:  # one that keeps no rows, or none that was scored
        now.setdefault(key, np.zeros(0, np.int32))
    number = {key: n for n, key in enumerate(after.tasks)}
    taken = [
        Taken(key, by, count, len(now[key]))
        for key in old
        for by in new
        if (count := int((own_before[key] & (now[key] == number[by])).sum()))
    ] + [
        Taken(key, by, count, len(now[key]))
        for key in new
        for by in new
        if key != by and (count := int((now[key] == number[by]).sum()))
    ]
    pairs = [*((by, key) for by in new for key in old), *itertools.combinations(new, 2)]
    total = sum(len(now[key]) for key in old)
    right_after = sum(int((now[key] == number[key]).sum()) for key in old)
    return GateReport(
        tuple(sorted(taken, key=lambda t: (-t.share, t.task, t.by))),
        tuple(
            (by, key)
            for by, key in pairs
            if _share(now[key], number[by]) + _share(now[by], number[key]) >= _NEAR_DUPLICATE
        ),
        tuple(
            Suspect(key, int(row), None if (to := now[key][row]) == REJECTED else after.tasks[to])
            for key in new
            for row in np.flatnonzero((now[key] != number[key]) & (now[key] != UNSCORED))
        ),
        sum(int(own.sum()) for own in own_before.values()) / total if total else None,
        right_after / total if total else None,
        tuple(new),
    )


def _nearest_tasks(
    head: Head, new: Sequence[TaskKey], vectors: Callable[[TaskKey], FloatArray]
) -> list[TaskKey]:
    """The new tasks that keep rows, and those that the means of these score best."""
    kept = [rows for key in new if len(rows := vectors(key))]
    if not kept:
        return []
    scores = head.scores(np.stack([rows.mean(0) for rows in kept]))
    best = np.argsort(-scores, axis=1, kind="stable")[:, :_NEAR_TASKS]
    return sorted({*new, *(head.tasks[number] for number in best.ravel())})


def _decided_among(
    head: Head, keys: Sequence[TaskKey], vectors: Callable[[TaskKey], FloatArray]
) -> dict[TaskKey, NDArray[np.int32]]:
    """The decision of `head` on the first rows of these tasks, as if there were no others."""
    if not keys:
        return {}
    place = {key: n for n, key in enumerate(head.tasks)}
    among = np.array(sorted(place[key] for key in keys))
    mine = np.isin(head.row_task, among)
    rows_of_near, task_of_row = head.rows[mine], head.row_task[mine]
    thresholds = np.array(head.thresholds)
    closeness = head.closeness()
    decided = {}
    for key in keys:
        rows = vectors(key)[:_ROWS_OF_NEAR_TASK]
        queries, offsets = head.queries(rows)
        scores = best_row_per_task(queries @ rows_of_near.T, task_of_row)
        scores = scores + offsets[:, None]
        # No row is close to itself: those of its fold are left out.
        for fold in range(FOLDS):
            if closeness is not None:
                part = scores[fold::FOLDS]
                tasks = np.broadcast_to(among, part.shape)
                part += closeness.of(queries[fold::FOLDS, :-1], tasks, without_fold=fold)
        winner = among[scores.argmax(1)]
        accepted = scores.max(1) >= thresholds[winner]
        decided[key] = np.where(accepted, winner, REJECTED).astype(np.int32)
    return decided


def check(report: GateReport, unforced: Collection[TaskKey], limit: float) -> None:
    """Let new tasks pass, or refuse those that take more than `limit` of any other task.

    Those that are not among `unforced` pass. A single row is never too much, nor is what chance
    explains. Of tasks that come together those that take most are refused first, and what is
    refused takes and loses nothing.

    Raises:
        InterferenceError: some take too much, and are not forced.
    """
    too_much = [t for t in report.taken if t.by in unforced and t.is_over(limit)]
    guilty: set[TaskKey] = set()
    # What is taken of old tasks comes first: those are there to stay.
    for taken in sorted(too_much, key=lambda t: t.task in report.new):
        if taken.task not in guilty:
            guilty.add(taken.by)
    # Who takes only of what is refused now is measured again without it.
    guilty = {taken.by for taken in too_much if taken.by in guilty and taken.task not in guilty}
    if guilty:
        raise InterferenceError(sorted(guilty), report, limit)


def _share(decided: NDArray[np.int32], number: int) -> float:
    return float((decided == number).mean()) if len(decided) else 0.0


def _in_words(tasks: Sequence[TaskKey], report: GateReport) -> str:
    """`takes 12.5% of billing@1 (10 of 80 held-out rows); right on old tasks 97.2% -> 96.9%`."""
    worst = next(t for t in report.taken if t.by in tasks)
    taken = f"takes {worst.share:.1%} of {worst.task} ({worst.taken} of {worst.rows} held-out rows)"
    if report.accuracy_before is None or report.accuracy_after is None:
        return taken
    return (
        f"{taken}; right on old tasks {report.accuracy_before:.1%} -> {report.accuracy_after:.1%}"
    )
