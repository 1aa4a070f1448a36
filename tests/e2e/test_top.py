"""`promptyard top`: what the metrics of real servers, scraped over HTTP, say of an interval."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from router.client import RouterClient, RouterError
from router.prometheus import PrometheusMetrics, metrics_port, serving
from router.routing import Router
from tests.fakes import FakeEncoder, FixedLive, make_settings, make_snapshot, running_server
from trainer.cli import app
from trainer.server_figures import Look, server_figures

TENANT = (("tenant", ""),)


@contextlib.contextmanager
def measured_server(revision: int) -> Iterator[tuple[str, str]]:
    """A server at a catalog revision: its address, and where it tells its metrics."""
    metrics = PrometheusMetrics()
    settings = make_settings()
    live = FixedLive(make_snapshot(revision))
    limits = (settings.limits, settings.routing_batches)
    router = Router(live, FakeEncoder(), None, *limits, metrics)
    metrics.watch(lambda: serving({"": router}))
    with running_server(router) as address, metrics_port(metrics, "127.0.0.1:0") as told_at:
        yield address, told_at


@contextlib.contextmanager
def callers(*addresses: str) -> Iterator[None]:
    """Threads that call the servers as long as this is open, and now and then wrongly."""
    over = threading.Event()

    def call(address: str) -> None:
        with RouterClient(address) as client:
            while not over.wait(0.002):
                client.route("weather")
                with contextlib.suppress(RouterError):
                    client.route("")

    threads = [threading.Thread(target=call, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def top(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["top", *map(str, arguments)])


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_programs_get_the_figures_of_all_workers_in_one_document() -> None:
    with measured_server(3) as (one, at_one), measured_server(2) as (two, at_two):
        with callers(one, two):
            found = document(top(at_one, at_two, "--once", "--json", "--interval", 0.5))
            alone = document(top(at_one, "--once", "--json", "--interval", 0.5))
        idle = document(top(at_one, "--once", "--json", "--interval", 0.1))
    assert found["processes"] == 2
    assert (found["revision"], found["newest_revision"], found["tasks"]) == (2, 3, 3)
    assert 0.4 < found["seconds"] < 5
    calls = {(call["method"], call["code"]): call["per_second"] for call in found["calls"]}
    assert set(calls) == {("Route", "OK"), ("Route", "INVALID_ARGUMENT")}
    assert found["calls_per_second"] == pytest.approx(sum(calls.values()))
    [decision] = found["decisions"]
    assert (decision["task"], decision["outcome"]) == ("weather", "matched")
    # A call may be decided in the interval and end after it.
    assert abs(decision["per_second"] - calls["Route", "OK"]) * found["seconds"] <= 4
    assert {"routing_wait", "routing_encode"} <= {each["what"] for each in found["stages"]}
    [method] = found["methods"]
    assert 0 < method["p50_ms"] <= method["p99_ms"]
    [queue] = found["queues"]
    assert queue["queue"] == "routing"
    assert queue["batch_items"] >= 1
    assert found["memory_mib"] > 10
    assert alone["processes"] == 1
    assert idle["calls"] == idle["decisions"] == idle["stages"] == []
    assert idle["queues"] == [{"queue": "routing", "items": 0, "batch_items": None}]
    assert idle["cache_hit_share"] is None


def test_people_get_tables() -> None:
    with measured_server(3) as (address, told_at), callers(address):
        shown = top(told_at, "--once", "--interval", 0.3)
    assert shown.exit_code == 0, shown.output
    assert "revision 3, 3 tasks" in shown.stdout
    assert re.search(r"Route\s+OK\s+\d+\.\d", shown.stdout)
    assert re.search(r"weather\s+matched\s+\d+\.\d", shown.stdout)
    assert re.search(r"routing_encode\s+\d", shown.stdout)


def test_an_address_without_metrics_of_a_server_is_refused() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{probe.getsockname()[1]}"
        refused = top(nobody, "--once", "--json")
    assert refused.exit_code == 2
    error = json.loads(refused.stdout)["error"]
    assert error["value"] == f"{nobody} ([Errno 111] Connection refused)"
    assert error["remedy"] == "give the HOST:PORT of `promptyard serve --metrics`"
    with measured_server(1) as (_, told_at):
        assert top("nonsense", "--once").exit_code == 2
        assert top(told_at, "--once", "--interval", 0).exit_code == 2


def test_what_a_process_that_was_started_again_counts_is_not_negative() -> None:
    count = ("promptyard_calls_total", (("code", "OK"), ("method", "Route"), *TENANT))
    figures = server_figures([Look(10.0, {count: 500.0})], [Look(12.0, {count: 6.0})])
    assert figures.calls_per_second == 3.0


def test_quantiles_lie_where_the_buckets_say() -> None:
    def look(at: float, counts: list[tuple[str, float]], seconds: float) -> Look:
        samples = {
            ("promptyard_stage_seconds_bucket", (("le", le), ("stage", "explain"), *TENANT)): count
            for le, count in counts
        }
        about = (("stage", "explain"), *TENANT)
        samples["promptyard_stage_seconds_count", about] = counts[-1][1]
        samples["promptyard_stage_seconds_sum", about] = seconds
        return Look(at, samples)

    before = look(0.0, [("0.001", 0), ("0.002", 0), ("0.1", 0), ("+Inf", 0)], 0.0)
    after = look(10.0, [("0.001", 0), ("0.002", 50), ("0.1", 98), ("+Inf", 100)], 2.0)
    [stage] = server_figures([before], [after]).stages
    assert stage.per_second == 10.0
    assert stage.mean_ms == pytest.approx(20.0)
    assert stage.p50_ms == pytest.approx(2.0)
    assert stage.p99_ms == pytest.approx(100.0)  # beyond the last bound: that bound
