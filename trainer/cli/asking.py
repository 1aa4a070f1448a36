"""How the commands ask: a server over the network, or a router in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from router.errors import InvalidInputError
from router.settings import ServerSettings
from trainer.cli.console import fail_of_server

if TYPE_CHECKING:
    from router.client import ClientTls, RouterClient
    from router.routing import Router

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ServerAt:
    """Where a server is, and how to be let in."""

    address: str
    token: str
    tls: ClientTls | None


def server_at(
    address: str, token: str, tls: bool, ca: Path | None, cert: Path | None, key: Path | None
) -> ServerAt:
    """What the flags say of the server.

    Raises:
        InvalidInputError: a certificate without its key, or the reverse.
    """
    from router.client import ClientTls

    if (cert is None) != (key is None):
        raise InvalidInputError(
            "--tls-key" if key is None else "--tls-cert",
            "missing",
            "give a certificate and its key",
        )
    wanted = tls or ca is not None or cert is not None
    return ServerAt(address, token, ClientTls(ca, cert, key) if wanted else None)


def remote(server: ServerAt, as_json: bool, ask: Callable[[RouterClient], Result]) -> Result:
    """Ask a server; its errors end the command as those of this process do."""
    from router.client import RouterClient, RouterError

    try:
        with RouterClient(server.address, token=server.token, tls=server.tls) as client:
            return ask(client)
    except RouterError as error:
        fail_of_server(server.address, error, as_json)


def in_process(settings: ServerSettings, ask: Callable[[Router], Awaitable[Result]]) -> Result:
    """Ask a router in this process."""
    from router.bootstrap import log_to_stderr, open_router
    from router.catalog import CatalogReader

    log_to_stderr("warning")
    # A server may start before its first task; a question needs a catalog.
    CatalogReader(settings.home).close()

    async def run() -> Result:
        with open_router(settings) as router:
            return await ask(router)

    return asyncio.run(run())
