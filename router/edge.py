"""What stands around every handler: reading requests, admission, and errors to gRPC status."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import aio

from router.access import TokenFile
from router.errors import OverloadedError, PromptyardError
from router.interfaces import Observer
from router.observing import UNOBSERVED
from router.roles import ROLE_OF_METHOD
from router.wire import Unreadable, failure, request_reader

Context = aio.ServicerContext[Any, Any]
UnaryHandler = Callable[[Any, Context], Awaitable[Message]]
StreamHandler = Callable[[Any, Context], AsyncIterator[Message]]

_log = structlog.get_logger(__name__)


class Edge:
    """Guards the handlers of all services of a server, and counts their calls together."""

    def __init__(
        self,
        max_calls: int,
        max_request_bytes: int,
        observer: Observer = UNOBSERVED,
        access: TokenFile | None = None,
    ) -> None:
        """Without `access` everybody may call everything."""
        self._max_calls = max_calls
        self._max_request_bytes = max_request_bytes
        self._observer = observer
        self._access = access
        self._calls = 0

    def handlers(
        self, service: ServiceDescriptor, servicer: object
    ) -> grpc.GenericRpcHandler[Any, Any]:
        """Every method of `service`, guarded: handlers raise errors and know no status codes.

        A request that cannot be read never reaches a unary handler; a stream's handler sees it
        as an `Unreadable` among its messages, so that it can go on.
        """
        return grpc.method_handlers_generic_handler(
            service.full_name,
            {
                method.name: self._handler(method, getattr(servicer, method.name))
                for method in service.methods
            },
        )

    def _handler(
        self, method: MethodDescriptor, handler: Callable[..., Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        codec = (
            request_reader(GetMessageClass(method.input_type), self._max_request_bytes),
            GetMessageClass(method.output_type).SerializeToString,
        )
        if method.client_streaming:
            guarded = self._guard_stream(method, handler)
            return grpc.stream_stream_rpc_method_handler(guarded, *codec)
        if method.server_streaming:
            guarded = self._guard_stream(method, handler)
            return grpc.unary_stream_rpc_method_handler(guarded, *codec)
        return grpc.unary_unary_rpc_method_handler(self._guard_unary(method, handler), *codec)

    def _guard_unary(self, method: MethodDescriptor, handler: UnaryHandler) -> UnaryHandler:
        async def call(request: object, context: Context) -> Message:
            try:
                with self._observed(method), self._admitted(method, context):
                    return await handler(_readable(request), context)
            except Exception as error:
                await _fail(method, context, error)

        return call

    def _guard_stream(self, method: MethodDescriptor, handler: StreamHandler) -> StreamHandler:
        async def call(request: object, context: Context) -> AsyncIterator[Message]:
            try:
                with self._observed(method), self._admitted(method, context):
                    async for response in handler(_readable(request), context):
                        yield response
            except Exception as error:
                await _fail(method, context, error)

        return call

    @contextlib.contextmanager
    def _observed(self, method: MethodDescriptor) -> Iterator[None]:
        began = time.perf_counter()
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
            self._observer.call_ended(method.name, code.name, time.perf_counter() - began)

    @contextlib.contextmanager
    def _admitted(self, method: MethodDescriptor, context: Context) -> Iterator[None]:
        if self._access is not None:
            self._access.check(ROLE_OF_METHOD[method.name], context.invocation_metadata() or ())
        if self._calls >= self._max_calls:
            raise OverloadedError("calls", f"{self._calls} running", "try again a little later")
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1


def _readable(request: object) -> object:
    if isinstance(request, Unreadable):
        raise request.error
    return request


async def _fail(method: MethodDescriptor, context: Context, error: Exception) -> NoReturn:
    if not isinstance(error, PromptyardError):
        # Frames, but neither the message nor values: those may hold a caller's text.
        _log.error(
            "call failed",
            method=method.full_name,
            error=type(error).__name__,
            frames="".join(traceback.format_tb(error.__traceback__)),
        )
    ending = failure(error)
    await context.abort(ending.code, ending.message, ending.trailers)
