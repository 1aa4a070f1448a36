"""Tasks that keep sums over their embeddings, and no embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import sampling
from router.catalog import CatalogReader
from router.compiling import HEAD_KINDS, compile_head
from router.decision import Outcome
from router.errors import CorruptArtifactError, InvalidInputError
from router.fitting import fit_nearest_mean, lda_fitter
from router.head import Head
from router.interfaces import Embeddings
from router.loading import SnapshotLoader, read_statistics
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.statistics import TaskStatistics, sums_of, to_fixed_point
from router.tasks import Policy, TaskKey, TaskRecord
from tests.catalogs import (
    PlaceEncoder,
    artifact_file,
    flip_byte,
    new_workshop,
    random_task,
    served_models,
    texts_of,
    wide_background,
    write_rows,
)
from trainer import lifecycle
from trainer.commands import RegisterTask
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

DIMENSION = 12


def sums_only(task: TaskStatistics) -> TaskStatistics:
    """The same task, as if it kept statistics only."""
    return TaskStatistics(
        task.key, task.embeddings[:0], task.clusters[:0], sums_of(task.embeddings)
    )


def compiled(tasks: Sequence[TaskStatistics], kind: str = "auto", rate: float = 0.05) -> Head:
    pool = PooledMoments(DIMENSION)
    pool.update(tasks)
    return compile_head(
        pool,
        policy=Policy(head=kind, false_reject_rate=rate),
        encoder="numbers:1",
        dimension=DIMENSION,
        background=wide_background(DIMENSION),
    )


def some_tasks(count: int, seed: int = 0, rows: int = 40) -> list[TaskStatistics]:
    rng = np.random.default_rng(seed)
    return [
        random_task(f"task-{number}", rng, rows=rows, dimension=DIMENSION, spread=0.4)
        for number in range(count)
    ]


@st.composite
def mixed_tasks(draw: st.DrawFn) -> list[TaskStatistics]:
    tasks = some_tasks(draw(st.integers(1, 6)), draw(st.integers(0, 2**32 - 1)))
    return [sums_only(task) if draw(st.booleans()) else task for task in tasks]


# A function of the set of tasks


@settings(max_examples=30)
@given(tasks=mixed_tasks(), kind=st.sampled_from(HEAD_KINDS), data=st.data())
def test_any_order_of_arrival_gives_the_same_bytes(
    tasks: list[TaskStatistics], kind: str, data: st.DataObject
) -> None:
    expected = compiled(tasks, kind).to_bytes()
    assert compiled(data.draw(st.permutations(tasks)), kind).to_bytes() == expected


@settings(max_examples=30)
@given(tasks=mixed_tasks(), kind=st.sampled_from(HEAD_KINDS))
def test_a_retired_task_leaves_no_trace(tasks: list[TaskStatistics], kind: str) -> None:
    before = compiled(tasks, kind).to_bytes()
    passing = sums_only(
        random_task("passing", np.random.default_rng(9), rows=30, dimension=DIMENSION)
    )
    pool = PooledMoments(DIMENSION)
    for present in (tasks, [passing, *tasks], tasks):
        pool.update(present)
    head = compile_head(
        pool,
        policy=Policy(head=kind),
        encoder="numbers:1",
        dimension=DIMENSION,
        background=wide_background(DIMENSION),
    )
    assert head.to_bytes() == before


def test_fits_are_those_of_the_rows_bit_by_bit() -> None:
    kept = [replace(task, clusters=np.zeros(40, np.int16)) for task in some_tasks(4)]
    totals = []
    for tasks in (kept, [sums_only(task) for task in kept], [kept[0], *map(sums_only, kept[1:])]):
        pool = PooledMoments(DIMENSION)
        pool.update(tasks)
        totals.append(pool.total())
    for fitter in (fit_nearest_mean, lda_fitter(wide_background(DIMENSION))):
        first, *others = (fitter(total) for total in totals)
        for other in others:
            for one, two in zip(first.terms, other.terms, strict=True):
                assert one.rows.tobytes() == two.rows.tobytes()


# What routing is worth


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("share", ["all", "half"])
def test_fresh_rows_go_to_their_tasks_and_what_is_far_is_rejected(kind: str, share: str) -> None:
    whole = some_tasks(6, rows=80)
    kept = [
        replace(task, embeddings=task.embeddings[:40], clusters=task.clusters[:40] * 0)
        for task in whole
    ]
    tasks = [
        sums_only(task) if share == "all" or number % 2 else task
        for number, task in enumerate(kept)
    ]
    head = compiled(tasks, kind)
    assert np.isfinite(head.thresholds).all()
    fresh = np.concatenate([task.vectors[40:] for task in whole])
    decided = decide(head, fresh)
    own = [task.key for task in whole for _ in range(40)]
    wrong = [found not in (None, key) for found, key in zip(decided, own, strict=True)]
    assert np.mean(wrong) < 0.05
    assert np.mean([d is None for d in decided]) < 0.25
    far = -fresh
    assert np.mean([d is None for d in decide(head, far)]) > 0.5


def test_tasks_that_keep_rows_are_one_centroid_too_while_others_have_no_more() -> None:
    rng = np.random.default_rng(4)
    several = [
        random_task(f"task-{n}", rng, rows=40, dimension=DIMENSION, clusters=3) for n in range(3)
    ]
    assert len(compiled(several, "lda").rows) == 9
    one_each = [replace(task, clusters=task.clusters * 0) for task in several]
    for kind in HEAD_KINDS:
        mixed = compiled([sums_only(several[0]), *several[1:]], kind)
        assert len(mixed.rows) == 3
        expected = compiled([sums_only(several[0]), *one_each[1:]], kind)
        assert mixed.to_bytes() == expected.to_bytes()


def test_a_sampled_catalog_with_such_a_task_is_one_centroid_a_task_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "MOST_PAIRS", 0)
    rng = np.random.default_rng(5)
    several = [
        random_task(f"task-{n}", rng, rows=40, dimension=DIMENSION, clusters=3) for n in range(4)
    ]
    one_each = [replace(task, clusters=task.clusters * 0) for task in several]
    mixed = compiled([sums_only(several[0]), *several[1:]])
    assert mixed.to_bytes() == compiled([sums_only(several[0]), *one_each[1:]]).to_bytes()


@pytest.mark.parametrize("rows", [5, 40])
def test_a_nearest_mean_threshold_is_that_of_a_mean_that_does_not_know_the_row(rows: int) -> None:
    [task] = some_tasks(1, rows=rows)
    vectors = task.vectors.astype(np.float64)
    without = (vectors.sum(0) - vectors) / (rows - 1)
    cosines = (vectors * without).sum(1) / np.linalg.norm(without, axis=1)
    # At half, the threshold is that of a row whose cosine to the mean is the mean of them all.
    threshold = compiled([sums_only(task)], "nearest-mean", rate=0.5).thresholds[0]
    assert threshold == pytest.approx(np.mean(cosines), abs=0.01)
    assert threshold < np.linalg.norm(vectors.mean(0)) - 1e-3


def decide(head: Head, vectors: np.ndarray) -> list[TaskKey | None]:
    snapshot = Snapshot.build(1, head, {})
    found = snapshot.decide(
        Embeddings(vectors.astype(np.float32), np.zeros(len(vectors), np.bool_))
    )
    return [each.task for each in found]


def test_nearest_mean_thresholds_keep_about_the_rate_that_was_asked_for() -> None:
    whole = some_tasks(5, rows=600)
    head = compiled([sums_only(task) for task in whole], "nearest-mean", rate=0.1)
    for number, task in enumerate(whole):
        own = head.scores(task.vectors)[:, number]
        assert 0.05 < (own < head.thresholds[number]).mean() < 0.16


# In a catalog


def register_place(workshop: Workshop, folder: Path, name: str, **options: object) -> TaskRecord:
    data = write_rows(folder / f"{name}.jsonl", texts_of(name, 30))
    request = RegisterTask(name, data, with_prompt=False, **options)  # type: ignore[arg-type]
    result = register(workshop, [request], None, TuningSettings())
    assert not result.failures, result.failures
    return result.records[0]


def test_nothing_of_a_row_is_stored_and_the_task_is_routed_to(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with new_workshop(home) as workshop:
        record = register_place(workshop, tmp_path, "weather", statistics_only=True)
        register_place(workshop, tmp_path, "sport")
        assert record.statistics_only
        stored = artifact_file(home, record.embeddings_sha256).read_bytes()
        rows = to_fixed_point(PlaceEncoder().encode(texts_of("weather", 30)).vectors)
        assert not any(row.tobytes() in stored for row in rows)
        statistics = read_statistics(workshop.artifacts, record)
        assert statistics.sums is not None
        expected = sums_of(rows)
        assert (statistics.sums.sums == expected.sums).all()
        assert (statistics.sums.gram == expected.gram).all()
        assert len(statistics.embeddings) == 0
    with CatalogReader(home) as catalog:
        snapshot = SnapshotLoader(home, served_models()).load(catalog, 2, None)
    decisions = snapshot.decide(PlaceEncoder().encode(["weather 77", "sport 78"]))
    assert [d.task for d in decisions] == [TaskKey("weather", 1), TaskKey("sport", 1)]


def test_it_comes_and_goes_and_leaves_the_head_of_before(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        register_place(workshop, tmp_path, "sport")
        register_place(workshop, tmp_path, "music")
        before = workshop.newest_head().to_bytes()
        register_place(workshop, tmp_path, "weather", statistics_only=True)
        with_it = workshop.newest_head().to_bytes()
        lifecycle.retire(workshop, "weather")
        assert workshop.newest_head().to_bytes() == before
    with new_workshop(tmp_path / "home") as workshop:
        published = lifecycle.restore(workshop, "weather")
        assert workshop.newest_head().to_bytes() == with_it
        assert published.gate is not None
        assert published.gate.suspects == ()


def test_a_catalog_of_nothing_else_is_published_and_served(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with new_workshop(home) as workshop:
        for name in ("weather", "sport"):
            register_place(workshop, tmp_path, name, statistics_only=True)
        head = workshop.newest_head()
    assert head.summary["held_out_rows"] == 0
    assert head.probability is None
    with CatalogReader(home) as catalog:
        snapshot = SnapshotLoader(home, served_models()).load(catalog, 2, None)
    [decision] = snapshot.decide(PlaceEncoder().encode(["sport 99"]))
    assert (decision.outcome, decision.task) == (Outcome.MATCHED, TaskKey("sport", 1))


def test_damaged_sums_are_told(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        record = register_place(workshop, tmp_path, "weather", statistics_only=True)
        wrong = replace(record, data=replace(record.data, rows=31))
        with pytest.raises(CorruptArtifactError, match=r"routing sums of weather@1.*inconsistent"):
            read_statistics(workshop.artifacts, wrong)
        flip_byte(artifact_file(tmp_path / "home", record.embeddings_sha256))
        with pytest.raises(CorruptArtifactError, match="routing sums of weather@1"):
            read_statistics(workshop.artifacts, record)


def test_texts_without_embeddings_are_refused(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        data = write_rows(tmp_path / "a.jsonl", texts_of("a", 12))
        request = RegisterTask("a", data, with_prompt=False, statistics_only=True, keep_text=True)
        result = register(workshop, [request], None, TuningSettings())
    assert isinstance(result.failures["a"], InvalidInputError)
