"""A router for each tenant: snapshot, index, queues and caches of its own, over shared models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import structlog

from router.errors import CatalogError, PromptyardError
from router.routing import Router

_SECONDS_BETWEEN_TRIES = 2.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Opened:
    """What came of opening a tenant: its router, or None where its catalog cannot be served."""

    router: Router | None
    closing: ExitStack
    at: float

    @property
    def is_to_be_tried_again(self) -> bool:
        return self.router is None and time.monotonic() - self.at > _SECONDS_BETWEEN_TRIES


class TenantRouters:
    """The routers of a server. Belongs to one event loop; they are opened in threads.

    The empty name stands for the home's own catalog, whose router is open from the start. A tenant
    whose catalog cannot be served is tried again from time to time, and hurts no other.
    """

    def __init__(
        self, own: Router, open_tenant: Callable[[str], AbstractContextManager[Router]]
    ) -> None:
        """`open_tenant` is called in a thread; leaving its context closes the router."""
        self.own = own
        self._open_tenant = open_tenant
        self._opening: dict[str, asyncio.Task[_Opened]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._to_close: set[ExitStack] = set()
        self._problems: dict[str, str] = {}

    async def router(self, tenant: str) -> Router:
        """The router of a tenant that a token names; it is opened where it is not open yet.

        Raises:
            CatalogError: the tenant's catalog cannot be served.
        """
        if not tenant:
            return self.own
        # The opening goes on where its caller leaves: it is the next one's, too.
        opened = await asyncio.shield(self._opened(tenant))
        if opened.router is None:
            raise CatalogError("catalog", "cannot be served", "see the log of the server")
        return opened.router

    def look(self) -> dict[str, Router | None]:
        """The routers by tenant, None for a catalog that cannot be served. Any thread may look."""
        done = [(tenant, task) for tenant, task in list(self._opening.items()) if task.done()]
        return {"": self.own} | {
            tenant: task.result().router for tenant, task in done if not task.cancelled()
        }

    def follow(self, tenants: Collection[str], busy: Collection[str]) -> None:
        """Begin to open `tenants`, and to close those that are neither among them nor `busy`."""
        for tenant in tenants:
            self._opened(tenant)
        for tenant in [name for name in self._opening if name not in {*tenants, *busy}]:
            closing = asyncio.create_task(self._close(tenant, self._opening.pop(tenant)))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def ready(self) -> None:
        """Wait until all that are being opened are open, or are known to be unfit."""
        if self._opening:
            await asyncio.wait(self._opening.values())

    def close(self) -> None:
        """Close the routers of all tenants, when the event loop has ended."""
        while self._to_close:
            self._to_close.pop().close()

    def _opened(self, tenant: str) -> asyncio.Task[_Opened]:
        task = self._opening.get(tenant)
        if task is None or (task.done() and task.result().is_to_be_tried_again):
            task = asyncio.create_task(asyncio.to_thread(self._open, tenant))
            self._opening[tenant] = task
        return task

    def _open(self, tenant: str) -> _Opened:
        """In a thread. Nothing is raised: whatever is wrong with one tenant stays with it."""
        closing = ExitStack()
        try:
            router = closing.enter_context(self._open_tenant(tenant))
        except PromptyardError as error:
            if self._problems.get(tenant) != str(error):
                _log.warning("tenant not served", tenant=tenant, problem=str(error))
            self._problems[tenant] = str(error)
            return _Opened(None, closing, time.monotonic())
        except Exception:
            _log.exception("unexpected error while opening a tenant", tenant=tenant)
            return _Opened(None, closing, time.monotonic())
        self._problems.pop(tenant, None)
        self._to_close.add(closing)
        _log.info("tenant served", tenant=tenant)
        return _Opened(router, closing, time.monotonic())

    async def _close(self, tenant: str, opening: asyncio.Task[_Opened]) -> None:
        opened = await opening
        self._to_close.discard(opened.closing)
        await asyncio.to_thread(opened.closing.close)
        _log.info("tenant no longer served", tenant=tenant)


def only(router: Router) -> TenantRouters:
    """The routers of a server without tenants."""

    def refuse(tenant: str) -> AbstractContextManager[Router]:
        raise CatalogError("tenant", tenant, "this server has none")

    return TenantRouters(router, refuse)
