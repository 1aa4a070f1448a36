"""Traces: the stages of one call, as spans of OpenTelemetry. Off unless a server is set up for it.

The only module that knows OpenTelemetry, which comes with the extra `tracing` and is imported when
a `Tracing` is made. Spans carry counts, names of methods and tenants, and ids; never a text.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING

import structlog

from router.errors import InvalidInputError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_SERVICE = "promptyard"
_PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.grpc")
_EXPORT_SECONDS = 5
_TRACE_CONTEXT = ("traceparent", "tracestate")

_log = structlog.get_logger(__name__)


def check_tracing(endpoint: str) -> None:
    """Refuse to trace to an endpoint that is none, or without the packages for it.

    Raises:
        InvalidInputError: it is no URL, or OpenTelemetry is not installed.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise InvalidInputError(
            "traces", endpoint, "give the URL of a collector, e.g. http://127.0.0.1:4317"
        )
    if not all(map(_is_installed, _PACKAGES)):
        raise InvalidInputError(
            "traces", "OpenTelemetry is not installed", "pip install 'promptyard[tracing]'"
        )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False


def stage(name: str, began: float, ended: float, **counts: float) -> None:
    """Tell the trace of the call that is being handled, if any, that a stage of it has ended.

    Times are those of `time.perf_counter`.
    """
    call = _current.get()
    if call is not None:
        call.stage(name, began, ended, counts)


class Tracing:
    """Makes a trace, or the next part of its caller's, of every call."""

    def __init__(self, provider: TracerProvider) -> None:
        """`provider` says what becomes of spans, and is shut down by `close`."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer(_SERVICE)
        self._propagator = TraceContextTextMapPropagator()

    def begin(
        self, service: str, method: str, metadata: Iterable[tuple[str, str | bytes]]
    ) -> CallTrace | None:
        """The trace of a call that begins now, for its task; None where it is not sampled.

        It continues the trace that the call's metadata names (W3C Trace Context).
        """
        from opentelemetry.trace import SpanKind

        named = {key: str(value) for key, value in metadata if key in _TRACE_CONTEXT}
        span = self._tracer.start_span(
            f"{service}/{method}",
            self._propagator.extract(named),
            SpanKind.SERVER,
            {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method},
        )
        call = CallTrace(self._tracer, span) if span.is_recording() else None
        _current.set(call)
        return call

    def close(self) -> None:
        """Send what was not sent yet, for some seconds at most."""
        self._provider.shutdown()


class CallTrace:
    """The span of one call, and those of its stages."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span)
        # From the clock that stages are measured by to the one that spans have.
        self._offset = time.time_ns() - time.perf_counter_ns()

    def stage(self, name: str, began: float, ended: float, counts: dict[str, float]) -> None:
        """A stage that has ended."""
        attributes = {f"{_SERVICE}.{key}": value for key, value in counts.items()}
        span = self._tracer.start_span(
            name, self._context, attributes=attributes, start_time=self._nanoseconds(began)
        )
        span.end(self._nanoseconds(ended))

    def end(self, code: str, number: int, request_id: str, tenant: str) -> None:
        """The call has ended with a gRPC status."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("rpc.grpc.status_code", number)
        self._span.set_attribute(f"{_SERVICE}.request_id", request_id)
        if tenant:
            self._span.set_attribute(f"{_SERVICE}.tenant", tenant)
        if code != "OK":
            self._span.set_status(StatusCode.ERROR, code)
        self._span.end()

    def _nanoseconds(self, at: float) -> int:
        return int(at * 1e9) + self._offset


_current: ContextVar[CallTrace | None] = ContextVar("trace of this call", default=None)


def tracing_to(endpoint: str, share: float, version: str) -> Tracing:
    """Traces that go to a collector, by OTLP over gRPC.

    A `share` of the calls that do not say themselves whether they are traced is.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    library = logging.getLogger("opentelemetry")
    library.handlers = [_ToOurLog(logging.WARNING)]
    library.propagate = False
    provider = TracerProvider(
        ParentBased(TraceIdRatioBased(share)),
        Resource.create({"service.name": _SERVICE, "service.version": version}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint, timeout=_EXPORT_SECONDS)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


class _ToOurLog(logging.Handler):
    """What OpenTelemetry logs (a collector that cannot be reached), as lines of our own log."""

    def emit(self, record: logging.LogRecord) -> None:
        _log.warning("tracing", problem=record.getMessage())
