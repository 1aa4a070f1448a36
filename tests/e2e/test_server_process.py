"""The server as a process of its own, with the embedded encoder: start, ready line, shutdown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.client import RouterClient

SERVE = """
import sys
from pathlib import Path
from router import bootstrap
from router.settings import ServerSettings
bootstrap.log_to_stderr()
settings = ServerSettings(
    home=Path(sys.argv[1]), listen="127.0.0.1:0", metrics="127.0.0.1:0", base_model=None
)
bootstrap.serve(settings, lambda line: print(line, flush=True))
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def scrape(process: subprocess.Popen[str]) -> str:
    """The metrics, from the port that the log names."""
    assert process.stderr is not None
    while (line := json.loads(process.stderr.readline()))["event"] != "metrics":
        pass
    with urllib.request.urlopen(f"http://{line['address']}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_process_says_when_it_is_ready_and_stops_cleanly(
    process: subprocess.Popen[str], stop: signal.Signals
) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    listening, rest = line.split(", ", 1)
    assert rest == "revision 0, 0 tasks\n"
    with RouterClient(listening.removeprefix("listening on ")) as client:
        assert client.route("is it going to rain?").task is None
        assert client.route("is it going to rain?").task is None
        status = client.status()
        assert status.encoder.name == "all-MiniLM-L6-v2"
        assert not status.base_model.name
        metrics = scrape(process)
        assert 'promptyard_revision{tenant=""} 0.0' in metrics
        assert 'promptyard_cache_texts_total{result="hit",tenant=""} 1.0' in metrics
        process.send_signal(stop)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert output == ""
    assert "Traceback" not in errors
