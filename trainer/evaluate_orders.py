"""Evaluates a stream of tasks in several random orders: what depends on the order, and what not."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from router.background import TEXTS
from router.embedding_cache import CachingEncoder
from router.errors import InvalidInputError
from router.interfaces import Encoder
from trainer import metrics
from trainer.commands import PolicyChange
from trainer.evaluate_stream import Stream, StreamEvaluation, evaluate_stream
from trainer.metrics import Spread
from trainer.register import Progress
from trainer.tuning_settings import TuningSettings

_SEED = 0
_MOST_CACHE_BYTES = 1 << 29
# Of a text, its place in the cache beside the vector.
_BYTES_BESIDE_A_VECTOR = 1024


@dataclass(frozen=True, slots=True)
class OrderFigures:
    """What one order came to.

    `accuracy` is at the end, over rows; `mean_accuracy` is the mean of `accuracy_after_each`, the
    average incremental accuracy (Rebuffi et al. 2017, arXiv:1611.07725). `head_sha256` is that of
    the last head: equal ones decide alike. The rest as in `StreamEvaluation`.
    """

    order: tuple[str, ...]
    accuracy: float
    average_accuracy: float
    forgetting: float
    backward_transfer: float
    mean_accuracy: float
    unknown_before_arrival: float
    accuracy_after_each: tuple[float, ...]
    seconds_registering: float
    head_sha256: str


@dataclass(frozen=True, slots=True)
class OrdersEvaluation:
    """A stream in several orders; `first` is all of what the first one found."""

    first: StreamEvaluation
    orders: tuple[OrderFigures, ...]

    @property
    def ends_alike(self) -> bool:
        """Whether every order ended with the same head, bit for bit."""
        return len({each.head_sha256 for each in self.orders}) == 1

    def spread(self, figure: str) -> Spread:
        """The mean and deviation over the orders of a figure of `OrderFigures`."""
        return metrics.spread([getattr(each, figure) for each in self.orders])


def random_orders(tasks: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """`count` different random orders, the same on every run and however `tasks` are ordered.

    Raises:
        InvalidInputError: there are not so many.
    """
    names = sorted(tasks)
    # There are far more than anybody asks for from six tasks on.
    if len(names) < 6 and count > math.factorial(len(names)):
        most = math.factorial(len(names))
        raise InvalidInputError("--orders", count, f"{len(names)} tasks have {most} orders")
    rng = random.Random(_SEED)
    orders: dict[tuple[str, ...], None] = {}
    while len(orders) < count:
        orders[tuple(rng.sample(names, len(names)))] = None
    return list(orders)


def evaluate_orders(
    stream: Stream,
    count: int,
    scratch: Path,
    encoder: Encoder,
    change: PolicyChange | None = None,
    progress: Progress = lambda *_: None,
) -> OrdersEvaluation:
    """Evaluate routing of `stream` in `count` random orders; texts are embedded once.

    Prompts are left out: each is tuned on its own task's rows, in whatever order those arrive.

    Raises:
        InvalidInputError: the tasks have fewer orders.
        PromptyardError: a task could not be registered.
    """
    orders = random_orders(stream.order, count)
    cached = _remembering(stream, encoder)
    first: StreamEvaluation | None = None
    figures = []
    for number, order in enumerate(orders):
        progress("orders", "evaluate", number, count)
        folder = scratch / f"order-{number}"
        folder.mkdir()
        evaluation = evaluate_stream(
            replace(stream, order=order), folder, cached, None, TuningSettings(), change
        )
        figures.append(_figures(evaluation))
        first = first or evaluation
    progress("orders", "evaluate", count, count)
    if first is None:
        raise ValueError("no order to evaluate")
    return OrdersEvaluation(first, tuple(figures))


def _remembering(stream: Stream, encoder: Encoder) -> Encoder:
    """`encoder`, which remembers all texts of the stream, or where that is too much, none.

    One that forgets some would embed others beside them than before, and round otherwise.
    """
    texts = len(stream.test) + sum(len(rows) for rows in stream.train.values())
    texts += len(TEXTS.read_text(encoding="utf-8").splitlines())
    size = texts * (4 * encoder.dimension + _BYTES_BESIDE_A_VECTOR)
    return CachingEncoder(encoder, size) if size <= _MOST_CACHE_BYTES else encoder


def _figures(evaluation: StreamEvaluation) -> OrderFigures:
    return OrderFigures(
        order=evaluation.stream.order,
        accuracy=evaluation.routing.accuracy,
        average_accuracy=evaluation.continual.accuracy,
        forgetting=evaluation.continual.forgetting,
        backward_transfer=evaluation.continual.backward_transfer,
        mean_accuracy=metrics.mean(evaluation.accuracy_after_each),
        unknown_before_arrival=metrics.mean(evaluation.unknown_before_arrival),
        accuracy_after_each=evaluation.accuracy_after_each,
        seconds_registering=sum(each.seconds for each in evaluation.registrations),
        head_sha256=evaluation.head_sha256,
    )
