"""Other ways to route, on the same embeddings: what `bench_routing.py` compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray

HIDDEN = 384
NEIGHBOURS = 10

Numbers = NDArray[np.int64]
# Tasks `[B]` and scores `[B]` of embeddings `[B, D]`: a higher score is a better fit.
Route = Callable[[FloatArray], tuple[Numbers, FloatArray]]


@dataclass(frozen=True, slots=True)
class Peer:
    """A way to route that is trained on embeddings `[N, D]` of tasks `[N]`."""

    name: str
    train: Callable[[FloatArray, Numbers], Route]
    note: str = ""
    is_slow: bool = False


def nearest_mean(vectors: FloatArray, tasks: Numbers) -> Route:
    """Cosine to the mean embedding of each task."""
    means = np.stack([vectors[tasks == task].mean(0) for task in range(tasks.max() + 1)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)

    def route(queries: FloatArray) -> tuple[Numbers, FloatArray]:
        scores = queries @ means.T
        return scores.argmax(1), scores.max(1)

    return route


def last_layer_alone(vectors: FloatArray, tasks: Numbers) -> Route:
    """`nearest_mean` on the last layer: what most routers do."""
    inner = nearest_mean(_last_layer(vectors), tasks)
    return lambda queries: inner(_last_layer(queries))


def nearest_neighbours(vectors: FloatArray, tasks: Numbers) -> Route:
    """The task of most of the ten nearest rows; among equals the one that is nearer in sum."""

    def route(queries: FloatArray) -> tuple[Numbers, FloatArray]:
        best, top = np.empty(len(queries), np.int64), np.empty(len(queries), np.float32)
        for start in range(0, len(queries), 256):
            cosines = queries[start : start + 256] @ vectors.T
            most = min(NEIGHBOURS, len(vectors))
            nearest = np.argpartition(-cosines, most - 1, axis=1)[:, :most]
            for row, near in enumerate(nearest):
                votes = np.bincount(tasks[near], 1000 + cosines[row, near])
                best[start + row], top[start + row] = votes.argmax(), cosines[row, near].mean()
        return best, top

    return route


def logistic_regression(vectors: FloatArray, tasks: Numbers) -> Route:
    """Trained jointly on all rows; a new task means training again."""
    from sklearn.linear_model import LogisticRegression

    center = vectors.mean(0)
    model: Any = LogisticRegression(C=10.0, max_iter=200).fit(vectors - center, tasks)

    def route(queries: FloatArray) -> tuple[Numbers, FloatArray]:
        likely = model.predict_proba(queries - center)
        return model.classes_[likely.argmax(1)], likely.max(1)

    return route


def semantic_router(vectors: FloatArray, tasks: Numbers) -> Route:
    """`IndexedRouter` of semantic-router with its defaults: the mean of the five nearest rows.

    Its `fit` only maps scores to probabilities: it reorders nothing, so that it changes neither the
    accuracy nor the AUROC.
    """
    from semantic_router import Route as TheirRoute
    from semantic_router.encoders import DenseEncoder
    from semantic_router.routers import IndexedRouter

    class Remembered(DenseEncoder):
        """Looks texts up, which are the numbers of rows."""

        rows: dict[str, list[float]]

        def __call__(self, docs: Sequence[str]) -> list[list[float]]:
            return [self.rows[text] for text in docs]

    stored = {f"t{n}": row.tolist() for n, row in enumerate(vectors)}
    encoder = Remembered(name="remembered", rows=stored)
    router = IndexedRouter(
        encoder,
        [
            TheirRoute(name=str(task), utterances=[f"t{n}" for n in np.flatnonzero(tasks == task)])
            for task in range(tasks.max() + 1)
        ],
    )

    def route(queries: FloatArray) -> tuple[Numbers, FloatArray]:
        best, top = np.empty(len(queries), np.int64), np.empty(len(queries), np.float32)
        for row, query in enumerate(queries):
            encoder.rows["query"] = query.tolist()
            choice = router("query")
            best[row], top[row] = int(choice.name), choice.confidence
        return best, top

    return route


def peers() -> tuple[list[Peer], str]:
    """Those that can be measured here, and why one cannot."""
    found = [
        Peer("nearest mean, last layer alone", last_layer_alone),
        Peer("nearest mean", nearest_mean),
        Peer(f"{NEIGHBOURS}-NN", nearest_neighbours),
        Peer("logistic regression", logistic_regression, "trained jointly: not incremental"),
    ]
    try:
        from semantic_router import __version__
    except ImportError as error:
        return found, (
            f"semantic-router is not measured ({error}): install semantic-router==1.1.1 into an "
            "environment of its own and add its site-packages to PYTHONPATH"
        )
    return [
        *found,
        Peer(f"semantic-router {__version__}, IndexedRouter", semantic_router, is_slow=True),
    ], ""


def _last_layer(vectors: FloatArray) -> FloatArray:
    last = vectors[:, HIDDEN:]
    unit: FloatArray = last / np.linalg.norm(last, axis=1, keepdims=True)
    return unit
