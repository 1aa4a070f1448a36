"""What the metrics of a server say of the time between two looks at them."""

from __future__ import annotations

import http.client
import math
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.error import URLError

from router.errors import InvalidInputError

_ANSWER_SECONDS = 5.0
_MOST_BYTES = 64 << 20
_MIB = 2**20

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Look:
    """The samples of one server process at a moment (`time.monotonic`), by name and labels."""

    at: float
    samples: Mapping[tuple[str, Labels], float]


@dataclass(frozen=True, slots=True)
class CallFigures:
    """Calls of a method that ended with a gRPC status."""

    method: str
    code: str
    per_second: float


@dataclass(frozen=True, slots=True)
class TimeFigures:
    """How long a method's calls or a stage took; quantiles lie between the bounds of buckets."""

    what: str
    per_second: float
    mean_ms: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """Texts that wait or are being worked on, and the mean size of batches (None: there was none).

    `batch_items` is of the time between the looks, `items` of the last one.
    """

    queue: str
    items: int
    batch_items: float | None


@dataclass(frozen=True, slots=True)
class DecisionFigures:
    """Decisions for a task (empty where none fits) with an outcome."""

    task: str
    outcome: str
    per_second: float


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """What all processes of a server did for `seconds`, most of each first.

    `revision` and `tasks` are of the home's own catalog, or of the one tenant that was looked at,
    in the process that is furthest behind. `cache_hit_share` is None where no text was looked up.
    `memory_mib` is resident memory, pages that processes share counted for each of them; `cores` is
    processor time a second.
    """

    seconds: float
    processes: int
    revision: int
    newest_revision: int
    tasks: int
    tasks_out_of_service: int
    memory_mib: float
    cores: float
    calls_per_second: float
    cache_hit_share: float | None
    calls: tuple[CallFigures, ...]
    methods: tuple[TimeFigures, ...]
    stages: tuple[TimeFigures, ...]
    queues: tuple[QueueFigures, ...]
    decisions: tuple[DecisionFigures, ...]


def look_at(address: str, tenant: str | None = None) -> Look:
    """What the metrics at HOST:PORT say now: of all tenants, or of one.

    Raises:
        InvalidInputError: nobody answers there, or not with the metrics of a server.
    """
    from prometheus_client.parser import text_string_to_metric_families

    remedy = "give the HOST:PORT of `promptyard serve --metrics`"
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_ANSWER_SECONDS) as answer:
            content = answer.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"over {_MOST_BYTES // _MIB} MiB")
        families = list(text_string_to_metric_families(content.decode()))
    except URLError as error:
        raise InvalidInputError("metrics", f"{address} ({error.reason})", remedy) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InvalidInputError("metrics", f"{address} ({error})", remedy) from error
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if tenant is None or sample.labels.get("tenant", tenant) == tenant
    }
    if not any(name == "promptyard_tenants_out_of_service" for name, _ in samples):
        raise InvalidInputError("metrics", f"{address} has none of a server", remedy)
    return Look(time.monotonic(), samples)


def server_figures(before: Sequence[Look], after: Sequence[Look]) -> ServerFigures:
    """The figures of the time between two looks at each process of a server, in the same order."""
    seconds = max(max(b.at - a.at for a, b in zip(before, after, strict=True)), 1e-9)
    grown = _growth(before, after)
    hits, misses = (
        sum(grown.by("promptyard_cache_texts_total", "result").get((kind,), 0.0) for kind in kinds)
        for kinds in (["hit"], ["miss"])
    )
    return ServerFigures(
        seconds=seconds,
        processes=len(after),
        revision=int(min(_values(after, "promptyard_revision"), default=0)),
        newest_revision=int(max(_values(after, "promptyard_newest_revision"), default=0)),
        tasks=int(min(_values(after, "promptyard_tasks"), default=0)),
        tasks_out_of_service=int(max(_values(after, "promptyard_tasks_out_of_service"), default=0)),
        memory_mib=sum(_values(after, "process_resident_memory_bytes")) / _MIB,
        cores=sum(grown.by("process_cpu_seconds_total").values()) / seconds,
        calls_per_second=sum(grown.by("promptyard_calls_total").values()) / seconds,
        cache_hit_share=hits / (hits + misses) if hits + misses else None,
        calls=tuple(
            CallFigures(method, code, rate)
            for (method, code), rate in grown.rates("promptyard_calls_total", "method", "code")
        ),
        methods=tuple(grown.times("promptyard_call_seconds", "method")),
        stages=tuple(grown.times("promptyard_stage_seconds", "stage")),
        queues=tuple(_queues(after, grown)),
        decisions=tuple(
            DecisionFigures(task, outcome, rate)
            for (task, outcome), rate in grown.rates(
                "promptyard_decisions_total", "task", "outcome"
            )
        ),
    )


class _Growth:
    """By how much counters have grown in all processes, in so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._grown: defaultdict[str, defaultdict[Labels, float]] = defaultdict(
            lambda: defaultdict(float)
        )

    def add(self, name: str, labels: Labels, growth: float) -> None:
        """A counter of one process has grown by that much."""
        self._grown[name][labels] += growth

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Sums by the values of these labels."""
        sums: defaultdict[tuple[str, ...], float] = defaultdict(float)
        for found, growth in self._grown[name].items():
            known = dict(found)
            sums[tuple(known.get(label, "") for label in labels)] += growth
        return dict(sums)

    def rates(self, name: str, *labels: str) -> Iterator[tuple[tuple[str, ...], float]]:
        """What has grown, a second, the most first."""
        for values, growth in sorted(self.by(name, *labels).items(), key=lambda x: (-x[1], x[0])):
            if growth > 0:
                yield values, growth / self.seconds

    def times(self, histogram: str, label: str) -> Iterator[TimeFigures]:
        """What a histogram saw, by a label."""
        sums = self.by(f"{histogram}_sum", label)
        bounds = self.by(f"{histogram}_bucket", label, "le")
        for (value,), rate in self.rates(f"{histogram}_count", label):
            count = rate * self.seconds
            upto = sorted((float(le), n) for (of, le), n in bounds.items() if of == value)
            yield TimeFigures(
                value,
                rate,
                1000 * sums[(value,)] / count,
                1000 * _quantile(upto, 0.5),
                1000 * _quantile(upto, 0.99),
            )


def _growth(before: Sequence[Look], after: Sequence[Look]) -> _Growth:
    seconds = max(max(b.at - a.at for a, b in zip(before, after, strict=True)), 1e-9)
    grown = _Growth(seconds)
    for was, now in zip(before, after, strict=True):
        for (name, labels), value in now.samples.items():
            old = was.samples.get((name, labels), 0.0)
            # A process that was started again counts from nothing.
            grown.add(name, labels, value - old if value >= old else value)
    return grown


def _quantile(upto: Sequence[tuple[float, float]], share: float) -> float:
    """The quantile of a histogram (bound, observations up to it), linear within a bucket.

    Beyond the last finite bound it is that bound.
    """
    wanted = share * upto[-1][1]
    lower, below = 0.0, 0.0
    for bound, count in upto:
        if count >= wanted and count > below:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (wanted - below) / (count - below)
        lower, below = bound, count
    return lower


def _values(looks: Sequence[Look], wanted: str) -> Iterator[float]:
    """The value of a gauge in each process: that of the home's own catalog, where it has one."""
    for look in looks:
        found = {
            dict(labels).get("tenant", ""): value
            for (name, labels), value in look.samples.items()
            if name == wanted
        }
        if found:
            yield found.get("", max(found.values()))


def _queues(after: Sequence[Look], grown: _Growth) -> Iterator[QueueFigures]:
    items: defaultdict[str, int] = defaultdict(int)
    for look in after:
        for (name, labels), value in look.samples.items():
            if name == "promptyard_queued_items":
                items[dict(labels)["queue"]] += int(value)
    sums = grown.by("promptyard_batch_items_sum", "queue")
    counts = grown.by("promptyard_batch_items_count", "queue")
    for queue, waiting in sorted(items.items()):
        batches = counts.get((queue,), 0.0)
        yield QueueFigures(queue, waiting, sums[(queue,)] / batches if batches else None)
