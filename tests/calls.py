"""A server in this process, calls to it over a real channel, and what their errors say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from router.interfaces import LanguageModel
from router.settings import ServerSettings
from router.v1 import router_service_pb2 as messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from router.v1.task_service_pb2_grpc import TaskServiceStub
from tests.fakes import (
    FakeEncoder,
    FakeLanguageModel,
    FixedLive,
    make_router,
    make_settings,
    make_snapshot,
    running_server,
)

TIMEOUT = 20.0

Received = TypeVar("Received")


class Serving:
    """A running server, the fakes inside it, and stubs to call it."""

    def __init__(
        self,
        settings: ServerSettings | None = None,
        base_model: LanguageModel | None = None,
        **live: str,
    ) -> None:
        self.settings = settings or make_settings()
        self.encoder = FakeEncoder()
        self.model = FakeLanguageModel()
        self.live = FixedLive(make_snapshot())
        self.live.problem = live.get("problem", "")
        self.served = make_router(self.encoder, base_model or self.model, self.live, self.settings)
        self._running = running_server(self.served, self.settings)

    def __enter__(self) -> Serving:
        self.address = self._running.__enter__()
        self.channel = grpc.insecure_channel(self.address)
        self.router = RouterServiceStub(self.channel)
        self.tasks = TaskServiceStub(self.channel)
        return self

    def __exit__(self, *error: object) -> None:
        # Whatever a test left blocked must not hold the shutdown up.
        self.encoder.blocked.set()
        self.model.blocked.set()
        self.model.steps.release(1000)
        self.channel.close()
        self._running.__exit__(None, None, None)

    def raw(self, method: str) -> Callable[..., bytes]:
        """A unary method that takes and gives bytes."""
        path = f"/router.v1.RouterService/{method}"
        return cast("Callable[..., bytes]", self.channel.unary_unary(path, None, None))


def route(text: str, top_k: int = 0) -> messages.RouteRequest:
    return messages.RouteRequest(text=text, top_k=top_k)


def failed(call: Callable[[], object]) -> tuple[grpc.Call, status_pb2.Status]:
    """The status and rich details of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = cast("grpc.Call", caught.value)
    return error, rpc_status.from_call(error)


def detail(status: status_pb2.Status, kind: type[Message]) -> Message | None:
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def reason(status: status_pb2.Status) -> str:
    info = detail(status, error_details_pb2.ErrorInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.domain == "promptyard"
    return str(info.reason)


def violated_field(status: status_pb2.Status) -> str:
    bad = detail(status, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    return str(bad.field_violations[0].field)


def assert_invalid(call: Callable[[], object], field: str) -> str:
    """The call fails with INVALID_ARGUMENT for `field`; returns the message."""
    error, status = failed(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(status) == "INVALID_INPUT"
    assert violated_field(status) == field
    return str(status.message)


def generate(serving: Serving, text: str, **fields: Any) -> list[messages.GenerateResponse]:
    return list(start_generating(serving, text, **fields))


def start_generating(
    serving: Serving, text: str, **fields: Any
) -> grpc.CallIterator[messages.GenerateResponse]:
    request = messages.GenerateRequest(text=text, **fields)
    return serving.router.Generate(request, timeout=TIMEOUT)


def read_one(call: grpc.CallIterator[Received]) -> Received:
    return next(iter(call))


def assert_overloaded(call: Callable[[], object]) -> None:
    started = time.monotonic()
    error, status = failed(call)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(status) == "OVERLOADED"
    retry = detail(status, error_details_pb2.RetryInfo)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert 0 < retry.retry_delay.ToMilliseconds() < 10_000
    pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
    assert int(pushback) == retry.retry_delay.ToMilliseconds()
    assert time.monotonic() - started < 1


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def health(serving: Serving, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(serving.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT).status)


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until that holds, for so long at most."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
