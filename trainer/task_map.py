"""The tasks on a map: the mean embedding of each, in the plane in which they differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from router.interfaces import FloatArray


@dataclass(frozen=True, slots=True)
class TaskMap:
    """Places of tasks, and the share of the variance between their means that the plane shows."""

    places: Mapping[str, tuple[float, float]]
    shown_variance: float


def task_map(tasks: Sequence[str | None], vectors: FloatArray) -> TaskMap:
    """The first two principal components of the tasks' mean embeddings.

    `tasks` `[B]` are those of the embeddings `[B, D]`, None out of scope. With fewer than three
    tasks some coordinates are 0; without any the map is empty.
    """
    names = sorted({task for task in tasks if task is not None})
    if not names:
        return TaskMap({}, 1.0)
    labels = np.array([task or "" for task in tasks])
    means = np.stack([vectors[labels == name].mean(0, dtype=np.float64) for name in names])
    centered = means - means.mean(0)
    left, spreads, axes = np.linalg.svd(centered, full_matrices=False)
    # Of either direction the one in which the largest entry is positive: the same map every time.
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])
    places = np.zeros((len(names), 2))
    count = min(2, len(spreads))
    places[:, :count] = (left * spreads * signs)[:, :count]
    total = float((spreads**2).sum())
    return TaskMap(
        {name: (float(x), float(y)) for name, (x, y) in zip(names, places, strict=True)},
        float((spreads[:2] ** 2).sum()) / total if total else 1.0,
    )
