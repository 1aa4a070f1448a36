"""Closeness to stored rows: bounded, the same for the same tasks, and against plain formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router.examples import (
    LEAST_EXAMPLES_PER_TASK,
    MAX_EXAMPLES,
    MAX_EXAMPLES_PER_TASK,
    NEIGHBOURS,
    SHORTLIST,
    Closeness,
    sample_examples,
)
from router.index import CentroidIndex
from router.statistics import FOLDS, ChosenRows, TaskStatistics, to_fixed_point
from router.tasks import TaskKey
from router.whitening import whitening_of
from tests.catalogs import random_task

DIMENSION = 8
ORIGIN = np.zeros(DIMENSION, np.float32)
PLAIN = np.zeros((DIMENSION, 1), np.float32)
"""A whitening that changes nothing."""


def tasks_of(rng: np.random.Generator, count: int, rows: int = 6) -> list[TaskStatistics]:
    return [
        random_task(f"task-{n:03}", rng, rows=rows, dimension=DIMENSION, spread=1.0)
        for n in range(count)
    ]


@pytest.mark.parametrize("tasks", [1, 3, 70, 500])
def test_examples_are_the_first_rows_of_each_task_and_bounded_in_all(tasks: int) -> None:
    made = tasks_of(np.random.default_rng(0), tasks, rows=300)
    examples = sample_examples(made, ORIGIN, PLAIN)
    assert examples is not None
    assert len(examples.vectors) <= MAX_EXAMPLES
    counts = np.diff(examples.starts)
    assert (counts == min(MAX_EXAMPLES_PER_TASK, MAX_EXAMPLES // tasks)).all()
    for number, task in enumerate(made):
        mine = examples.vectors[examples.starts[number] : examples.starts[number + 1]]
        np.testing.assert_allclose(mine / 2.0**15, task.vectors[: len(mine)], atol=1e-4)


def test_too_many_tasks_have_no_examples_and_neither_has_none() -> None:
    assert sample_examples([], ORIGIN, PLAIN) is None
    task = random_task("a", np.random.default_rng(0), rows=2, dimension=DIMENSION)
    most = MAX_EXAMPLES // LEAST_EXAMPLES_PER_TASK
    assert sample_examples([task] * most, ORIGIN, PLAIN) is not None
    assert sample_examples([task] * (most + 1), ORIGIN, PLAIN) is None


def test_closeness_is_the_mean_cosine_to_the_five_nearest_less_two_fifths_of_their_own() -> None:
    rng = np.random.default_rng(1)
    tasks = [*tasks_of(rng, 4, rows=9), random_task("task-9", rng, rows=1, dimension=DIMENSION)]
    center = rng.normal(size=DIMENSION).astype(np.float32) / 3
    whitening = whitening_of(np.cov(rng.normal(size=(30, DIMENSION)).T * np.arange(8)[:, None]))
    matrix = np.eye(DIMENSION) - whitening @ whitening.T
    examples = sample_examples(tasks, center, whitening)
    assert examples is not None
    closeness = Closeness(examples, weight=2.0)
    points = random_task("points", rng, rows=9, dimension=DIMENSION, spread=3.0).vectors
    wanted = rng.integers(0, 5, size=(9, 3))
    for row, point in enumerate(points):
        for column, number in enumerate(wanted[row]):
            rows, unit = unit_rows((tasks[number].vectors - center) @ matrix), point - center
            [unit] = unit_rows((unit @ matrix)[None])
            among = np.sort(rows @ rows.T - 9 * np.eye(len(rows)))[:, 1:]
            crowd = among[:, -NEIGHBOURS:].mean(1) if len(rows) > 1 else np.array([0.5])
            expected = 2 * np.sort(rows @ unit - 0.4 * crowd)[-NEIGHBOURS:].mean()
            found = closeness.of(points - center, wanted)[row, column]
            assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("fewest", [1, 4, 5, 12])
def test_a_lone_input_is_as_close_as_it_is_among_others(fewest: int) -> None:
    rng = np.random.default_rng(fewest)
    sizes = [fewest, 9, 20, 5]
    tasks = [
        random_task(f"t{n}", rng, rows=size, dimension=DIMENSION) for n, size in enumerate(sizes)
    ]
    examples = sample_examples(tasks, ORIGIN, PLAIN)
    assert examples is not None
    closeness = Closeness(examples, weight=2.0)
    points = random_task("points", rng, rows=7, dimension=DIMENSION, spread=3.0).vectors
    wanted = np.array([rng.permutation(4)[:3] for _ in points])
    alone = [closeness.of(points[i : i + 1], wanted[i : i + 1]) for i in range(len(points))]
    np.testing.assert_allclose(np.concatenate(alone), closeness.of(points, wanted), atol=1e-5)


def test_rows_that_were_made_on_the_way_are_those_of_the_stored_vectors() -> None:
    rng = np.random.default_rng(3)
    examples = sample_examples(tasks_of(rng, 7), rng.normal(size=8).astype(np.float32), PLAIN)
    assert examples is not None
    assert examples.made is not None
    np.testing.assert_array_equal(examples.rows(), replace(examples, made=None).rows())


def test_rows_of_the_fold_that_is_left_out_are_not_looked_at() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(FOLDS + 1, DIMENSION)).astype(np.float32)
    task = TaskStatistics(
        TaskKey("a", 1), to_fixed_point(unit_rows(vectors)), np.zeros(FOLDS + 1, np.int16)
    )
    examples = sample_examples([task], ORIGIN, PLAIN)
    assert examples is not None
    biased = examples.vectors / 2.0**15 @ task.vectors[0] + examples.biases
    others = np.delete(biased, [0, FOLDS])
    found = Closeness(examples, 1.0).of(task.vectors[:1], np.array([[0]]), without_fold=0)
    assert found[0, 0] == pytest.approx(np.sort(others)[-NEIGHBOURS:].mean(), abs=1e-3)


@pytest.mark.parametrize("rows", [1, 2, NEIGHBOURS, NEIGHBOURS + 1, 20])
def test_a_stored_row_is_close_to_the_other_rows_of_its_task_and_not_to_itself(rows: int) -> None:
    rng = np.random.default_rng(4)
    mine, other = (
        TaskStatistics(
            TaskKey(name, 1),
            to_fixed_point(unit_rows(rng.normal(size=(rows, DIMENSION)).astype(np.float32))),
            np.zeros(rows, np.int16),
        )
        for name in "ab"
    )
    examples = sample_examples([mine, other], ORIGIN, PLAIN)
    assert examples is not None
    last = rows - 1
    stored = ChosenRows(np.array([0]), np.array([last]))
    found = Closeness(examples, 1.0).of(mine.vectors[[last]], np.array([[0, 1]]), stored=stored)
    biased = examples.vectors / 2.0**15 @ mine.vectors[last] + examples.biases
    if rows > 1:
        expected = np.sort(np.delete(biased[:rows], last))[-NEIGHBOURS:].mean()
        assert found[0, 0] == pytest.approx(expected, abs=1e-3)
    else:
        assert found[0, 0] < -1
    of_other = np.sort(biased[rows:])[-NEIGHBOURS:].mean()
    assert found[0, 1] == pytest.approx(of_other, abs=1e-3)


def test_a_stored_row_that_is_no_example_leaves_none_out() -> None:
    rng = np.random.default_rng(5)
    task = random_task("a", rng, rows=MAX_EXAMPLES_PER_TASK + 1, dimension=DIMENSION, spread=3.0)
    examples = sample_examples([task], ORIGIN, PLAIN)
    assert examples is not None
    closeness = Closeness(examples, 1.0)
    stored = ChosenRows(np.array([0]), np.array([MAX_EXAMPLES_PER_TASK]))
    query, tasks = task.vectors[[MAX_EXAMPLES_PER_TASK]], np.array([[0]])
    np.testing.assert_array_equal(
        closeness.of(query, tasks, stored=stored), closeness.of(query, tasks)
    )


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_index_adds_closeness_for_the_best_tasks_and_the_others_stay_behind() -> None:
    rng = np.random.default_rng(2)
    tasks = tasks_of(rng, 20)
    examples = sample_examples(tasks, ORIGIN, PLAIN)
    assert examples is not None
    closeness = Closeness(examples, weight=5.0)
    means = np.stack([task.vectors.mean(0) for task in tasks])
    rows = np.concatenate([means, np.zeros((20, 1))], axis=1).astype(np.float32)
    index = CentroidIndex(rows, np.arange(20), closeness)
    points = random_task("points", rng, rows=50, dimension=DIMENSION, spread=3.0).vectors
    queries = np.concatenate([points, np.ones((50, 1), np.float32)], axis=1)
    without = queries @ rows.T
    expected = without.copy()
    closeness.add_to(expected, points)
    scores, found = index.search(queries, 20)
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1), rtol=1e-5, atol=1e-5)
    for row in range(50):
        shortlist = np.argsort(-without[row], kind="stable")[:SHORTLIST]
        assert set(found[row, :SHORTLIST]) == set(shortlist)
        all_of_them = closeness.of(points[row : row + 1], shortlist[None])[0]
        np.testing.assert_allclose(
            expected[row, shortlist], without[row, shortlist] + all_of_them, atol=1e-5
        )
    # However few are asked for, the best are the same.
    for k in (1, 2, 9):
        some_scores, some = index.search(queries, k)
        np.testing.assert_array_equal(some, found[:, :k])
        np.testing.assert_allclose(some_scores, scores[:, :k], atol=1e-5)


def test_identical_rows_of_a_task_are_fine() -> None:
    vectors = np.full((5, DIMENSION), 11585, np.int16)
    task = TaskStatistics(TaskKey("a", 1), vectors, np.zeros(5, np.int16))
    examples = sample_examples([task], ORIGIN, PLAIN)
    assert examples is not None
    np.testing.assert_allclose(examples.biases, -0.4, atol=1e-4)
