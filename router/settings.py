"""The server's settings: one frozen value, made once by whoever starts it."""

from __future__ import annotations

import ipaddress
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from router.batching import BatchLimits
from router.errors import InvalidInputError
from router.limits import Limits

DEFAULT_LISTEN = "127.0.0.1:50051"
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
FAST_ENCODER = "fast"
DEFAULT_MAX_TENANTS = 32
MAX_WORKERS = 64
DEFAULT_BASE_MODEL = str(Path(__file__).parent / "models" / "base")

# A batch of the embedded encoder takes about 25 ms, one of the embedded base model a quarter of a
# second. Long texts are encoded no faster in larger batches, and each would wait for all of it.
ROUTING_BATCHES = BatchLimits(
    queue_items=1024, batch_items=32, batch_tokens=1024, queue_seconds=2.0
)
# The fast one is done with 256 texts in that time, and long ones share no padding.
FAST_ROUTING_BATCHES = BatchLimits(
    queue_items=8192, batch_items=256, batch_tokens=65_536, queue_seconds=2.0
)
ANSWER_BATCHES = BatchLimits(queue_items=128, batch_items=32, batch_tokens=4096, queue_seconds=30.0)

_LAST_PORT = 65535
# HOST:PORT, where an IPv6 host stands in brackets.
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: the server's chain and key, and the authority that clients must be of, if any."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """How a server is set up.

    `encoder` and `base_model` are names or folders; without `base_model` the server only routes.
    A device is `cpu`, `cuda` or `auto`. Times are in seconds. `metrics` is the HOST:PORT that
    Prometheus scrapes; without it nothing is counted. `traces` is the URL of the collector that
    traces go to, of a `traces_share` of the calls; without it there are none. Without `tokens` (a
    file, see `router.access`) everybody who reaches the server may call everything. Without `tls`
    only this machine can reach it, unless `insecure` says that others may. `cache_mib` bounds the
    memory for embeddings of texts that were seen lately; 0 remembers none. `cascade` lets the fast
    encoder decide what it is sure of (`router.cascade`). `log_calls` logs one line a call.
    `decision_log` is the file for a `decision_log_share` of all decisions (see
    `router.decision_log`), which takes `decision_log_mib` at most. Tokens may name up to
    `max_tenants` tenants; queues, `max_calls` and `cache_mib` are each one's. Of several `workers`
    each is a process with all of that of its own, and tells `metrics` at a port of its own: the one
    that is named, the next one, and so on.
    """

    home: Path
    listen: str = DEFAULT_LISTEN
    metrics: str | None = None
    traces: str | None = None
    traces_share: float = 1.0
    tokens: Path | None = None
    tls: TlsFiles | None = None
    insecure: bool = False
    workers: int = 1
    encoder: str = DEFAULT_ENCODER
    base_model: str | None = DEFAULT_BASE_MODEL
    encoder_device: str = "auto"
    encoder_threads: int = 2
    base_model_device: str = "auto"
    base_model_threads: int = 2
    poll_seconds: float = 0.25
    shutdown_seconds: float = 10.0
    max_calls: int = 1000
    max_connection_calls: int = 200
    max_tenants: int = DEFAULT_MAX_TENANTS
    cache_mib: float = 64.0
    cascade: bool = False
    decision_log: Path | None = None
    decision_log_share: float = 1.0
    decision_log_mib: float = 64.0
    log_calls: bool = False
    limits: Limits = field(default_factory=Limits)
    routing_batches: BatchLimits = ROUTING_BATCHES
    answer_batches: BatchLimits = ANSWER_BATCHES

    def __post_init__(self) -> None:
        """Raises InvalidInputError: a value that no server could work with."""
        if self.cascade and self.encoder == FAST_ENCODER:
            raise InvalidInputError(
                "cascade", f"with the encoder {self.encoder}", "leave it out: all is decided fast"
            )
        if self.cascade and self.decision_log is not None:
            raise InvalidInputError(
                "cascade",
                "with a decision log",
                "leave one of them out: drift cannot compare the scores of two encoders",
            )
        _check_address("listen", self.listen)
        if self.tls is None and not self.insecure and not _is_loopback(self.listen):
            raise InvalidInputError(
                "listen",
                self.listen,
                "give --tls-cert and --tls-key, or --insecure for a network that you trust:"
                " others can reach this address",
            )
        if self.metrics is not None:
            _check_address("metrics", self.metrics)
        if not 1 <= self.workers <= MAX_WORKERS:
            raise InvalidInputError("workers", self.workers, f"give 1 to {MAX_WORKERS}")
        if self.workers > 1 and sys.platform != "linux":
            raise InvalidInputError(
                "workers",
                f"{self.workers} on {sys.platform}",
                "give 1: only on Linux can processes share a port and its calls",
            )
        if self.routing_batches.queue_items < self.limits.max_batch_texts:
            raise InvalidInputError(
                "routing_batches.queue_items",
                self.routing_batches.queue_items,
                f"let the queue hold a whole batch of {self.limits.max_batch_texts} texts",
            )

    def of_worker(self, number: int, listen: str) -> ServerSettings:
        """What worker `number` (0, 1, ...) is set up with, on the address that all of them share.

        Each has a port of its own for metrics.

        Raises:
            InvalidInputError: there is no such port.
        """
        if self.metrics is None:
            return replace(self, listen=listen)
        host, _, port = self.metrics.rpartition(":")
        # Port 0 is any free one, for each of them.
        mine = int(port) + number if int(port) else 0
        if mine > _LAST_PORT:
            raise InvalidInputError(
                "metrics", self.metrics, f"give a port with {self.workers - 1} more above it"
            )
        return replace(self, listen=listen, metrics=f"{host}:{mine}")


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_address(field: str, value: str) -> None:
    address = _ADDRESS.fullmatch(value)
    if address is None or int(address[1]) > _LAST_PORT:
        raise InvalidInputError(field, value, "give HOST:PORT, e.g. 127.0.0.1:50051 (port 0: any)")
