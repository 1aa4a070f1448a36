"""The gRPC server: ports, services, health, reflection and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import structlog
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from router.access import TokenFile
from router.edge import Edge
from router.errors import InvalidInputError
from router.servicers import RouterServicer, ServerFacts, TaskServicer
from router.settings import ServerSettings
from router.sockets import bound_socket
from router.tenant_routers import TenantRouters
from router.tls import server_credentials
from router.tracing import Tracing
from router.v1 import router_service_pb2, task_service_pb2

_ROUTER = router_service_pb2.DESCRIPTOR.services_by_name["RouterService"]
_TASKS = task_service_pb2.DESCRIPTOR.services_by_name["TaskService"]
# The empty name is the server's overall health. A task that is out of service does not change it,
# nor does a catalog revision that cannot be served: that has a name of its own. It is of the home's
# own catalog: health needs no token, and so must not know tenants.
CATALOG_HEALTH = "promptyard.catalog"
_HEALTH_NAMES = ("", _ROUTER.full_name, _TASKS.full_name)

# Up to this many times the limit of a request, our own error answers a message that is too large.
# Beyond it gRPC refuses the message unread, without details.
_TRANSPORT_SLACK = 2
_KEEPALIVE_SECONDS = 30
_MIN_CLIENT_PING_SECONDS = 10

_log = structlog.get_logger(__name__)


def check_address(listen: str, field: str = "listen") -> None:
    """Refuse an address that cannot be listened on, before models are loaded for it.

    Raises:
        InvalidInputError: no address of this machine, taken, or not ours to take.
    """
    try:
        # As gRPC does it: connections of a server that has just ended are no hindrance.
        bound_socket(listen, socket.SO_REUSEADDR).close()
    except OSError as error:
        raise InvalidInputError(
            field,
            f"{listen} ({error.strerror or error})",
            "choose a free port and an address of this machine",
        ) from error


class RouterServer:
    """Serves routers on one address. Belongs to the event loop that starts it."""

    def __init__(
        self,
        routers: TenantRouters,
        settings: ServerSettings,
        version: str,
        tracing: Tracing | None = None,
    ) -> None:
        self._routers = routers
        self._settings = settings
        self._version = version
        self._tracing = tracing
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server: aio.Server | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Begin to serve; returns the address, with the real port where port 0 was asked for.

        Raises:
            InvalidInputError: the address cannot be listened on, or tokens or certificates be
                read.
        """
        settings = self._settings
        self._server = server = aio.server(options=_options(settings))
        access = None
        if settings.tokens is not None:
            access = TokenFile(settings.tokens, settings.max_tenants)
            self._routers.follow(access.tenants(), ())
            await self._routers.ready()
        edge = Edge(
            self._routers,
            settings.max_calls,
            settings.limits.max_request_bytes,
            access,
            settings.log_calls,
            self._tracing,
        )
        facts = ServerFacts(self._version, datetime.now(UTC))
        server.add_generic_rpc_handlers(
            (
                edge.handlers(_ROUTER, lambda router: RouterServicer(router, facts)),
                edge.handlers(_TASKS, TaskServicer),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (_ROUTER.full_name, _TASKS.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME),
            server,
        )
        try:
            if settings.tls is None:
                port = server.add_insecure_port(settings.listen)
            else:
                port = server.add_secure_port(settings.listen, server_credentials(settings.tls))
        except RuntimeError:
            raise InvalidInputError(
                "listen", settings.listen, "choose a free port and an address of this machine"
            ) from None
        await server.start()
        for name in _HEALTH_NAMES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._report_catalog()
        self._watching = asyncio.create_task(self._watch(edge, access))
        return f"{settings.listen.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """Report NOT_SERVING, refuse new calls, and let the running ones finish."""
        if self._watching is not None:
            self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._server.stop(self._settings.shutdown_seconds)

    async def _watch(self, edge: Edge, access: TokenFile | None) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            await self._report_catalog()
            if access is not None:
                self._routers.follow(access.tenants(), edge.busy)

    async def _report_catalog(self) -> None:
        """The catalog's own health: NOT_SERVING while its newest revision cannot be served."""
        live = self._routers.own.live
        states = health_pb2.HealthCheckResponse
        state = states.NOT_SERVING if live.problem else states.SERVING
        await self._health.set(CATALOG_HEALTH, state)

    async def run(self, announce: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT. One line is announced when calls can come."""
        with _stop_signals() as stop:
            address = await self.start()
            snapshot = self._routers.own.live.snapshot
            tenants = len(self._routers.look()) - 1
            announce(
                f"listening on {address}, revision {snapshot.revision}, {len(snapshot.tasks)} tasks"
                + (f", {tenants} tenants" if tenants else "")
            )
            await stop.wait()
            _log.info("stopping")
            await self.stop()


@contextlib.contextmanager
def _stop_signals() -> Iterator[asyncio.Event]:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _options(settings: ServerSettings) -> list[tuple[str, int]]:
    max_message_bytes = settings.limits.max_request_bytes * _TRANSPORT_SLACK
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        # One connection cannot take all of `max_calls`: its further calls wait on its own side.
        ("grpc.max_concurrent_streams", settings.max_connection_calls),
        ("grpc.keepalive_time_ms", _KEEPALIVE_SECONDS * 1000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _MIN_CLIENT_PING_SECONDS * 1000),
        # Workers share the port on purpose; a second server would in silence, and get half of the
        # calls.
        ("grpc.so_reuseport", int(settings.workers > 1)),
    ]
