"""What a server tells Prometheus, and the port that it is asked at."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    ProcessCollector,
    Summary,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from router.decision import Decision
from router.errors import InvalidInputError
from router.routing import Router

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ITEMS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Serving:
    """What is being served, as a scrape finds it."""

    revision: int
    newest_revision: int
    tasks: int
    tasks_out_of_service: int
    queued: Mapping[str, int]


class PrometheusMetrics:
    """An observer whose counters one Prometheus registry holds. Thread-safe.

    Names of tasks are labels; texts never are.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "promptyard_calls",
            "Calls that have ended, by method and gRPC status code.",
            ["method", "code"],
            registry=self.registry,
        )
        self._call_seconds = Histogram(
            "promptyard_call_seconds",
            "From the request to the end of the call, a stream's as a whole.",
            ["method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._stage_seconds = Histogram(
            "promptyard_stage_seconds",
            "Where the time goes: waiting for a batch (one observation a text), the work of a "
            "batch, and within routing the encoder and the decisions (one a batch).",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batch_items = Histogram(
            "promptyard_batch_items",
            "Texts that were worked on together.",
            ["queue"],
            buckets=_ITEMS,
            registry=self.registry,
        )
        self._cache = Counter(
            "promptyard_cache_texts",
            "Texts whose embedding was remembered (hit), or not (miss).",
            ["result"],
            registry=self.registry,
        )
        self._decisions = Counter(
            "promptyard_decisions",
            "Decisions, by task (empty where none fits) and outcome.",
            ["task", "outcome"],
            registry=self.registry,
        )
        self._used = Counter(
            "promptyard_tasks_used",
            "Texts by the task that they are to be answered under (empty: none), and why it is.",
            ["task", "use"],
            registry=self.registry,
        )
        self._scores = Summary(
            "promptyard_decision_score",
            "Scores of the tasks that texts were routed to, rejected texts left out.",
            ["task"],
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """See `router.interfaces.Observer`."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(seconds)

    def stage_ended(self, stage: str, seconds: float) -> None:
        """See `router.interfaces.Observer`."""
        self._stage_seconds.labels(stage).observe(seconds)

    def batch_ended(self, queue: str, items: int) -> None:
        """See `router.interfaces.Observer`."""
        self._batch_items.labels(queue).observe(items)

    def cache_used(self, *, hits: int, misses: int) -> None:
        """See `router.interfaces.Observer`."""
        self._cache.labels("hit").inc(hits)
        self._cache.labels("miss").inc(misses)

    def decided(self, decision: Decision) -> None:
        """See `router.interfaces.Observer`."""
        task = "" if decision.task is None else decision.task.name
        self._decisions.labels(task, decision.outcome.value).inc()
        used = "" if decision.used is None else decision.used.name
        self._used.labels(used, decision.use.value).inc()
        if task and math.isfinite(decision.score):
            self._scores.labels(task).observe(decision.score)

    def watch(self, look: Callable[[], Serving]) -> None:
        """Report what `look` finds at every scrape; it is called in a thread of its own."""
        self.registry.register(_ServingCollector(look))


def serving(router: Router) -> Serving:
    """What `router` serves at the moment."""
    live = router.live
    snapshot = live.snapshot
    return Serving(
        snapshot.revision,
        live.newest_revision,
        len(snapshot.tasks),
        sum(bool(task.problem) for task in snapshot.tasks.values()),
        router.queued,
    )


@contextlib.contextmanager
def metrics_port(metrics: PrometheusMetrics, listen: str) -> Iterator[str]:
    """Answer scrapes over HTTP at HOST:PORT; yields the address with the real port.

    Raises:
        InvalidInputError: the address cannot be listened on.
    """
    host, _, port = listen.rpartition(":")
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry=metrics.registry)
    except OSError as error:
        raise InvalidInputError(
            "metrics",
            f"{listen} ({error.strerror or error})",
            "choose a free port and an address of this machine",
        ) from error
    try:
        yield f"{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _ServingCollector(Collector):
    def __init__(self, look: Callable[[], Serving]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        serving = self._look()
        for name, text, value in (
            ("revision", "The catalog revision that is served.", serving.revision),
            ("newest_revision", "The newest revision in the catalog.", serving.newest_revision),
            ("tasks", "Tasks at the served revision.", serving.tasks),
            (
                "tasks_out_of_service",
                "Tasks whose files could not be loaded.",
                serving.tasks_out_of_service,
            ),
        ):
            yield GaugeMetricFamily(f"promptyard_{name}", text, value)
        queued = GaugeMetricFamily(
            "promptyard_queued_items", "Texts waiting or being worked on.", labels=["queue"]
        )
        for queue, items in serving.queued.items():
            queued.add_metric([queue], items)
        yield queued
