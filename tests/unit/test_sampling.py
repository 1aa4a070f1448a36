"""A large catalog is calibrated on a sample of its rows; here catalogs of any size are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import sample_scores, sampling
from router.compiling import HEAD_KINDS, REJECTED, UNSCORED, changed_decisions, compile_head
from router.cross_fitting import cross_fitting
from router.fitting import fit_nearest_mean
from router.head import Head
from router.pooled_moments import PooledMoments
from router.sample_scores import SampleScores
from router.sampling import sampled_rows
from router.statistics import FOLDS, ChosenRows, TaskStatistics
from router.tasks import Policy, TaskKey
from tests.catalogs import new_workshop, random_task, texts_of, wide_background, write_rows
from trainer import lifecycle
from trainer.admission import Registered
from trainer.commands import RegisterTask
from trainer.gate import InterferenceError
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

DIMENSION = 12
SAMPLED = 60


@pytest.fixture(autouse=True, scope="module")
def _every_catalog_is_large() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "MOST_PAIRS", 0)
        patch.setattr(sampling, "SAMPLED_PAIRS", 1)
        patch.setattr(sampling, "LEAST_SAMPLED_ROWS", SAMPLED)
        yield


def pooled(tasks: Iterable[TaskStatistics]) -> PooledMoments:
    pool = PooledMoments(DIMENSION)
    pool.update(tasks)
    return pool


def compiled(
    tasks: Iterable[TaskStatistics] | PooledMoments,
    kind: str = "auto",
    remembered: SampleScores | None = None,
) -> Head:
    pool = tasks if isinstance(tasks, PooledMoments) else PooledMoments(DIMENSION)
    if pool is not tasks:
        pool.update(tasks)  # type: ignore[arg-type]
    return compile_head(
        pool,
        policy=Policy(head=kind),
        encoder="numbers:1",
        dimension=DIMENSION,
        background=wide_background(DIMENSION),
        sample_scores=remembered,
    )


def some_tasks(
    count: int, seed: int = 0, rows: int = 40, clusters: int = 1
) -> list[TaskStatistics]:
    rng = np.random.default_rng(seed)
    return [
        random_task(f"task-{n}", rng, rows=rows, dimension=DIMENSION, spread=0.5, clusters=clusters)
        for n in range(count)
    ]


@st.composite
def task_sets(draw: st.DrawFn) -> list[TaskStatistics]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [
        random_task(
            f"task-{number}",
            rng,
            rows=draw(st.integers(1, 40)),
            dimension=DIMENSION,
            clusters=draw(st.integers(1, 3)),
        )
        for number in range(draw(st.integers(1, 6)))
    ]


# Which rows


def test_rows_are_of_fold_0_as_many_of_each_task_and_as_many_as_were_asked_for() -> None:
    chosen = sampled_rows(pooled(some_tasks(20, rows=100)), 20)
    assert chosen is not None
    assert len(chosen.row) == SAMPLED
    assert np.bincount(chosen.task, minlength=20).tolist() == [3] * 20
    assert (chosen.row % FOLDS == 0).all()


def test_where_there_are_more_tasks_than_rows_to_score_a_new_one_moves_one_other() -> None:
    tasks = some_tasks(SAMPLED + 30, rows=10)
    before, after = sampled_rows(pooled(tasks[:-1]), 1), sampled_rows(pooled(tasks), 1)
    assert before is not None
    assert after is not None
    assert len(before.task) == len(after.task) == SAMPLED
    assert len(set(before.task) - set(after.task)) <= 1


def test_all_rows_are_scored_of_a_catalog_that_is_not_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "MOST_PAIRS", 100)
    assert sampled_rows(pooled(some_tasks(2, rows=25)), 2) is None
    assert sampled_rows(pooled(some_tasks(2, rows=26)), 2) is not None


# A function of the set of tasks


@settings(max_examples=25)
@given(tasks=task_sets(), kind=st.sampled_from(HEAD_KINDS), data=st.data())
def test_any_order_of_arrival_gives_the_same_bytes(
    tasks: list[TaskStatistics], kind: str, data: st.DataObject
) -> None:
    expected = compiled(tasks, kind).to_bytes()
    pool = PooledMoments(DIMENSION)
    present: list[TaskStatistics] = []
    for task in data.draw(st.permutations(tasks)):
        present.append(task)
        pool.update(data.draw(st.permutations(present)))
    assert compiled(pool, kind).to_bytes() == expected


@settings(max_examples=25)
@given(tasks=task_sets(), kind=st.sampled_from(HEAD_KINDS), seed=st.integers(0, 2**32 - 1))
def test_a_retired_task_leaves_no_trace(tasks: list[TaskStatistics], kind: str, seed: int) -> None:
    before = compiled(tasks, kind).to_bytes()
    passing = random_task("passing", np.random.default_rng(seed), rows=30, dimension=DIMENSION)
    pool = PooledMoments(DIMENSION)
    for present in (tasks, [*tasks, passing], tasks):
        pool.update(present)
    assert compiled(pool, kind).to_bytes() == before


def test_remembered_scores_give_the_same_bytes_whatever_came_and_went(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample_scores, "_TASKS_PER_BLOCK", 4)
    tasks = some_tasks(SAMPLED + 40, rows=9, clusters=2)
    [revised] = some_tasks(1, seed=1)
    twin = replace(tasks[5], key=TaskKey("another", 1))
    remembered = SampleScores()
    for now in [
        tasks[:20],  # all of them in the sample
        tasks[:80],
        tasks,
        tasks[:-1],
        [revised, *tasks[1:]],  # of the same key: one that was not published in the end
        [*tasks, twin],
        tasks[:80],
    ]:
        found = compiled(now, "nearest-mean", remembered)
        assert found.to_bytes() == compiled(now, "nearest-mean").to_bytes()


def test_one_more_task_is_scored_with_its_block_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []

    def counting(sample: object, tasks: list[TaskStatistics], means: np.ndarray) -> object:
        scored.append(len(tasks))
        return score(sample, tasks, means)  # type: ignore[arg-type]

    score = sample_scores._score
    monkeypatch.setattr(sample_scores, "_score", counting)
    monkeypatch.setattr(sample_scores, "_TASKS_PER_BLOCK", 4)
    tasks, remembered = some_tasks(SAMPLED + 40, rows=9), SampleScores()
    chosen = [sampled_rows(pooled(tasks[:count]), count) for count in range(SAMPLED, len(tasks))]
    # A task that is not in the sample itself.
    more = next(n for n in range(20, 39) if same_sample(tasks, chosen[n], chosen[n + 1])) + SAMPLED
    compiled(tasks[:more], "nearest-mean", remembered)
    assert sum(scored) == more
    scored.clear()
    compiled(tasks[: more + 1], "nearest-mean", remembered)
    [block] = scored
    assert block < more / 4


def same_sample(
    tasks: list[TaskStatistics], some: ChosenRows | None, others: ChosenRows | None
) -> bool:
    assert some is not None
    assert others is not None
    return [tasks[n].key for n in some.task] == [tasks[n].key for n in others.task]


def test_nearest_mean_rows_are_those_of_a_catalog_whose_rows_are_all_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = some_tasks(5, clusters=2)
    sampled = compiled(tasks, "nearest-mean")
    monkeypatch.setattr(sampling, "MOST_PAIRS", 1 << 26)
    assert compiled(tasks, "nearest-mean").rows.tobytes() == sampled.rows.tobytes()


# What it is worth


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_it_scores_like_one_that_was_calibrated_on_all_rows(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = some_tasks(8, rows=600, clusters=2)
    known = [
        replace(task, embeddings=task.embeddings[:300], clusters=task.clusters[:300])
        for task in drawn
    ]
    sampled = compiled(known, kind)
    assert sampled.summary["held_out_rows"] == SAMPLED
    assert (sampled.held_out != UNSCORED).sum() == SAMPLED
    monkeypatch.setattr(sampling, "MOST_PAIRS", 1 << 26)
    full = compiled(known, kind)
    fresh = np.concatenate([task.vectors[300:] for task in drawn])
    best = sampled.best_tasks(fresh), full.best_tasks(fresh)
    assert (best[0] == best[1]).mean() > 0.97
    rejected = sampled.scores(fresh).max(1) < np.array(sampled.thresholds)[best[0]]
    assert rejected.mean() < 0.15


@pytest.mark.parametrize("rows", [(1, 5), (2, 3), (25, 12, 31)])
def test_a_chosen_row_is_scored_by_means_without_the_chosen_rows(rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    tasks = [
        random_task(f"task-{n}", rng, rows=count, dimension=DIMENSION)
        for n, count in enumerate(rows)
    ]
    chosen = sampled_rows(pooled(tasks), len(tasks))
    assert chosen is not None
    pool = PooledMoments(DIMENSION)
    pool.update(tasks)
    with cross_fitting(pool) as fitting:
        _, folds = fitting.fit_sample(lambda _: fit_nearest_mean, chosen)
        found = fitting.score(folds, (1.0,))
    rows_of = [chosen.row[chosen.task == number] for number in range(len(tasks))]
    means = [
        np.delete(task.vectors, mine, 0).sum(0) for task, mine in zip(tasks, rows_of, strict=True)
    ]
    place = 0
    for number, (task, mine) in enumerate(zip(tasks, rows_of, strict=True)):
        for row in mine:
            cosines = [
                task.vectors[row] @ mean / np.linalg.norm(mean) if mean.any() else -np.inf
                for mean in means
            ]
            assert found.task[place] == number
            assert found.own[place] == pytest.approx(cosines[number], abs=1e-3)
            assert found.best[place] == pytest.approx(max(cosines), abs=1e-3)
            place += 1
    assert place == len(found.own)


def test_changed_decisions_are_counted_among_rows_that_both_heads_scored() -> None:
    tasks = some_tasks(3)
    rows = {task.key: len(task.embeddings) for task in tasks}
    before, after = compiled(tasks[:2]), compiled(tasks)
    assert changed_decisions(before, before, rows) == {}
    changed = changed_decisions(before, after, rows)
    assert all(count <= 4 for count in changed.values())
    assert REJECTED != UNSCORED


# In a catalog


def register_places(workshop: Workshop, folder: Path, **places: list[str]) -> Registered:
    requests = [
        RegisterTask(name, write_rows(folder / f"{name}.jsonl", texts), with_prompt=False)
        for name, texts in places.items()
    ]
    return register(workshop, requests, None, TuningSettings())


def test_the_gate_names_whom_a_new_task_takes_rows_from(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        places = {f"place{n}": texts_of(f"place{n}", 30) for n in range(12)}
        assert not register_places(workshop, tmp_path, **places).failures
        copy = register_places(workshop, tmp_path, copy=texts_of("place3", 60, start=30))
        [error] = copy.failures.values()
        assert "place3@1" in str(error)
        fine = register_places(workshop, tmp_path, elsewhere=texts_of("elsewhere", 30))
        assert not fine.failures
        assert fine.published is not None
        gate = fine.published.gate
        assert gate is not None
        assert gate.taken == ()
        assert gate.accuracy_after > 0.9


@pytest.mark.parametrize("name", ["a-copy", "z-copy"])
def test_the_gate_knows_a_task_of_which_no_row_is_in_the_sample(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "LEAST_SAMPLED_ROWS", 2)
    with new_workshop(tmp_path / "home") as workshop:
        places = {f"place{n}": texts_of(f"place{n}", 30) for n in range(8)}
        assert not register_places(workshop, tmp_path, **places).failures
        for number in range(8):
            copy = {name: texts_of(f"place{number}", 60, start=30)}
            [error] = register_places(workshop, tmp_path, **copy).failures.values()
            assert isinstance(error, InterferenceError)
            assert error.report.near_duplicates == (
                (TaskKey(name, 1), TaskKey(f"place{number}", 1)),
            )


def test_the_head_after_retiring_is_that_of_before(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        register_places(workshop, tmp_path, one=texts_of("one", 30), two=texts_of("two", 30))
        before = workshop.newest_head().to_bytes()
        register_places(workshop, tmp_path, three=texts_of("three", 30))
        lifecycle.retire(workshop, "three")
        assert workshop.newest_head().to_bytes() == before
