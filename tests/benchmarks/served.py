"""Server processes to measure."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
_START_SECONDS = 120.0
_STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server process: its address, and where it is asked for metrics (empty: nowhere)."""

    address: str
    process: subprocess.Popen[str]
    metrics: str = ""

    def resident_mib(self) -> float:
        """Its resident memory, as the kernel counts it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024

    def cpu_seconds(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        user, system = fields.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def scrape(self) -> dict[tuple[str, str], float]:
        """Sums and counts of its histograms, by name of the sample and method or stage."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            (sample.name, sample.labels.get("stage") or sample.labels.get("method", "")): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.endswith(("_sum", "_count"))
        }


@contextlib.contextmanager
def serving(home: Path, *flags: str, metrics: bool = False) -> Iterator[Served]:
    """`promptyard serve` as a process of its own, without the cache of embeddings.

    Texts come again and again in a benchmark, and it is their work that is measured. Flags that
    are given here win.
    """
    command = [sys.executable, "-m", "trainer.cli", "serve", "--home", str(home)]
    command += ["--listen", "127.0.0.1:0", "--cache-mib", "0"]
    command += ["--metrics", "127.0.0.1:0"] if metrics else []
    log = home / "server.log"
    with log.open("a") as errors:
        process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    try:
        address = _address(process, log)
        yield Served(address, process, _metrics_address(log) if metrics else "")
    finally:
        stop(process)


@contextlib.contextmanager
def serving_nothing() -> Iterator[Served]:
    """The empty gRPC service as a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.empty_server"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield Served(_address(process, None), process)
    finally:
        stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    """End a server in its own way, or after a while in ours."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _address(process: subprocess.Popen[str], log: Path | None) -> str:
    """From the line that a server prints when calls can come."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("listening on "):
        raise RuntimeError(f"the server did not start; {log or 'stderr'} says why")
    return line.removeprefix("listening on ").strip().split(",")[0]


def _metrics_address(log: Path) -> str:
    """From the log, which names the port that was free."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        for line in reversed(log.read_text(encoding="utf-8").splitlines()):
            if '"metrics"' in line and "address" in line:
                return str(json.loads(line)["address"])
        time.sleep(0.05)
    raise RuntimeError(f"{log} names no port for metrics")
