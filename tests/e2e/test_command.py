"""The `promptyard` command as people and programs use it, with the real encoder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import Result
from typer.testing import CliRunner

from router.server import check_address
from router.settings import TlsFiles
from tests.fakes import FakeLanguageModel, make_router, make_settings, running_server
from tests.unit.small_models import save_small_model
from trainer.cli import app
from trainer.cli.console import quiet_libraries

TASKS = {
    "weather": [f"will it {what} in {where}" for what in ("rain", "snow") for where in "ABCDEF"],
    "banking": [
        f"block my {what} card {where}" for what in ("credit", "bank") for where in "UVWXYZ"
    ],
}
COMMANDS = [
    *("register", "list", "show", "retire", "restore", "rollback", "serve", "route", "generate"),
    *("inspect", "export", "status", "top", "token", "demo"),
    *("base show", "base check"),
    *("evaluate routing", "evaluate answers", "evaluate stream"),
    *("policy show", "policy set", "encoders"),
]


def promptyard(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(result: Result, exit_code: int = 0) -> Any:
    """What a program gets: stdout holds one JSON document and nothing else."""
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def write(path: Path, inputs: list[str]) -> Path:
    path.write_text("".join(json.dumps({"input": text, "output": "x"}) + "\n" for text in inputs))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two tasks that are only routed to."""
    folder = tmp_path_factory.mktemp("command")
    for name, inputs in TASKS.items():
        data = write(folder / f"{name}.jsonl", inputs)
        found = document(
            promptyard(
                *("register", name, "--data", data, "--no-prompt"),
                *("--home", folder / "home", "--json"),
            )
        )
        assert [task["name"] for task in found["registered"]] == [name]
    return folder / "home"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_server(make_router(model=FakeLanguageModel())) as address:
        yield address


def test_a_text_is_routed_in_process(home: Path) -> None:
    [decision] = document(
        promptyard("route", "will it rain in G", "--top-k", 1, "--home", home, "--json")
    )
    assert [candidate["task"] for candidate in decision["candidates"]] == ["weather"]
    assert decision["revision"] == 2


def test_the_home_may_come_from_the_environment(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTYARD_HOME", str(home))
    assert {task["name"] for task in document(promptyard("list", "--json"))["tasks"]} == set(TASKS)
    assert document(promptyard("show", "weather", "--json"))["live_revision"] == 1
    [decision] = document(promptyard("route", "will it snow in H", "--top-k", 1, "--json"))
    assert decision["candidates"][0]["task"] == "weather"


def test_the_home_may_stand_before_the_command_and_that_of_the_command_wins(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTYARD_HOME", str(tmp_path))
    before = document(promptyard("--home", home, "list", "--json"))
    assert before == document(promptyard("list", "--home", home, "--json"))
    assert before == document(promptyard("--home", tmp_path, "list", "--home", home, "--json"))
    assert promptyard("--home", home, "list", "--home", tmp_path).exit_code == 1


def test_a_task_can_be_retired_and_restored(home: Path) -> None:
    for action, live in (("retire", {"weather"}), ("restore", set(TASKS))):
        document(promptyard(action, "banking", "--home", home, "--json"))
        tasks = document(promptyard("list", "--home", home, "--json"))["tasks"]
        assert {task["name"] for task in tasks} == live


def test_a_policy_is_set_for_the_catalog_or_for_one_call(home: Path, address: str) -> None:
    def used(*flags: str) -> tuple[str, str | None, str]:
        text = "who was the third king of france"
        [decision] = document(promptyard("route", text, "--home", home, "--json", *flags))
        return decision["outcome"], decision["used_task"], decision["use"]

    assert used() == ("unknown", None, "abstained")
    set_to = promptyard("policy", "set", "--on-unknown", "fallback:weather", "--home", home)
    assert set_to.exit_code == 0, set_to.output
    shown = document(promptyard("policy", "show", "--home", home, "--json"))
    assert (shown["on_unknown"], shown["fallback_missing"]) == ("fallback:weather", False)
    assert used() == ("unknown", "weather", "fallback")
    assert used("--on-unknown", "abstain") == ("unknown", None, "abstained")
    assert used("--on-unknown", "fallback:banking") == ("unknown", "banking", "fallback")
    retired = promptyard("retire", "weather", "--home", home)
    assert "what the catalog's policy falls back to" in retired.stderr.replace("\n", " ")
    assert used() == ("unknown", None, "fallback_missing")
    assert "weather is not live" in promptyard("policy", "show", "--home", home).stdout
    document(promptyard("restore", "weather", "--home", home, "--json"))
    document(promptyard("policy", "set", "--on-unknown", "abstain", "--home", home, "--json"))
    assert used() == ("unknown", None, "abstained")


def test_a_decision_is_explained_and_its_closest_row_found_in_the_file(home: Path) -> None:
    data = home.parent / "weather.jsonl"
    text = TASKS["weather"][5]
    [found] = document(promptyard("route", text, "--explain", "--home", home, "--json"))
    best = found["explanation"]["candidates"][0]
    assert best["task"] == "weather"
    assert sum(best["terms"].values()) == pytest.approx(best["score"], abs=1e-3)
    row = best["examples"][0]["row"]
    arguments = ("show", "weather", "--data", data, "--home", home, "--json")
    assert document(promptyard(*arguments, "--row", row))["input"] == text
    people = promptyard("route", text, "--explain", "--home", home)
    assert found["explanation"]["sentence"][:20] in people.stdout
    assert "discriminant" in people.stdout
    for bad, field in ((("--row", 12), "--row"), ((), "--row")):
        error = document(promptyard(*arguments, *bad), exit_code=2)["error"]
        assert error["field"] == field
    other = ("show", "weather", "--data", home.parent / "banking.jsonl", "--row", 0)
    error = document(promptyard(*other, "--home", home, "--json"), exit_code=2)["error"]
    assert (error["field"], "registered from" in error["remedy"]) == ("--data", True)


def test_a_task_that_comes_back_and_takes_others_rows_is_refused(
    home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "home"
    # Of tasks with the same rows the first by name gets them.
    data = write(tmp_path / "wind.jsonl", TASKS["weather"])
    flags = ("--no-prompt", "--home", folder, "--json")
    document(promptyard("register", "weather", "--data", data, *flags))
    document(promptyard("retire", "weather", "--home", folder, "--json"))
    for name in ("wind", "banking"):
        rows = write(tmp_path / f"{name}.jsonl", TASKS.get(name, TASKS["weather"]))
        document(promptyard("register", name, "--data", rows, *flags))
    error = document(promptyard("restore", "weather", "--home", folder, "--json"), exit_code=3)
    assert error["error"]["reason"] == "REGISTRATION_REFUSED"
    people = promptyard("restore", "weather", "--home", folder)
    assert people.exit_code == 3
    assert "wind@1" in people.stdout
    forced = promptyard("restore", "weather", "--force", "a trial", "--home", folder, "--json")
    assert document(forced)["gate"]["taken"][0]["task"] == "wind@1"


def test_a_policy_goes_to_the_server_with_the_call(address: str) -> None:
    flags = ("--on-unknown", "fallback:weather", "--server", address, "--json")
    [answer] = document(promptyard("generate", "snow on tax law", *flags))
    assert (answer["outcome"], answer["used_task"]) == ("unknown", "weather")
    assert answer["answer"] == "snow"
    [decision] = document(promptyard("route", "snow on tax law", *flags))
    assert (decision["task"], decision["used_task"]) == (None, "weather")


@pytest.mark.parametrize(
    ("flags", "field", "code"),
    [
        (("--on-unknown", "guess"), "--on-unknown", 2),
        (("--on-unknown", "fallback:nobody"), "fallback task", 1),
        (("--head", "guess"), "head", 2),
        ((), "policy", 2),
    ],
)
def test_a_policy_that_cannot_be_is_refused_by_field(
    home: Path, flags: tuple[str, ...], field: str, code: int
) -> None:
    before = document(promptyard("policy", "show", "--home", home, "--json"))
    result = promptyard("policy", "set", *flags, "--home", home, "--json")
    assert document(result, exit_code=code)["error"]["field"] == field
    assert document(promptyard("policy", "show", "--home", home, "--json")) == before


def test_a_server_is_asked_where_one_is_named(address: str) -> None:
    [answer] = document(
        promptyard("generate", "the weather brings rain", "--server", address, "--json")
    )
    assert (answer["task"], answer["answer"], answer["finish"]) == ("weather", "rain", "label")
    assert answer["usage"] == {
        "input_tokens": 4,
        "prompt_tokens": 4,
        "output_tokens": 1,
        "truncated": False,
    }


def test_bad_input_gives_a_program_the_same_error_with_and_without_a_server(
    home: Path, address: str
) -> None:
    alone = document(promptyard("route", " ", "--home", home, "--json"), exit_code=2)
    remote = document(promptyard("route", " ", "--server", address, "--json"), exit_code=2)
    assert alone == remote
    assert alone["error"]["reason"] == "INVALID_INPUT"
    assert alone["error"]["field"] == "texts[0]"
    assert alone["error"]["remedy"] == "send a text that is not empty"


def test_an_unknown_task_of_a_server_is_told_with_the_remedy(address: str) -> None:
    result = promptyard("generate", "rain", "--task", "none", "--server", address, "--json")
    error = document(result, exit_code=1)["error"]
    assert (error["reason"], error["field"], error["value"]) == ("TASK_NOT_FOUND", "task", "none")
    assert "ListTasks" in error["remedy"]


def test_a_server_that_is_not_there_is_told_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    error = document(promptyard("status", "--server", nobody, "--json"), exit_code=1)["error"]
    assert (error["reason"], error["field"]) == ("UNAVAILABLE", "server")
    assert "promptyard serve" in error["remedy"]
    people = promptyard("status", "--server", nobody)
    assert people.exit_code == 1
    assert "promptyard serve" in people.stderr


def test_a_token_that_was_made_opens_the_server_that_knows_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = document(promptyard("token", "shop", "--role", "route", "--json"))
    tokens = tmp_path / "tokens.yaml"
    tokens.write_text(json.dumps({"tokens": [made["entry"]]}))
    settings = make_settings(tokens=tokens)
    with running_server(make_router(model=FakeLanguageModel()), settings) as address:
        ask = ("route", "weather", "--server", address, "--json")
        error = document(promptyard(*ask), exit_code=1)["error"]
        assert (error["reason"], error["value"]) == ("UNAUTHENTICATED", "missing")
        document(promptyard(*ask, "--token", made["token"]))
        monkeypatch.setenv("PROMPTYARD_TOKEN", made["token"])
        document(promptyard(*ask))
        status = promptyard("status", "--server", address, "--json")
        assert document(status, exit_code=1)["error"]["reason"] == "PERMISSION_DENIED"


def test_a_new_token_is_shown_with_the_entry_for_the_server() -> None:
    shown = promptyard("token", "shop", "--role", "route", "--role", "read").stdout
    assert "promptyard-" in shown
    assert "sha256: " in shown
    assert promptyard("token", "shop").exit_code == 2
    assert promptyard("token", "shop", "--role", "admin").exit_code == 2


def test_a_file_of_tokens_that_cannot_be_used_is_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    result = promptyard(
        *("serve", "--listen", "127.0.0.1:0", "--tokens", tmp_path / "none.yaml"),
        *("--home", tmp_path, "--encoder", "none/such"),
    )
    assert result.exit_code == 2
    assert "none.yaml: No such file" in " ".join(result.stderr.split())


def test_a_server_can_be_asked_over_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    ca, chain, key = (tmp_path / name for name in ("ca.pem", "chain.pem", "key.pem"))
    authority.cert_pem.write_to_path(str(ca))
    certificate.cert_chain_pems[0].write_to_path(str(chain))
    certificate.private_key_pem.write_to_path(str(key))
    settings = make_settings(tls=TlsFiles(chain, key))
    with running_server(make_router(), settings) as address:
        [decision] = document(
            promptyard("route", "weather", "--server", address, "--tls-ca", ca, "--json")
        )
        assert decision["task"] == "weather"
        plain = document(promptyard("route", "weather", "--server", address, "--json"), 1)
        assert "--tls" in plain["error"]["remedy"]


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["serve", "--tls-cert", "a.pem"], "--tls-key: missing"),
        (["serve", "--tls-key", "a.pem"], "--tls-cert: missing"),
        (["serve", "--tls-client-ca", "a.pem"], "--tls-cert: missing"),
        (["status", "--tls-cert", "a.pem"], "--tls-key: missing"),
        (["status", "--tls-ca", "none.pem"], "none.pem: No such file or directory"),
    ],
)
def test_a_file_for_tls_that_is_missing_is_named(arguments: list[str], missing: str) -> None:
    result = promptyard(*arguments)
    assert result.exit_code == 2
    assert missing in " ".join(result.stderr.split())


def test_what_was_not_registered_is_named_with_its_reason(home: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", TASKS["weather"])
    result = promptyard("register", "weather", "--data", data, "--home", home)
    assert result.exit_code == 1
    assert "weather was not registered (TASK_EXISTS)" in result.stderr
    assert "--revise" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "NAME: missing; give either"),
        (["refunds"], "--data: missing; give a file"),
        (["refunds", "--data", "a.jsonl", "--manifest", "b.yaml"], "give either a task's NAME"),
        (["refunds", "--data", "none.jsonl"], "none.jsonl: No such file"),
        (["b@d", "--data", "none.jsonl"], "task name: 'b@d'; use letters"),
        (["refunds", "--data", "none.jsonl", "--steps", "0"], "No such file"),
        (["--manifest", "none.yaml"], "none.yaml: No such file"),
    ],
)
def test_a_bad_registration_says_what_is_wrong_and_leaves_with_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = promptyard("register", *arguments, "--home", tmp_path / "home")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "home").exists()


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = promptyard(
            *("serve", "--listen", address, "--home", tmp_path, "--encoder", "none/such")
        )
    assert result.exit_code == 2
    assert f"listen: {address} (Address already in use)" in " ".join(result.stderr.split())


def test_a_port_for_metrics_that_is_taken_is_refused_as_early(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = promptyard(
            *("serve", "--listen", "127.0.0.1:0", "--metrics", address),
            *("--home", tmp_path, "--encoder", "none/such"),
        )
    assert result.exit_code == 2
    assert f"metrics: {address} (Address already in use)" in " ".join(result.stderr.split())


@pytest.mark.parametrize("listen", ["203.0.113.9:50051", "no.such.host.invalid:50051"])
def test_an_address_of_another_machine_is_refused(listen: str, tmp_path: Path) -> None:
    serve = ("serve", "--listen", listen, "--home", tmp_path, "--encoder", "none/such")
    assert "--insecure" in promptyard(*serve).stderr
    result = promptyard(*serve, "--insecure")
    assert result.exit_code == 2
    assert f"listen: {listen} (" in " ".join(result.stderr.split())
    assert "an address of this machine" in " ".join(result.stderr.split())


def test_any_free_port_can_be_asked_for() -> None:
    check_address("127.0.0.1:0")


def test_libraries_write_no_lines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRPC_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    quiet_libraries()
    assert os.environ["GRPC_VERBOSITY"] == "NONE"
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")  # whoever asks for more gets it
    quiet_libraries()
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG"


def test_the_command_says_its_version_and_lists_its_commands() -> None:
    assert promptyard("--version").stdout == f"promptyard {version('promptyard')}\n"
    shown = promptyard("--help").stdout
    assert "Route inputs to soft prompts" in shown
    assert all(command.split()[0] in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_that_names_no_place_on_this_machine(command: str) -> None:
    result = promptyard(*command.split(), "--help")
    assert result.exit_code == 0
    assert str(Path(__file__).parents[2]) not in "".join(result.output.split())
    assert len(result.output.splitlines()) > 5


def test_flags_win_over_the_manifest_and_that_over_the_defaults(tmp_path: Path) -> None:
    base = save_small_model("bart", tmp_path / "bart")
    rows = [{"input": text, "output": "yn"[n % 2]} for n, text in enumerate(TASKS["weather"])]
    data = tmp_path / "weather.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = tmp_path / "tasks.yaml"
    manifest.write_text(
        "tasks: [{name: weather, data: weather.jsonl, instruction: good, force: a test}]\n"
        "tuning: {length: 4, steps: 9, method: prefix, clip_norm: 1.0}\n"
    )
    arguments = ("register", "--manifest", manifest, "--home", tmp_path / "home")
    options = ("--base-model", base, "--steps", 2, "--seeds", 2, "--json")
    [task] = document(promptyard(*arguments, *options))["registered"]
    assert (task["prompt"]["tokens"], task["prompt"]["steps"]) == (4, 2)
    assert task["prompt"]["method"] == "prefix"
    settings = task["prompt"]["settings"]
    assert (settings["clip_norm"], settings["seeds"], settings["learning_rate"]) == (1.0, 2, 0.1)
    manifest.write_text("tasks: [{name: other, data: weather.jsonl}]\ntuning: {lenght: 4}\n")
    error = document(promptyard(*arguments, *options), exit_code=2)["error"]
    assert error["field"] == "tuning setting"
    assert error["value"] == "lenght"
