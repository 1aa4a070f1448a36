"""The tasks on a map: near ones near, the same on every run, also of next to nothing."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.task_map import task_map


def test_tasks_that_are_near_are_near_on_the_map() -> None:
    rng = np.random.default_rng(0)
    centers = {"a": [1, 0, 0, 0], "b": [0.9, 0.1, 0, 0], "c": [0, 0, 1, 0], "d": [0, 0, 0, 1]}
    names = [name for name in centers for _ in range(30)]
    vectors = np.array([centers[name] for name in names]) + 0.01 * rng.normal(size=(120, 4))
    found = task_map([*names, None], np.vstack([vectors, [[9, 9, 9, 9]]]).astype(np.float32))
    places = {name: np.array(place) for name, place in found.places.items()}
    assert set(places) == set(centers)
    near = np.linalg.norm(places["a"] - places["b"])
    assert all(np.linalg.norm(places["a"] - places[far]) > 5 * near for far in "cd")
    assert 0.8 < found.shown_variance <= 1


def test_a_map_does_not_depend_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    names = [f"task-{n % 5}" for n in range(50)]
    vectors = rng.normal(size=(50, 8)).astype(np.float32)
    order = rng.permutation(50)
    first = task_map(names, vectors).places
    second = task_map([names[n] for n in order], vectors[order]).places
    for name, place in first.items():
        assert second[name] == pytest.approx(place, abs=1e-6)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_tasks_have_a_map_too(count: int) -> None:
    vectors = np.eye(4, dtype=np.float32)[: count + 1]
    found = task_map([*(f"task-{n}" for n in range(count)), None], vectors)
    assert len(found.places) == count
    assert np.isfinite([*found.places.values()]).all()
    assert found.shown_variance == 1
