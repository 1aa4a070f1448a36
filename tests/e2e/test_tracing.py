"""Traces of calls to a real server over a real channel."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import StatusCode

from router.bootstrap import check_settings
from router.errors import InvalidInputError
from router.tracing import Tracing
from router.v1 import router_service_pb2 as messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from tests.fakes import FakeEncoder, FakeLanguageModel, make_router, make_settings, running_server

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
SAMPLED = ("traceparent", f"00-{TRACE}-{CALLER}-01")
SECRET = "the weather in a very private place"


class Traced:
    """A server whose spans are kept, and a stub to call it."""

    def __init__(self, stub: RouterServiceStub, kept: InMemorySpanExporter) -> None:
        self.stub = stub
        self.kept = kept

    def spans(self, names: int) -> dict[str, ReadableSpan]:
        """The spans by name, when there are so many: a call's own ends after its response."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = self.kept.get_finished_spans()
            if len(found) >= names:
                return {span.name: span for span in found}
            time.sleep(0.01)
        raise AssertionError(f"{names} spans expected: {self.kept.get_finished_spans()}")


@pytest.fixture(params=[None])
def traced(request: pytest.FixtureRequest) -> Iterator[Traced]:
    kept = InMemorySpanExporter()
    provider = TracerProvider(request.param, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    router = make_router(FakeEncoder(), FakeLanguageModel())
    with (
        running_server(router, tracing=Tracing(provider)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield Traced(RouterServiceStub(channel), kept)


def test_a_call_continues_the_trace_of_its_caller_with_a_span_for_every_stage(
    traced: Traced,
) -> None:
    request = messages.GenerateRequest(text=SECRET)
    metadata = (SAMPLED, ("x-request-id", "order-7"))
    list(traced.stub.Generate(request, metadata=metadata, timeout=20))
    spans = traced.spans(5)
    whole = spans.pop("router.v1.RouterService/Generate")
    assert set(spans) == {"admission", "encode", "decide", "generate"}
    assert whole.context is not None
    assert whole.parent is not None
    assert f"{whole.parent.span_id:016x}" == CALLER
    for span in [whole, *spans.values()]:
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == TRACE
    for span in spans.values():
        assert span.parent is not None
        assert span.parent.span_id == whole.context.span_id
    in_order = [spans[name] for name in ("admission", "encode", "decide", "generate")]
    times = [time for span in in_order for time in (span.start_time or 0, span.end_time or 0)]
    assert times == sorted(times)
    assert (whole.start_time or 0) <= times[0] + 1000  # two clocks are read one after the other
    assert abs(times[0] / 1e9 - time.time()) < 60
    encode = dict(spans["encode"].attributes or {})
    assert encode["promptyard.batch_texts"] == 1
    assert isinstance(encode["promptyard.waited_seconds"], float)
    assert dict(whole.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "router.v1.RouterService",
        "rpc.method": "Generate",
        "rpc.grpc.status_code": 0,
        "promptyard.request_id": "order-7",
    }


def test_nothing_of_a_text_is_in_a_trace(traced: Traced) -> None:
    traced.stub.Route(messages.RouteRequest(text=SECRET), timeout=20)
    with pytest.raises(grpc.RpcError):
        traced.stub.Route(messages.RouteRequest(text=SECRET, top_k=1000), timeout=20)
    deadline = time.monotonic() + 20
    while len(traced.kept.get_finished_spans()) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    told = "".join(span.to_json() for span in traced.kept.get_finished_spans())
    assert "RouterService/Route" in told
    assert "weather" not in told
    assert "private" not in told


def test_a_call_that_fails_says_how(traced: Traced) -> None:
    with pytest.raises(grpc.RpcError):
        traced.stub.Route(messages.RouteRequest(), timeout=20)
    span = traced.spans(2)["router.v1.RouterService/Route"]
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "INVALID_ARGUMENT"
    assert (span.attributes or {})["rpc.grpc.status_code"] == 3


def test_the_texts_of_a_stream_and_a_batch_have_their_stages_too(traced: Traced) -> None:
    requests = [messages.StreamRouteRequest(text=text) for text in ("weather", "sport")]
    list(traced.stub.StreamRoute(iter(requests), timeout=20))
    assert set(traced.spans(6)) >= {"router.v1.RouterService/StreamRoute", "encode", "decide"}
    texts = [f"sport {number}" for number in range(100)]
    traced.stub.BatchRoute(messages.BatchRouteRequest(texts=texts), timeout=20)
    spans = traced.spans(6 + 2 + 2 * 4)  # four batches of at most 32
    batch = spans["router.v1.RouterService/BatchRoute"]
    assert batch.context is not None
    mine = [
        span
        for span in traced.kept.get_finished_spans()
        if span.parent is not None and span.parent.span_id == batch.context.span_id
    ]
    counts = [
        dict(span.attributes or {})["promptyard.batch_texts"]
        for span in mine
        if span.name == "encode"
    ]
    assert sum(int(str(count)) for count in counts) == 100


@pytest.mark.parametrize("traced", [ParentBased(ALWAYS_OFF)], indirect=True)
def test_a_call_that_is_not_sampled_leaves_no_span(traced: Traced) -> None:
    request = messages.RouteRequest(text="weather")
    traced.stub.Route(request, timeout=20)
    traced.stub.Route(request, metadata=(("traceparent", "nonsense"),), timeout=20)
    traced.stub.Route(request, metadata=(SAMPLED,), timeout=20)
    assert all(
        span.context is not None and f"{span.context.trace_id:032x}" == TRACE
        for span in traced.spans(4).values()
    )


def test_traces_need_a_url_and_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="traces: localhost:4317; give the URL"):
        check_settings(make_settings(traces="localhost:4317"))
    check_settings(make_settings(traces="http://localhost:4317"))
    monkeypatch.setattr("router.tracing.find_spec", lambda name: None)
    with pytest.raises(InvalidInputError, match=r"pip install 'promptyard\[tracing\]'"):
        check_settings(make_settings(traces="http://localhost:4317"))


def test_a_server_whose_collector_is_gone_serves_says_so_in_its_log_and_stops(
    tmp_path: Path,
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        command = [sys.executable, "-m", "trainer.cli", "serve", "--home", str(tmp_path)]
        command += ["--route-only", "--listen", "127.0.0.1:0", "--traces", url]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            address = process.stdout.readline().split()[2].strip(",")
            with grpc.insecure_channel(address) as channel:
                stub = RouterServiceStub(channel)
                stub.Route(messages.RouteRequest(text="is anybody there?"), timeout=20)
            process.terminate()
            _, errors = process.communicate(timeout=40)
    assert process.returncode == 0
    lines = [json.loads(line) for line in errors.splitlines()]
    assert "tracing" in {line["event"] for line in lines}
