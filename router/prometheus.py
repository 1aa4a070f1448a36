"""What a server tells Prometheus, and the port that it is asked at."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

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

from router.decision import Decision, Use
from router.errors import InvalidInputError
from router.interfaces import ComparedSide
from router.routing import Router
from router.tasks import TaskKey

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
    challengers: int = 0
    challengers_out_of_service: int = 0


_GAUGES: tuple[tuple[str, str, Callable[[Serving], float]], ...] = (
    ("revision", "The catalog revision that is served.", lambda found: found.revision),
    (
        "newest_revision",
        "The newest revision in the catalog.",
        lambda found: found.newest_revision,
    ),
    ("tasks", "Tasks at the served revision.", lambda found: found.tasks),
    (
        "tasks_out_of_service",
        "Tasks whose files could not be loaded.",
        lambda found: found.tasks_out_of_service,
    ),
    (
        "challengers",
        "Challengers that are tried at the served revision.",
        lambda found: found.challengers,
    ),
    (
        "challengers_out_of_service",
        "Challengers that could not be loaded.",
        lambda found: found.challengers_out_of_service,
    ),
)


class _Families:
    """The metrics of a process: one family each, with the tenant among its labels."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "promptyard_calls",
            "Calls that have ended, by method and gRPC status code.",
            ["tenant", "method", "code"],
            registry=self.registry,
        )
        self.call_seconds = Histogram(
            "promptyard_call_seconds",
            "From the request to the end of the call, a stream's as a whole.",
            ["tenant", "method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            "promptyard_stage_seconds",
            "Where the time goes: waiting for a batch (one observation a text), the work of a "
            "batch, and within routing the encoder and the decisions (one a batch).",
            ["tenant", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_items = Histogram(
            "promptyard_batch_items",
            "Texts that were worked on together.",
            ["tenant", "queue"],
            buckets=_ITEMS,
            registry=self.registry,
        )
        self.cache = Counter(
            "promptyard_cache_texts",
            "Texts whose embedding was remembered (hit), or not (miss).",
            ["tenant", "result"],
            registry=self.registry,
        )
        self.decisions = Counter(
            "promptyard_decisions",
            "Decisions, by task (empty where none fits) and outcome.",
            ["tenant", "task", "outcome"],
            registry=self.registry,
        )
        self.used = Counter(
            "promptyard_tasks_used",
            "Texts by the task that they are to be answered under (empty: none), and why it is.",
            ["tenant", "task", "use"],
            registry=self.registry,
        )
        self.scores = Summary(
            "promptyard_decision_score",
            "Scores of the tasks that texts were routed to, rejected texts left out.",
            ["tenant", "task"],
            registry=self.registry,
        )
        sides = ["tenant", "task", "revision", "side"]
        self.challenge_decisions = Counter(
            "promptyard_challenge_decisions",
            "Decisions on the texts of a task that has a challenger, by the revision that decided, "
            "its side and the outcome (elsewhere: another task; named: by the request).",
            [*sides, "outcome"],
            registry=self.registry,
        )
        self.challenge_scores = Summary(
            "promptyard_challenge_score",
            "Scores of the task on the texts that were routed to it, by revision and side.",
            sides,
            registry=self.registry,
        )
        self.shadow_differences = Counter(
            "promptyard_shadow_differences",
            "Texts whose outcome or task differs by the shadow, by task and the shadow's revision.",
            ["tenant", "task", "revision"],
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def forget(self, tenant: str) -> None:
        """Drop what was counted for a tenant."""
        for family in (
            self.calls,
            self.call_seconds,
            self.stage_seconds,
            self.batch_items,
            self.cache,
            self.decisions,
            self.used,
            self.scores,
            self.challenge_decisions,
            self.challenge_scores,
            self.shadow_differences,
        ):
            family.remove_by_labels({"tenant": tenant})


class PrometheusMetrics:
    """An observer whose counters one Prometheus registry holds. Thread-safe.

    Names of tenants and tasks are labels; texts never are.
    """

    def __init__(self, tenant: str = "", families: _Families | None = None) -> None:
        self._tenant = tenant
        self._families = families or _Families()
        # Finding a metric by its labels takes as long as counting in it.
        self._labelled = cache(lambda family, *labels: family.labels(tenant, *labels))

    @property
    def registry(self) -> CollectorRegistry:
        """What is scraped: the metrics of all tenants."""
        return self._families.registry

    def of(self, tenant: str) -> PrometheusMetrics:
        """See `router.interfaces.Observer`."""
        return self if tenant == self._tenant else PrometheusMetrics(tenant, self._families)

    def forget(self) -> None:
        """See `router.interfaces.Observer`."""
        self._families.forget(self._tenant)
        self._labelled.cache_clear()

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """See `router.interfaces.Observer`."""
        self._labelled(self._families.calls, method, code).inc()
        self._labelled(self._families.call_seconds, method).observe(seconds)

    def stage_ended(self, stage: str, seconds: float) -> None:
        """See `router.interfaces.Observer`."""
        self._labelled(self._families.stage_seconds, stage).observe(seconds)

    def batch_ended(self, queue: str, items: int) -> None:
        """See `router.interfaces.Observer`."""
        self._labelled(self._families.batch_items, queue).observe(items)

    def cache_used(self, *, hits: int, misses: int) -> None:
        """See `router.interfaces.Observer`."""
        self._labelled(self._families.cache, "hit").inc(hits)
        self._labelled(self._families.cache, "miss").inc(misses)

    def decided(self, decision: Decision) -> None:
        """See `router.interfaces.Observer`."""
        task = "" if decision.task is None else decision.task.name
        self._labelled(self._families.decisions, task, decision.outcome.value).inc()
        used = "" if decision.used is None else decision.used.name
        self._labelled(self._families.used, used, decision.use.value).inc()
        if task and math.isfinite(decision.score):
            self._labelled(self._families.scores, task).observe(decision.score)

    def compared(self, side: ComparedSide, revision: TaskKey, decision: Decision) -> None:
        """See `router.interfaces.Observer`."""
        labels = (revision.name, str(revision.revision), side)
        outcome = decision.outcome.value
        is_here = decision.task is not None and decision.task.name == revision.name
        if decision.use is Use.NAMED:
            outcome = "named"
        elif decision.task is not None and not is_here:
            outcome = "elsewhere"
        self._labelled(self._families.challenge_decisions, *labels, outcome).inc()
        if is_here and math.isfinite(decision.score):
            self._labelled(self._families.challenge_scores, *labels).observe(decision.score)

    def shadow_differed(self, challenger: TaskKey) -> None:
        """See `router.interfaces.Observer`."""
        labels = (challenger.name, str(challenger.revision))
        self._labelled(self._families.shadow_differences, *labels).inc()

    def watch(self, look: Callable[[], Mapping[str, Serving | None]]) -> None:
        """Report what `look` finds at every scrape, by tenant; None where a catalog is unfit.

        It is called in a thread of its own.
        """
        self.registry.register(_ServingCollector(look))


def serving(routers: Mapping[str, Router | None]) -> dict[str, Serving | None]:
    """What is served at the moment, by tenant; None where the catalog cannot be served."""
    return {
        tenant: None if router is None else _serving(router) for tenant, router in routers.items()
    }


def _serving(router: Router) -> Serving:
    live = router.live
    snapshot = live.snapshot
    return Serving(
        snapshot.revision,
        live.newest_revision,
        len(snapshot.tasks),
        sum(bool(task.problem) for task in snapshot.tasks.values()),
        router.queued,
        len(snapshot.challengers),
        len(snapshot.broken_challengers),
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
    def __init__(self, look: Callable[[], Mapping[str, Serving | None]]) -> None:
        self._look = look

    def collect(self) -> Iterable[Metric]:
        found = self._look()
        served = {tenant: serving for tenant, serving in found.items() if serving is not None}
        for name, text, value_of in _GAUGES:
            family = GaugeMetricFamily(f"promptyard_{name}", text, labels=["tenant"])
            for tenant, serving in served.items():
                family.add_metric([tenant], value_of(serving))
            yield family
        queued = GaugeMetricFamily(
            "promptyard_queued_items",
            "Texts waiting or being worked on.",
            labels=["tenant", "queue"],
        )
        for tenant, serving in served.items():
            for queue, items in serving.queued.items():
                queued.add_metric([tenant, queue], items)
        yield queued
        yield GaugeMetricFamily(
            "promptyard_tenants_out_of_service",
            "Tenants whose catalog cannot be served.",
            len(found) - len(served),
        )
