"""Metrics: a real server over a real channel, scraped over HTTP as Prometheus does it."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.answering import Answerer
from router.client import RouterClient, RouterError
from router.embedding_cache import CachingEncoder
from router.errors import InvalidInputError
from router.prometheus import PrometheusMetrics, metrics_port, serving
from router.rejection import OnUnknown, RejectionPolicy
from router.routing import Router
from tests.calls import wait_until
from tests.fakes import (
    FakeEncoder,
    FakeLanguageModel,
    FixedLive,
    make_settings,
    make_snapshot,
    make_task,
    running_server,
)

Scrape = Callable[..., float]


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def live() -> FixedLive:
    broken = replace(make_task("broken", None), problem="its prompt is missing")
    tasks = [make_task("weather", ("sun", "rain")), make_task("story", None, 1), broken]
    return FixedLive(make_snapshot(5, tasks), newest_revision=6)


@pytest.fixture
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics()


@pytest.fixture
def address(encoder: FakeEncoder, live: FixedLive, metrics: PrometheusMetrics) -> Iterator[str]:
    settings = make_settings()
    router = Router(
        live,
        encoder,
        Answerer(FakeLanguageModel(), settings.answer_batches, metrics),
        settings.limits,
        settings.routing_batches,
        metrics,
    )
    metrics.watch(lambda: serving({"": router}))
    with running_server(router) as address:
        yield address
        encoder.blocked.set()


@pytest.fixture
def client(address: str) -> Iterator[RouterClient]:
    with RouterClient(address) as client:
        yield client


@pytest.fixture
def scrape(metrics: PrometheusMetrics) -> Iterator[Scrape]:
    """The value of one sample; 0 where there is none."""
    with metrics_port(metrics, "127.0.0.1:0") as address:

        def value(sample: str, **labels: str) -> float:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                text = answer.read().decode()
            found = [
                each.value
                for family in text_string_to_metric_families(text)
                for each in family.samples
                if each.name == sample and labels.items() <= each.labels.items()
            ]
            return sum(found)

        yield value


def test_calls_are_counted_by_method_and_status(client: RouterClient, scrape: Scrape) -> None:
    for text in ("weather", "a story", "tax law"):
        client.route(text)
    with pytest.raises(RouterError):
        client.route("")
    with pytest.raises(RouterError):
        client.get_task("none")
    wait_until(lambda: scrape("promptyard_calls_total") == 5)
    assert scrape("promptyard_calls_total", method="Route", code="OK") == 3
    assert scrape("promptyard_calls_total", method="Route", code="INVALID_ARGUMENT") == 1
    assert scrape("promptyard_calls_total", method="GetTask", code="NOT_FOUND") == 1
    assert scrape("promptyard_call_seconds_count", method="Route") == 4
    assert scrape("promptyard_call_seconds_sum", method="Route") > 0


def test_what_is_used_for_unknown_texts_is_counted(client: RouterClient, scrape: Scrape) -> None:
    client.route("tax law", on_unknown=RejectionPolicy(OnUnknown.FALLBACK, "story"))
    client.batch_route(["tax law", "weather"], on_unknown=RejectionPolicy(OnUnknown.BEST))
    list(client.stream_route(["tax law"], on_unknown=RejectionPolicy()))
    assert scrape("promptyard_tasks_used_total", task="story", use="fallback") == 1
    assert scrape("promptyard_tasks_used_total", use="best_anyway") == 1
    assert scrape("promptyard_tasks_used_total", task="", use="abstained") == 1
    assert scrape("promptyard_tasks_used_total", task="weather", use="matched") == 1
    assert scrape("promptyard_decisions_total", task="", outcome="unknown") == 3


def test_decisions_are_counted_by_task_and_outcome(client: RouterClient, scrape: Scrape) -> None:
    decisions = client.batch_route(["weather", "weather", "a story", "tax law"])
    assert scrape("promptyard_decisions_total", task="weather", outcome="matched") == 2
    assert scrape("promptyard_decisions_total", task="story", outcome="matched") == 1
    assert scrape("promptyard_decisions_total", task="", outcome="unknown") == 1
    assert scrape("promptyard_decision_score_count", task="weather") == 2
    assert scrape("promptyard_decision_score_sum", task="weather") == pytest.approx(
        sum(decision.score for decision in decisions[:2])
    )


def test_the_time_is_told_by_stage_and_batches_by_size(
    client: RouterClient, scrape: Scrape
) -> None:
    client.batch_route(["weather"] * 3)
    list(client.generate("the weather brings rain"))
    list(client.generate("a story of two mice", task="story"))
    for stage, count in (
        ("routing_wait", 4),  # one a text
        ("routing_work", 2),  # one a batch
        ("routing_encode", 2),
        ("routing_decide", 2),
        ("scoring_wait", 1),
        ("scoring_work", 1),
        ("generating_wait", 1),  # one a text
        ("generating_read", 1),  # one for those that join together
        ("generating_step", 6),  # one a step: five words, and the end
    ):
        assert scrape("promptyard_stage_seconds_count", stage=stage) == count, stage
    assert scrape("promptyard_batch_items_sum", queue="routing") == 4
    assert scrape("promptyard_batch_items_count", queue="routing") == 2
    assert scrape("promptyard_batch_items_count", queue="scoring") == 1
    assert scrape("promptyard_batch_items_sum", queue="generating") == 6


def test_the_embedding_cache_tells_hits_and_misses(
    metrics: PrometheusMetrics, scrape: Scrape
) -> None:
    cache = CachingEncoder(FakeEncoder(), 1 << 20, metrics)
    cache.encode(["rain", "sun", "rain"])
    cache.encode(["rain"])
    assert scrape("promptyard_cache_texts_total", result="hit") == 2
    assert scrape("promptyard_cache_texts_total", result="miss") == 2


def test_what_is_served_is_told_as_it_is_now(
    client: RouterClient, live: FixedLive, scrape: Scrape
) -> None:
    assert scrape("promptyard_revision") == 5
    assert scrape("promptyard_newest_revision") == 6
    assert scrape("promptyard_tasks") == 3
    assert scrape("promptyard_tasks_out_of_service") == 1
    live.snapshot = make_snapshot(6)
    assert scrape("promptyard_revision") == 6
    assert scrape("promptyard_tasks_out_of_service") == 0


def test_the_queues_are_told_while_texts_wait(
    client: RouterClient, encoder: FakeEncoder, scrape: Scrape
) -> None:
    assert scrape("promptyard_queued_items", queue="routing") == 0
    encoder.blocked.clear()
    waiting = threading.Thread(target=client.batch_route, args=(["weather"] * 7,))
    waiting.start()
    wait_until(lambda: scrape("promptyard_queued_items", queue="routing") == 7)
    encoder.blocked.set()
    waiting.join(10)
    wait_until(lambda: scrape("promptyard_queued_items", queue="routing") == 0)
    assert scrape("promptyard_queued_items", queue="scoring") == 0
    assert scrape("promptyard_queued_items", queue="generating") == 0


def test_a_caller_who_leaves_is_counted_as_cancelled(
    address: str, encoder: FakeEncoder, scrape: Scrape
) -> None:
    encoder.blocked.clear()
    with (
        RouterClient(address, timeout=0.2) as impatient,
        pytest.raises(RouterError, match="DEADLINE_EXCEEDED"),
    ):
        impatient.route("weather")
    wait_until(lambda: scrape("promptyard_calls_total", method="Route", code="CANCELLED") == 1)


def test_no_text_of_a_caller_is_in_the_metrics(
    client: RouterClient, metrics: PrometheusMetrics
) -> None:
    client.route("a secret story")
    with pytest.raises(RouterError):
        client.get_task("secret-name")
    with metrics_port(metrics, "127.0.0.1:0") as address:
        text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    assert "promptyard_decisions_total" in text
    assert "secret" not in text
    assert "process_resident_memory_bytes" in text


def test_a_port_of_its_own_that_is_taken_is_refused(metrics: PrometheusMetrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(InvalidInputError, match=rf"metrics: {address} \(Address already in use"),
            metrics_port(metrics, address),
        ):
            raise AssertionError


@pytest.mark.parametrize("metrics_address", ["nonsense", "127.0.0.1:99999", ":1", ""])
def test_an_address_that_is_none_is_refused_in_the_settings(metrics_address: str) -> None:
    with pytest.raises(InvalidInputError, match="metrics: "):
        make_settings(metrics=metrics_address)
