"""Sockets that hold an address without listening at it."""

from __future__ import annotations

import socket


def bound_socket(listen: str, option: int) -> socket.socket:
    """A socket bound to HOST:PORT, with `option` (such as `SO_REUSEADDR`) set.

    Raises:
        OSError: no address of this machine, taken, or not ours to take.
    """
    host, _, port = listen.rpartition(":")
    found = socket.getaddrinfo(
        host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
