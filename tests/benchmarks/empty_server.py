"""A gRPC service that does nothing: what the transport costs by itself."""

from __future__ import annotations

import asyncio

import grpc
from grpc import aio

SERVICE = "promptyard.bench.Empty"
METHOD = f"/{SERVICE}/Call"


async def _call(request: bytes, context: object) -> bytes:
    return b""


async def _serve() -> None:
    server = aio.server()
    handlers = {"Call": grpc.unary_unary_rpc_method_handler(_call)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"listening on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
