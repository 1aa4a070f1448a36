"""Settings of `promptyard serve` from flags, environment and a file, in this order."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.main import get_command
from typer.testing import CliRunner

from router.settings import DEFAULT_LISTEN, ServerSettings
from trainer.cli import app

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> Path:
        path = tmp_path / "server.yaml"
        path.write_text(text)
        return path

    return written


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def settings(*arguments: object) -> Any:
    """What a server would be started with. The listening port is left to choose."""
    result = serve("--check", "--json", "--listen", "127.0.0.1:0", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = serve("--check", "--listen", "127.0.0.1:0", *arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def test_without_anything_the_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMPTYARD_HOME", raising=False)
    found = settings()
    default = ServerSettings(home=Path(found["home"]), listen="127.0.0.1:0")
    assert found["limits"]["max_text_bytes"] == default.limits.max_text_bytes == 32768
    assert found["encoder_threads"] == default.encoder_threads
    assert found["max_calls"] == default.max_calls
    assert (found["metrics"], found["tokens"], found["tls"]) == (None, None, None)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("max-calls: 3\nthreads: 3\npoll_seconds: 3\n")
    monkeypatch.setenv("PROMPTYARD_MAX_CALLS", "2")
    monkeypatch.setenv("PROMPTYARD_THREADS", "2")
    found = settings("--config", path, "--max-calls", 1)
    assert found["max_calls"] == 1
    assert found["encoder_threads"] == 2
    assert found["poll_seconds"] == 3


def test_the_file_may_come_from_the_environment(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTYARD_CONFIG", str(write("route-only: yes\ninsecure: true\n")))
    found = settings()
    assert found["base_model"] is None
    assert found["insecure"] is True


def test_paths_are_relative_to_the_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "tokens.yaml").write_text("tokens: []")
    found = settings("--config", write("home: catalog\ntokens: tokens.yaml\n"))
    assert found["home"] == str(tmp_path / "catalog")
    assert found["tokens"] == str(tmp_path / "tokens.yaml")
    assert settings("--config", write("home: /srv/catalog\n"))["home"] == "/srv/catalog"


def test_an_empty_file_changes_nothing(write: Write) -> None:
    assert settings("--config", write("# nothing yet\n")) == settings()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("max-cals: 7", "server.yaml: max-cals: no such setting; the settings are base_model,"),
        ("config: other.yaml", "server.yaml: config: no such setting"),
        ("check: true", "server.yaml: check: no such setting"),
        ("max-calls: [1, 2]", "server.yaml: max-calls: [1, 2]; give one value"),
        ("max-calls:", "server.yaml: max-calls: None; give one value"),
        ("- max-calls", "server.yaml: list; give lines of 'KEY: VALUE'"),
        ("max-calls: [", "server.yaml: no YAML"),
        ("max-calls: many", "'--max-calls'"),
        ("max-calls: 0", "'--max-calls'"),
        ("tokens: none.yaml", "none.yaml: No such file"),
        ("metrics: nonsense", "metrics: nonsense; give HOST:PORT"),
        ("tls-cert: chain.pem", "--tls-key: missing; give a certificate and its key"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(write: Write, text: str, problem: str) -> None:
    assert problem in refused("--config", write(text))


def test_a_file_that_is_missing_too_large_or_no_text_is_refused(
    write: Write, tmp_path: Path
) -> None:
    assert "none.yaml: No such file" in refused("--config", tmp_path / "none.yaml")
    assert "over 1 MiB" in refused("--config", write("#" * ((1 << 20) + 1)))
    path = write("")
    path.write_bytes(b"home: caf\xe9")
    assert "UTF-8" in refused("--config", path)


def test_a_check_looks_at_the_ports(write: Write) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "Address already in use" in refused("--config", write(f"metrics: '{address}'"))


def test_a_check_shows_people_the_settings() -> None:
    shown = serve("--check", "--listen", "127.0.0.1:0", "--max-text-bytes", 999).stdout
    assert "limits.max_text_bytes" in shown
    assert "999" in shown


def test_a_larger_batch_gets_a_queue_that_can_hold_it() -> None:
    found = settings("--max-batch-texts", 5000)
    assert found["limits"]["max_batch_texts"] == 5000
    assert found["routing_batches"]["queue_items"] >= 5000


def test_every_setting_can_come_from_the_environment() -> None:
    command = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    ours = [p for p in command.params if p.name not in ("check", "as_json", "help")]
    assert len(ours) >= 15
    for parameter in ours:
        assert str(parameter.envvar).startswith("PROMPTYARD_"), parameter.name
    listen = next(p for p in ours if p.name == "listen")
    assert listen.default == DEFAULT_LISTEN
