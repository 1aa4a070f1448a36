"""The gate: what a new task does to the others, measured before it is published.

A task is new to a catalog revision also where it is restored, or rolled back to. Tasks that come
together have no head without each other to compare with: of one another they take what goes there.

It compares two heads on the rows that the tasks hold out in turn: the one that is live, and the one
that would be. Nothing is guessed from similarities: a row counts as taken where it went to its own
task before and would go to the new one, by heads that were fitted without it.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

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
        chance = float(bdtrc(self.taken - 1, self.rows, limit))
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
        first = {key: vectors(key)[:_ROWS_OF_NEAR_TASK] for key in near}
        now.update(_decided_among(after, first))
        if before is not None:
            known = {key: rows for key, rows in first.items() if key in before.number_of}
            then.update(_decided_among(before, known))
    for key in new:  # one that keeps no rows, or none that was scored
        now.setdefault(key, np.zeros(0, np.int32))
    number_of = after.number_of
    old = [key for key in now if key not in new and (before is None or key in then)]
    rows_of = _rows_of_old(old, now, then if before is not None else None)
    own = np.array([number_of[key] for key in old], np.int64)[rows_of.task]
    right_before = np.ones(len(own), np.bool_)
    if before is not None:
        places = np.array([before.number_of[key] for key in old], np.int64)
        right_before = rows_of.then == places[rows_of.task]
    counts = np.bincount(rows_of.task, minlength=len(old)).tolist()
    went_to = {key: collections.Counter(now[key].tolist()) for key in new}
    taken, near_duplicates = [], []
    for by in new:
        gone = rows_of.now == number_of[by]
        to_new = np.bincount(rows_of.task[gone], minlength=len(old)).tolist()
        of_right = np.bincount(rows_of.task[gone & right_before], minlength=len(old)).tolist()
        went = went_to[by]
        for key, rows_of_key, to_by, lost in zip(old, counts, to_new, of_right, strict=True):
            if lost:
                taken.append(Taken(key, by, lost, rows_of_key))
            back = _share(went[number_of[key]], len(now[by]))
            if _share(to_by, rows_of_key) + back >= _NEAR_DUPLICATE:
                near_duplicates.append((by, key))
    for key, by in itertools.permutations(new, 2):
        if count := went_to[key][number_of[by]]:
            taken.append(Taken(key, by, count, len(now[key])))
    for by, key in itertools.combinations(new, 2):
        there = _share(went_to[key][number_of[by]], len(now[key]))
        back = _share(went_to[by][number_of[key]], len(now[by]))
        if there + back >= _NEAR_DUPLICATE:
            near_duplicates.append((by, key))
    total = len(own)
    return GateReport(
        tuple(sorted(taken, key=lambda t: (-t.share, t.task, t.by))),
        tuple(near_duplicates),
        tuple(
            Suspect(key, int(row), None if (to := now[key][row]) == REJECTED else after.tasks[to])
            for key in new
            for row in np.flatnonzero((now[key] != number_of[key]) & (now[key] != UNSCORED))
        ),
        int(right_before.sum()) / total if total else None,
        int((rows_of.now == own).sum()) / total if total else None,
        tuple(new),
    )


@dataclass(frozen=True, slots=True)
class _OldRows:
    """Rows of old tasks: the place of each one's task, and what it was decided for, [N] each."""

    task: NDArray[np.int64]
    now: NDArray[np.int32]
    then: NDArray[np.int32]


def _rows_of_old(
    old: Sequence[TaskKey],
    now: Mapping[TaskKey, NDArray[np.int32]],
    then: Mapping[TaskKey, NDArray[np.int32]] | None,
) -> _OldRows:
    """The rows that were scored `now` and, where there is such a thing, `then`."""
    before = now if then is None else then
    # Of a task that is near, there are as many rows in both; else a sample, or all.
    sizes = [min(len(before[key]), len(now[key])) for key in old]
    none = np.zeros(0, np.int32)
    rows = _OldRows(
        np.repeat(np.arange(len(old)), sizes),
        np.concatenate([none, *(now[key][:n] for key, n in zip(old, sizes, strict=True))]),
        np.concatenate([none, *(before[key][:n] for key, n in zip(old, sizes, strict=True))]),
    )
    if then is None:
        return rows
    scored = (rows.now != UNSCORED) & (rows.then != UNSCORED)
    return _OldRows(rows.task[scored], rows.now[scored], rows.then[scored])


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
    head: Head, rows: Mapping[TaskKey, FloatArray]
) -> dict[TaskKey, NDArray[np.int32]]:
    """The decision of `head` on `rows` of these tasks, as if there were no others."""
    if not rows:
        return {}
    among = np.array(sorted(head.number_of[key] for key in rows))
    mine = np.isin(head.row_task, among)
    queries, offsets = head.queries(np.concatenate([*rows.values()]))
    scores = best_row_per_task(queries @ head.rows[mine].T, head.row_task[mine])
    scores = scores + offsets[:, None]
    closeness = head.closeness()
    if closeness is not None:
        # No row is close to itself: those of its fold are left out.
        fold_of = np.concatenate([np.arange(len(each)) % FOLDS for each in rows.values()])
        for fold in range(FOLDS):
            part = fold_of == fold
            tasks = np.broadcast_to(among, (int(part.sum()), len(among)))
            scores[part] += closeness.of(queries[part, :-1], tasks, without_fold=fold)
    winner = among[scores.argmax(1)]
    accepted = scores.max(1) >= np.array(head.thresholds)[winner]
    decided = np.where(accepted, winner, REJECTED).astype(np.int32)
    ends = np.cumsum([len(each) for each in rows.values()])
    return dict(zip(rows, np.split(decided, ends[:-1]), strict=True))


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


def _share(some: int, of: int) -> float:
    return some / of if of else 0.0


def _in_words(tasks: Sequence[TaskKey], report: GateReport) -> str:
    """`takes 12.5% of billing@1 (10 of 80 held-out rows); right on old tasks 97.2% -> 96.9%`."""
    worst = next(t for t in report.taken if t.by in tasks)
    taken = f"takes {worst.share:.1%} of {worst.task} ({worst.taken} of {worst.rows} held-out rows)"
    if report.accuracy_before is None or report.accuracy_after is None:
        return taken
    return (
        f"{taken}; right on old tasks {report.accuracy_before:.1%} -> {report.accuracy_after:.1%}"
    )
