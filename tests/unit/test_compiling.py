"""A head is a function of the set of tasks, and its thresholds keep what they promise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from router.compiling import (
    HEAD_KINDS,
    REJECTED,
    changed_decisions,
    compile_head,
)
from router.cross_fitting import cross_fitting
from router.decision import Outcome
from router.fitting import lda_fitter
from router.head import Head
from router.interfaces import Embeddings
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.statistics import FOLDS, TaskStatistics
from router.tasks import Policy, TaskKey
from tests.catalogs import random_task, wide_background

DIMENSION = 12
ENCODER = "numbers:1"


def pooled(tasks: Iterable[TaskStatistics]) -> PooledMoments:
    pool = PooledMoments(DIMENSION)
    pool.update(tasks)
    return pool


def compiled(
    tasks: Iterable[TaskStatistics] | PooledMoments,
    policy: Policy | None = None,
) -> Head:
    return compile_head(
        tasks if isinstance(tasks, PooledMoments) else pooled(tasks),
        policy=policy or Policy(),
        encoder=ENCODER,
        dimension=DIMENSION,
        background=wide_background(DIMENSION),
    )


@st.composite
def task_sets(draw: st.DrawFn) -> list[TaskStatistics]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [
        random_task(
            f"task-{number}",
            rng,
            rows=draw(st.integers(1, 25)),
            dimension=DIMENSION,
            clusters=draw(st.integers(1, 3)),
        )
        for number in range(draw(st.integers(1, 6)))
    ]


Kinds = st.sampled_from(HEAD_KINDS)


# The same set of tasks: the same bytes


@settings(max_examples=25)
@given(tasks=task_sets(), kind=Kinds, data=st.data())
def test_any_order_of_arrival_gives_the_same_bytes(
    tasks: list[TaskStatistics], kind: str, data: st.DataObject
) -> None:
    policy = Policy(head=kind)
    expected = compiled(tasks, policy).to_bytes()
    pool = PooledMoments(DIMENSION)
    present: list[TaskStatistics] = []
    for task in data.draw(st.permutations(tasks)):
        present.append(task)
        pool.update(data.draw(st.permutations(present)))
    assert compiled(pool, policy).to_bytes() == expected


@settings(max_examples=25)
@given(tasks=task_sets(), kind=Kinds, seed=st.integers(0, 2**32 - 1))
def test_a_retired_task_leaves_the_bytes_of_a_head_that_never_knew_it(
    tasks: list[TaskStatistics], kind: str, seed: int
) -> None:
    policy = Policy(head=kind)
    passing = random_task("passing", np.random.default_rng(seed), rows=30, dimension=DIMENSION)
    pool = pooled(tasks)
    before = compiled(pool, policy).to_bytes()
    pool.update([*tasks, passing])
    assert compiled(pool, policy).to_bytes() != before
    pool.update(tasks)
    assert compiled(pool, policy).to_bytes() == before == compiled(tasks, policy).to_bytes()


@settings(max_examples=15)
@given(tasks=task_sets(), seed=st.integers(0, 2**32 - 1))
def test_rolling_a_task_back_gives_the_bytes_of_before_its_revision(
    tasks: list[TaskStatistics], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    revised = random_task(tasks[0].key.name, rng, dimension=DIMENSION, revision=2)
    pool = pooled(tasks)
    before = compiled(pool).to_bytes()
    pool.update([revised, *tasks[1:]])
    compiled(pool)
    pool.update(tasks)
    assert compiled(pool).to_bytes() == before


@settings(max_examples=25)
@given(tasks=task_sets(), seed=st.integers(0, 2**32 - 1))
def test_nearest_mean_rows_of_old_tasks_are_the_same_bytes_after_a_new_one(
    tasks: list[TaskStatistics], seed: int
) -> None:
    policy = Policy(head="nearest-mean")
    before = compiled(tasks, policy)
    new = random_task("task-2-new", np.random.default_rng(seed), dimension=DIMENSION)
    after = compiled([*tasks, new], policy)
    rows = {key: row.tobytes() for key, row in zip(after.tasks, after.rows, strict=True)}
    for key, row in zip(before.tasks, before.rows, strict=True):
        assert rows[key] == row.tobytes()


def test_the_bytes_are_the_same_at_the_real_size() -> None:
    rng = np.random.default_rng(5)
    tasks = [random_task(name, rng, rows=30, dimension=768, clusters=2) for name in "abcd"]
    found = []
    for order in (tasks, tasks[::-1]):
        pool = PooledMoments(768)
        for number in range(len(order)):
            pool.update(order[: number + 1])
        head = compile_head(
            pool, policy=Policy(), encoder=ENCODER, dimension=768, background=wide_background(768)
        )
        found.append(head.to_bytes())
    assert found[0] == found[1]


def test_the_bytes_are_the_same_with_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(6)
    tasks = [random_task(name, rng, rows=40, dimension=64, clusters=2) for name in "abcd"]
    found = set()
    for threads in (1, 2, 7):
        monkeypatch.setattr("os.cpu_count", lambda threads=threads: threads)
        with threadpool_limits(threads, user_api="blas"):
            pool = PooledMoments(64)
            pool.update(tasks)
            head = compile_head(
                pool, policy=Policy(), encoder=ENCODER, dimension=64, background=wide_background(64)
            )
        found.add(head.to_bytes())
    assert len(found) == 1


def test_tasks_that_stay_keep_their_files_but_not_their_lda_rows() -> None:
    """What the issue says plainly: a learned head derives every row again."""
    rng = np.random.default_rng(0)
    tasks = [random_task(name, rng, dimension=DIMENSION) for name in "abc"]
    before, after = compiled(tasks[:2]), compiled(tasks)
    assert before.rows.tobytes() != after.rows[after.row_task < 2].tobytes()


# Small and strange sets


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 20])
def test_one_task_alone_is_compiled_and_takes_its_own_rows(kind: str, rows: int) -> None:
    task = random_task("only", np.random.default_rng(0), rows=rows, dimension=DIMENSION)
    head = compiled([task], Policy(head=kind))
    assert head.tasks == (task.key,)
    assert Head.from_bytes(head.to_bytes()).to_bytes() == head.to_bytes()
    decisions = decide(head, task.vectors)
    assert all(decision in (task.key, None) for decision in decisions)
    assert task.key in decisions


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("tasks", [2, 40])
def test_two_rows_a_task_are_enough_and_more_tasks_than_dimensions_are_fine(
    kind: str, tasks: int
) -> None:
    rng = np.random.default_rng(1)
    made = [
        random_task(f"task-{number:02}", rng, rows=2, dimension=DIMENSION, spread=0.2)
        for number in range(tasks)
    ]
    head = compiled(made, Policy(head=kind))
    assert head.held_out.shape == (2 * tasks,)
    assert np.isfinite(head.thresholds).all()
    found = head.scores(np.concatenate([task.vectors for task in made])).argmax(1)
    assert (found == np.repeat(np.arange(tasks), 2)).mean() > 0.9


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_identical_rows_and_identical_tasks_are_compiled(kind: str) -> None:
    rng = np.random.default_rng(2)
    one = random_task("a", rng, rows=10, dimension=DIMENSION, spread=0.0)
    same = TaskStatistics(TaskKey("b", 1), one.embeddings, one.clusters)
    other = random_task("c", rng, rows=10, dimension=DIMENSION)
    for tasks in ([one], [one, same], [one, same, other]):
        head = compiled(tasks, Policy(head=kind))
        assert np.isfinite(head.rows).all()
        scores = head.scores(one.vectors)
        if len(tasks) > 1:
            np.testing.assert_allclose(scores[:, 0], scores[:, 1], rtol=1e-4)
        # Of equals the first by name is best, however many candidates one asks for.
        for top_k in range(4):
            assert {d.task for d in decisions_of(head, one.vectors, top_k)} <= {one.key, None}


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_a_task_of_one_row_beside_others_is_compiled(kind: str) -> None:
    rng = np.random.default_rng(3)
    tasks = [
        random_task("lonely", rng, rows=1, dimension=DIMENSION),
        *(random_task(name, rng, rows=30, dimension=DIMENSION) for name in "abc"),
    ]
    head = compiled(tasks, Policy(head=kind))
    lonely = head.tasks.index(TaskKey("lonely", 1))
    assert np.isfinite(head.thresholds).all()
    assert head.scores(tasks[0].vectors).argmax() == lonely


def weighed(
    tasks: Sequence[TaskStatistics], found: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> Head:
    """The head, if held-out rows weighed discriminant, regression and closeness like that."""
    monkeypatch.setattr("router.compiling.weigh", lambda *_: found)
    return compiled(tasks)


def test_the_regression_is_in_the_rows_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    tasks = [
        random_task(f"task-{n}", rng, rows=40, dimension=DIMENSION, clusters=2) for n in range(4)
    ]
    without, with_it = (weighed(tasks, (1.0, w, 3.0), monkeypatch) for w in (0.0, 2.0))
    pool = pooled(tasks)
    fitter = lda_fitter(wide_background(DIMENSION), with_cosine=False)
    with cross_fitting(pool) as fitting:
        whole, _ = fitting.with_regression(fitter(pool.total()), [])
    regression = whole.terms[2].rows
    added = with_it.rows - without.rows
    scale = np.vdot(added, regression) / np.vdot(regression, regression)
    assert scale > 0
    np.testing.assert_allclose(added, scale * regression, atol=1e-3 * np.abs(added).max())


def test_what_the_regression_takes_from_the_discriminant_it_does_not_take_from_rejection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(12)
    tasks = [random_task(f"task-{n}", rng, rows=40, dimension=DIMENSION) for n in range(4)]
    little, usual, much = (
        weighed(tasks, (first, 2.0, 3.0), monkeypatch).background for first in (0.0, 2.0, 4.0)
    )
    assert little is not None
    assert usual is not None
    assert much is not None
    np.testing.assert_array_equal(little, usual)
    np.testing.assert_allclose(much, 2 * usual, rtol=1e-5)


def test_without_tasks_the_head_is_empty_and_everything_is_unknown() -> None:
    head = compiled([])
    assert (head.kind, head.tasks, head.rows.shape) == ("none", (), (0, DIMENSION + 1))
    assert decide(head, np.eye(DIMENSION, dtype=np.float32)) == [None] * DIMENSION
    assert Head.from_bytes(head.to_bytes()).to_bytes() == head.to_bytes()


# Calibration


def gaussian_tasks(
    rng: np.random.Generator, count: int, rows: int
) -> tuple[list[TaskStatistics], list[np.ndarray]]:
    """Tasks, and 2,000 fresh rows of each from the same distribution."""
    tasks, fresh = [], []
    for number in range(count):
        whole = random_task(
            f"task-{number}", rng, rows=rows + 2000, dimension=DIMENSION, spread=0.5
        )
        chosen = whole.embeddings[:rows]
        tasks.append(TaskStatistics(whole.key, chosen, np.zeros(rows, np.int16)))
        fresh.append(whole.vectors[rows:])
    return tasks, fresh


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("rate", [0.02, 0.05, 0.2])
def test_fresh_rows_are_rejected_about_as_often_as_was_asked_for(kind: str, rate: float) -> None:
    tasks, fresh = gaussian_tasks(np.random.default_rng(7), 8, 300)
    head = compiled(tasks, Policy(head=kind, false_reject_rate=rate))
    shares = [
        np.mean([decision is None for decision in decide(head, vectors)]) for vectors in fresh
    ]
    assert 0.6 * rate <= np.mean(shares) <= 1.4 * rate
    assert max(shares) <= 2.5 * rate
    assert 0.6 * rate <= head.summary["held_out_rejected"] <= 1.4 * rate


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_few_rows_a_task_reject_no_more_than_about_what_was_asked_for(kind: str) -> None:
    tasks, fresh = gaussian_tasks(np.random.default_rng(8), 20, 12)
    head = compiled(tasks, Policy(head=kind, false_reject_rate=0.05))
    rejected = np.mean([d is None for vectors in fresh for d in decide(head, vectors)])
    assert rejected <= 0.10


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_texts_far_from_every_task_are_unknown(kind: str) -> None:
    rng = np.random.default_rng(9)
    tasks, _ = gaussian_tasks(rng, 4, 100)
    head = compiled(tasks, Policy(head=kind))
    means = np.array([task.vectors.mean(0) for task in tasks])
    outside = rng.normal(size=(2000, DIMENSION))
    outside -= outside @ np.linalg.pinv(means) @ means
    outside /= np.linalg.norm(outside, axis=1, keepdims=True)
    unknown = np.mean([decision is None for decision in decide(head, outside.astype(np.float32))])
    assert unknown > 0.95


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05, 0.3])
def test_at_most_the_share_asked_for_is_ambiguous_and_not_far_less(rate: float) -> None:
    tasks, _ = gaussian_tasks(np.random.default_rng(10), 6, 200)
    head = compiled(tasks, Policy(false_reject_rate=0.05 + rate, ambiguous_rate=rate))
    assert rate / 2 <= head.summary["held_out_ambiguous"] <= rate
    assert (head.ambiguity_margin == 0.0) == (rate == 0.0)


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize(("rate", "ambiguous_rate"), [(0.05, 0.01), (0.1, 0.1), (0.1, 0.4)])
def test_unknown_and_ambiguous_share_one_budget(
    kind: str, rate: float, ambiguous_rate: float
) -> None:
    tasks, _ = gaussian_tasks(np.random.default_rng(11), 6, 200)
    policy = Policy(head=kind, false_reject_rate=rate, ambiguous_rate=ambiguous_rate)
    summary = compiled(tasks, policy).summary
    lost = summary["held_out_rejected"] + summary["held_out_ambiguous"]
    assert 0.8 * rate <= lost <= rate + 0.01


@settings(max_examples=20)
@given(tasks=task_sets(), rate=st.sampled_from([0.0, 0.05, 0.1, 0.5]))
def test_nearest_mean_thresholds_are_the_conformal_ones_of_cross_fitted_scores(
    tasks: list[TaskStatistics], rate: float
) -> None:
    policy = Policy(head="nearest-mean", false_reject_rate=rate, ambiguous_rate=0.0)
    head = compiled(tasks, policy)
    if sum(len(task.embeddings) for task in tasks) == 1:
        return  # nothing to leave out
    cosines = [_cross_fitted_cosines(task, tasks) for task in tasks]
    own = [scores[np.isfinite(scores[:, number]), number] for number, scores in enumerate(cosines)]
    expected = np.array(_naive_thresholds(own, rate))
    scores = np.concatenate(
        [scores[np.isfinite(scores[:, number])] for number, scores in enumerate(cosines)]
    )
    over = np.sort(scores.max(1) - expected[scores.argmax(1)])
    rank = int(rate * (len(over) + 1))
    if rank:
        expected += over[rank - 1]
    np.testing.assert_allclose(head.thresholds, expected, atol=1e-5)


def _cross_fitted_cosines(task: TaskStatistics, tasks: Sequence[TaskStatistics]) -> np.ndarray:
    """The cosine of each row `[n, K]` to the mean of every task's rows of the other folds."""
    scores = np.full((len(task.embeddings), len(tasks)), -np.inf)
    for row, vector in enumerate(task.embeddings / 2.0**15):
        for number, other in enumerate(tasks):
            rest = other.embeddings[other.folds != row % FOLDS] / 2.0**15
            if len(rest):
                mean = rest.mean(0)
                scores[row, number] = vector @ mean / np.linalg.norm(mean)
    return scores


def _naive_thresholds(own: Sequence[np.ndarray], rate: float) -> list[float]:
    def conformal(scores: np.ndarray) -> float:
        return float(np.sort(scores)[max(int(rate * (len(scores) + 1)), 1) - 1])

    together = np.concatenate(list(own))
    if not len(together):
        return [-np.inf] * len(own)
    overall = conformal(together)
    thresholds = []
    for scores in own:
        enough = int(rate * (len(scores) + 1)) >= 1
        weight = len(scores) / (len(scores) + 200)
        mine = conformal(scores) if enough else overall
        thresholds.append(weight * mine + (1 - weight) * overall)
    return thresholds


# What a publish changes


@settings(max_examples=20)
@given(tasks=task_sets(), kind=Kinds)
def test_held_out_decisions_are_one_per_row_and_name_a_task_or_nobody(
    tasks: list[TaskStatistics], kind: str
) -> None:
    head = compiled(tasks, Policy(head=kind))
    assert head.held_out.shape == (sum(len(task.embeddings) for task in tasks),)
    assert ((head.held_out >= REJECTED) & (head.held_out < len(tasks))).all()
    assert head.summary["held_out_rows"] == len(head.held_out)
    assert head.summary["held_out_rejected"] == pytest.approx((head.held_out == REJECTED).mean())


def test_the_same_head_changes_no_decisions() -> None:
    rng = np.random.default_rng(0)
    tasks = [random_task(name, rng, dimension=DIMENSION) for name in "abc"]
    head = compiled(tasks)
    rows = {task.key: len(task.embeddings) for task in tasks}
    assert changed_decisions(head, head, rows) == {}


def test_changed_decisions_count_the_rows_of_old_tasks_that_go_elsewhere_now() -> None:
    rng = np.random.default_rng(0)
    old = [random_task(name, rng, rows=40, dimension=DIMENSION) for name in "abc"]
    thief = TaskStatistics(TaskKey("ab", 1), old[0].embeddings[::2], old[0].clusters[::2])
    before, after = compiled(old), compiled([*old, thief])
    rows = {task.key: len(task.embeddings) for task in (*old, thief)}
    changed = changed_decisions(before, after, rows)
    naive: dict[str, int] = {}
    for task in old:
        was, now = _decisions_on(before, task, rows), _decisions_on(after, task, rows)
        different = sum(a != b for a, b in zip(was, now, strict=True))
        if different:
            naive[str(task.key)] = different
    assert changed == naive
    assert changed["a@1"] > 5
    assert "ab@1" not in changed


def test_a_retired_task_is_not_counted_and_neither_is_a_new_one() -> None:
    rng = np.random.default_rng(0)
    tasks = [random_task(name, rng, dimension=DIMENSION) for name in "abc"]
    rows = {task.key: len(task.embeddings) for task in tasks}
    changed = changed_decisions(compiled(tasks[:2]), compiled(tasks[1:]), rows)
    assert set(changed) <= {"b@1"}


def _decisions_on(
    head: Head, task: TaskStatistics, rows: dict[TaskKey, int]
) -> list[TaskKey | None]:
    start = sum(rows[key] for key in head.tasks[: head.tasks.index(task.key)])
    numbers = head.held_out[start : start + rows[task.key]]
    return [None if number == REJECTED else head.tasks[number] for number in numbers]


def decisions_of(head: Head, vectors: np.ndarray, top_k: int = 0):
    embeddings = Embeddings(vectors.astype(np.float32), np.zeros(len(vectors), np.bool_))
    return Snapshot.build(1, head, {}).decide(embeddings, top_k)


def decide(head: Head, vectors: np.ndarray) -> list[TaskKey | None]:
    decisions = decisions_of(head, vectors)
    assert all((d.task is None) == (d.outcome is Outcome.UNKNOWN) for d in decisions)
    return [decision.task for decision in decisions]
