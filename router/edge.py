"""What stands around every handler: reading requests, admission, and errors to gRPC status."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from router.access import TokenFile
from router.errors import OverloadedError, PromptyardError
from router.roles import ROLE_OF_METHOD
from router.routing import Router
from router.tenant_routers import TenantRouters
from router.tracing import Tracing, stage
from router.wire import Unreadable, failure, request_reader

Context = aio.ServicerContext[Any, Any]
UnaryHandler = Callable[[Any, Context], Awaitable[Message]]
StreamHandler = Callable[[Any, Context], AsyncIterator[Message]]
ServicerOf = Callable[[Router], object]

_REQUEST_ID = "x-request-id"
# One line, and short: it comes from a caller and ends up in the log.
_LOGGABLE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

_log = structlog.get_logger(__name__)


@dataclass
class _Call:
    """A call: when it began, and the tenant of its token, empty before it is known and for none."""

    context: Context
    began: float = 0.0
    tenant: str = ""

    @property
    def metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """What the caller sent beside its request."""
        return self.context.invocation_metadata() or ()

    @cached_property
    def request_id(self) -> str:
        """The caller's own id of the call, or a new one where it gave none that can be logged."""
        for key, value in self.metadata:
            if key == _REQUEST_ID and isinstance(value, str) and _LOGGABLE.fullmatch(value):
                return value
        return secrets.token_hex(8)


class Edge:
    """Guards the handlers of all services of a server, and counts their calls together.

    A handler belongs to a servicer over the router of the tenant that the call's token names, and
    so has no way to another tenant's.
    """

    def __init__(
        self,
        routers: TenantRouters,
        max_calls: int,
        max_request_bytes: int,
        access: TokenFile | None = None,
        log_calls: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        """Without `access` everybody may call everything, on the home's own catalog.

        A tenant may have `max_calls` at a time. `log_calls` logs one line a call, `tracing` makes a
        trace of it.
        """
        self._routers = routers
        self._max_calls = max_calls
        self._max_request_bytes = max_request_bytes
        self._access = access
        self._log_calls = log_calls
        self._tracing = tracing
        self._calls: Counter[str] = Counter()

    @property
    def busy(self) -> frozenset[str]:
        """The tenants of the calls that are running."""
        return frozenset(self._calls)

    def handlers(
        self, service: ServiceDescriptor, servicer_of: ServicerOf
    ) -> grpc.GenericRpcHandler[Any, Any]:
        """Every method of `service`, guarded: handlers raise errors and know no status codes.

        `servicer_of` makes the servicer of a call, over its tenant's router.

        A request that cannot be read never reaches a unary handler; a stream's handler sees it
        as an `Unreadable` among its messages, so that it can go on.
        """
        return grpc.method_handlers_generic_handler(
            service.full_name,
            {method.name: self._handler(method, servicer_of) for method in service.methods},
        )

    def _handler(
        self, method: MethodDescriptor, servicer_of: ServicerOf
    ) -> grpc.RpcMethodHandler[Any, Any]:
        codec = (
            request_reader(GetMessageClass(method.input_type), self._max_request_bytes),
            GetMessageClass(method.output_type).SerializeToString,
        )
        if method.client_streaming:
            guarded = self._guard_stream(method, servicer_of)
            return grpc.stream_stream_rpc_method_handler(guarded, *codec)
        if method.server_streaming:
            guarded = self._guard_stream(method, servicer_of)
            return grpc.unary_stream_rpc_method_handler(guarded, *codec)
        return grpc.unary_unary_rpc_method_handler(self._guard_unary(method, servicer_of), *codec)

    def _guard_unary(self, method: MethodDescriptor, servicer_of: ServicerOf) -> UnaryHandler:
        async def call(request: object, context: Context) -> Message:
            about = _Call(context)
            try:
                with self._observed(method, about), self._admitted(method, about):
                    router = await self._router(about)
                    handler: UnaryHandler = getattr(servicer_of(router), method.name)
                    return await handler(_readable(request), context)
            except Exception as error:
                await _fail(method, about, error)

        return call

    def _guard_stream(self, method: MethodDescriptor, servicer_of: ServicerOf) -> StreamHandler:
        async def call(request: object, context: Context) -> AsyncIterator[Message]:
            about = _Call(context)
            try:
                with self._observed(method, about), self._admitted(method, about):
                    router = await self._router(about)
                    handler: StreamHandler = getattr(servicer_of(router), method.name)
                    async for response in handler(_readable(request), context):
                        yield response
            except Exception as error:
                await _fail(method, about, error)

        return call

    async def _router(self, about: _Call) -> Router:
        """The router of an admitted call's tenant."""
        router = await self._routers.router(about.tenant)
        stage("admission", about.began, time.perf_counter())
        return router

    @contextlib.contextmanager
    def _observed(self, method: MethodDescriptor, about: _Call) -> Iterator[None]:
        trace = None
        if self._tracing is not None:
            service = method.containing_service.full_name
            trace = self._tracing.begin(service, method.name, about.metadata)
        about.began = time.perf_counter()
        code = grpc.StatusCode.OK
        try:
            yield
        except Exception as error:
            code = failure(error).code
            raise
        except BaseException:  # the caller left, or its deadline passed
            code = grpc.StatusCode.CANCELLED
            raise
        finally:
            seconds = time.perf_counter() - about.began
            if trace is not None:
                trace.end(code.name, code.value[0], about.request_id, about.tenant)
            observer = self._routers.own.observer.of(about.tenant)
            observer.call_ended(method.name, code.name, seconds)
            if self._log_calls:
                _log.info(
                    "call",
                    request_id=about.request_id,
                    method=method.name,
                    code=code.name,
                    milliseconds=round(1000 * seconds, 3),
                    **({"tenant": about.tenant} if about.tenant else {}),
                )

    @contextlib.contextmanager
    def _admitted(self, method: MethodDescriptor, about: _Call) -> Iterator[None]:
        if self._access is not None:
            role = ROLE_OF_METHOD[method.name]
            about.tenant = self._access.check(role, about.metadata).tenant
        tenant = about.tenant
        running = self._calls[tenant]
        if running >= self._max_calls:
            raise OverloadedError("calls", f"{running} running", "try again a little later")
        self._calls[tenant] += 1
        try:
            yield
        finally:
            self._calls[tenant] -= 1
            if not self._calls[tenant]:
                del self._calls[tenant]


def _readable(request: object) -> object:
    if isinstance(request, Unreadable):
        raise request.error
    return request


async def _fail(method: MethodDescriptor, about: _Call, error: Exception) -> NoReturn:
    if not isinstance(error, PromptyardError):
        # Frames, but neither the message nor values: those may hold a caller's text.
        _log.error(
            "call failed",
            request_id=about.request_id,
            method=method.full_name,
            error=type(error).__name__,
            frames="".join(traceback.format_tb(error.__traceback__)),
        )
    ending = failure(error)
    trailers = (*ending.trailers, (_REQUEST_ID, about.request_id))
    await about.context.abort(ending.code, ending.message, trailers)
