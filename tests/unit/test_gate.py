"""What a new task does to the others is measured before it is published, and limited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.compiling import REJECTED, compile_head
from router.head import Head, with_thresholds
from router.pooled_moments import PooledMoments
from router.tasks import Policy, TaskKey
from tests.catalogs import (
    publish,
    random_task,
    texts_of,
    wide_background,
    write_rows,
)
from trainer.commands import RegisterTask
from trainer.gate import GateReport, InterferenceError, Taken, check, measure
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

A, B, NEW = TaskKey("a", 1), TaskKey("b", 1), TaskKey("new", 1)
ROWS = {A: 4, B: 2, NEW: 4}


def decided(*tasks: TaskKey, held_out: list[int]) -> Head:
    """A head whose held-out decisions are these."""
    rng = np.random.default_rng(0)
    pool = PooledMoments(6)
    pool.update(
        random_task(key.name, rng, rows=ROWS[key], dimension=6, revision=key.revision)
        for key in tasks
    )
    head = compile_head(
        pool, policy=Policy(), encoder="e", dimension=6, background=wide_background(6)
    )
    return with_thresholds(head, head.thresholds, 0.0, np.array(held_out, np.int32), {})


def test_rows_that_leave_their_own_task_for_the_new_one_are_taken() -> None:
    before = decided(A, B, held_out=[0, 0, 0, REJECTED, 1, 0])
    after = decided(A, B, NEW, held_out=[0, 2, 2, 2, 1, 2, 2, 2, 0, REJECTED])
    report = measure(before, after, ROWS, [NEW])
    # The row that was rejected before, and the one that went to another task, were not its own.
    [taken] = report.taken
    assert (taken.task, taken.by, taken.taken, taken.rows, taken.share) == (A, NEW, 2, 4, 0.5)
    assert report.accuracy_before == pytest.approx(4 / 6)
    assert report.accuracy_after == pytest.approx(2 / 6)
    assert [(s.row, s.decided) for s in report.suspects] == [(2, A), (3, None)]
    assert report.near_duplicates == ((NEW, A), (NEW, B))


def test_without_the_old_head_every_row_counts_as_its_own_before() -> None:
    after = decided(A, B, NEW, held_out=[0, 0, 0, 2, 1, 1, 2, 2, 2, 2])
    report = measure(None, after, ROWS, [NEW])
    assert [t.taken for t in report.taken] == [1]
    assert report.accuracy_before == 1.0


def test_without_old_tasks_there_is_nothing_to_take() -> None:
    report = measure(None, decided(A, held_out=[0, 0, 0, 0]), ROWS, [A])
    assert (report.taken, report.near_duplicates, report.suspects) == ((), (), ())
    assert report.accuracy_before is None
    assert report.accuracy_after is None


@pytest.mark.parametrize(
    ("rows", "limit", "force", "refused"),
    [
        (2, 0.05, "", True),
        (2, 0.5, "", False),
        (1, 0.05, "", False),
        (2, 0.05, "they belong together", False),
    ],
)
def test_more_than_the_limit_is_refused_but_not_a_single_row_or_a_forced_task(
    rows: int, limit: float, force: str, refused: bool
) -> None:
    before = decided(A, B, held_out=[0, 0, 0, 0, 1, 1])
    after = decided(A, B, NEW, held_out=[2] * rows + [0] * (4 - rows) + [1, 1, 2, 2, 2, 2])
    report = measure(before, after, ROWS, [NEW])
    unforced = [] if force else [NEW]
    if not refused:
        check(report, unforced, limit)
        return
    with pytest.raises(InterferenceError) as error:
        check(report, unforced, limit)
    assert error.value.tasks == (NEW,)
    assert "takes 50.0% of a@1 (2 of 4 held-out rows)" in str(error.value)
    assert "right on old tasks 100.0% -> 66.7%" in str(error.value)
    assert "--force" in str(error.value)


def together(*pairs: tuple[str, str, int], new: str = "abcd", rows: int = 10) -> GateReport:
    """New tasks of ten rows: `(task, by, taken)`."""
    taken = [Taken(TaskKey(t, 1), TaskKey(by, 1), n, rows) for t, by, n in pairs]
    return GateReport(
        tuple(sorted(taken, key=lambda t: -t.share)),
        *((), (), None, None),
        tuple(TaskKey(name, 1) for name in new),
    )


@pytest.mark.parametrize(("taken", "refused"), [(5, False), (6, False), (7, True)])
def test_what_chance_explains_is_not_refused(taken: int, refused: bool) -> None:
    old, new = TaskKey("old", 1), TaskKey("new", 1)
    report = GateReport((Taken(old, new, taken, 80),), (), (), 1.0, 1.0, (new,))
    if refused:
        with pytest.raises(InterferenceError):
            check(report, [new], 0.05)
    else:
        check(report, [new], 0.05)


@pytest.mark.parametrize(
    ("pairs", "refused"),
    [
        # Of two that take of each other, the one that takes more.
        ([("a", "b", 3), ("b", "a", 4)], "a"),
        # A row is never too much.
        ([("a", "b", 1), ("b", "a", 1)], ""),
        # Without a, nothing is wrong with b.
        ([("b", "a", 5), ("c", "a", 4), ("a", "b", 3)], "a"),
        # Two that have nothing to do with each other.
        ([("a", "b", 3), ("c", "d", 3)], "bd"),
        # d takes of a, which is refused for what it takes of b: d gets another chance.
        ([("a", "d", 6), ("b", "a", 5)], "a"),
        # A circle ends with one that is refused.
        ([("b", "a", 6), ("c", "b", 5), ("a", "c", 4)], "b"),
        # An old task is there to stay, however little is taken of it.
        ([("old", "a", 2), ("a", "b", 9)], "a"),
    ],
)
def test_of_tasks_that_come_together_those_that_take_most_are_refused(
    pairs: list[tuple[str, str, int]], refused: str
) -> None:
    report = together(*pairs)
    if not refused:
        check(report, report.new, 0.05)
        return
    with pytest.raises(InterferenceError) as error:
        check(report, report.new, 0.05)
    assert "".join(key.name for key in error.value.tasks) == refused
    assert "held-out rows" in str(error.value)


def test_a_forced_task_of_several_passes_and_the_other_is_measured_against_it() -> None:
    report = together(("a", "b", 3), ("b", "a", 4))
    with pytest.raises(InterferenceError) as error:
        check(report, [TaskKey("b", 1)], 0.05)
    assert error.value.tasks == (TaskKey("b", 1),)
    check(report, [], 0.05)


def test_rows_of_new_tasks_that_go_to_each_other_are_measured() -> None:
    before = decided(A, held_out=[0, 0, 0, 0])
    after = decided(A, B, NEW, held_out=[0, 0, 0, 2, 2, 2, 1, 2, 2, 2])
    report = measure(before, after, ROWS, [B, NEW])
    assert [(t.task, t.by, t.taken) for t in report.taken] == [
        (B, NEW, 2),
        (A, NEW, 1),
        (NEW, B, 1),
    ]
    assert (B, NEW) in report.near_duplicates
    assert report.new == (B, NEW)


def test_of_two_tasks_of_one_kind_that_come_together_one_is_refused(
    workshop: Workshop, tmp_path: Path
) -> None:
    requests = [
        RegisterTask(
            name,
            write_rows(tmp_path / f"{name}.jsonl", texts_of(place, 20, start)),
            with_prompt=False,
        )
        for name, place, start in (
            ("rain", "weather", 0),
            ("sun", "weather", 50),
            ("golf", "sport", 0),
        )
    ]
    result = register(workshop, requests, None, TuningSettings())
    [refused] = result.failures
    assert refused in ("rain", "sun")
    assert isinstance(result.failures[refused], InterferenceError)
    assert result.published is not None
    assert {record.name for record in result.records} == {"rain", "sun", "golf"} - {refused}
    lenient = register(
        workshop,
        [replace(request, name=f"{request.name}-2") for request in requests[2:]],
        None,
        TuningSettings(),
        gate_limit=1.0,
    )
    assert lenient.published is not None


def thief(tmp_path: Path, **options: str) -> RegisterTask:
    rows = write_rows(tmp_path / "thief.jsonl", texts_of("weather", 20, start=500))
    return RegisterTask("thief", rows, with_prompt=False, **options)


def test_a_task_that_takes_another_ones_rows_is_refused_and_leaves_the_others(
    workshop: Workshop, tmp_path: Path
) -> None:
    publish(workshop, "weather", "sport")
    honest = RegisterTask(
        "money", write_rows(tmp_path / "money.jsonl", texts_of("money", 20)), with_prompt=False
    )
    result = register(workshop, [thief(tmp_path), honest], None, TuningSettings())
    assert [record.name for record in result.records] == ["money"]
    assert isinstance(result.failures["thief"], InterferenceError)
    assert "weather@1" in str(result.failures["thief"])
    assert result.published is not None
    assert [key.name for key in result.published.head.tasks] == ["money", "sport", "weather"]
    assert workshop.catalog.newest_record("thief") == 0


def test_a_refused_task_alone_publishes_nothing_and_can_be_forced(
    workshop: Workshop, tmp_path: Path
) -> None:
    publish(workshop, "weather", "sport")
    refused = register(workshop, [thief(tmp_path)], None, TuningSettings())
    assert (refused.published, refused.records) == (None, ())
    assert workshop.catalog.newest_revision() == 1
    forced = register(workshop, [thief(tmp_path, force="on trial")], None, TuningSettings())
    assert forced.published is not None
    assert forced.published.gate is not None
    assert forced.records[0].forced_reason == "on trial"
    recorded = workshop.catalog.revision(2).report["gate"]
    assert recorded == forced.published.gate.document()
    assert ("thief", "weather") in [
        (new.name, old.name) for new, old in forced.published.gate.near_duplicates
    ]


@pytest.mark.parametrize("name", ["a-copy", "z-copy"])
@pytest.mark.parametrize("start", [0, 500], ids=["the same rows", "other rows"])
def test_a_near_duplicate_is_named_whichever_name_sorts_first(
    workshop: Workshop, tmp_path: Path, name: str, start: int
) -> None:
    publish(workshop, "weather", "sport")
    rows = write_rows(tmp_path / "copy.jsonl", texts_of("weather", 20, start))
    request = RegisterTask(name, rows, with_prompt=False)
    result = register(workshop, [request], None, TuningSettings(), gate_limit=1.0)
    assert result.published is not None
    assert result.published.gate is not None
    weather = TaskKey("weather", 1)
    assert result.published.gate.near_duplicates == ((TaskKey(name, 1), weather),)


def test_a_higher_limit_lets_it_pass(workshop: Workshop, tmp_path: Path) -> None:
    publish(workshop, "weather", "sport")
    result = register(workshop, [thief(tmp_path)], None, TuningSettings(), gate_limit=1.0)
    assert result.published is not None


def test_new_rows_that_belong_to_another_task_are_named(workshop: Workshop, tmp_path: Path) -> None:
    publish(workshop, "weather", "sport")
    texts = [*texts_of("money", 20), "sport 900"]
    request = RegisterTask("money", write_rows(tmp_path / "money.jsonl", texts), with_prompt=False)
    result = register(workshop, [request], None, TuningSettings())
    assert ("sport 900", "sport") in [(s.input, s.decided) for s in result.suspects]
