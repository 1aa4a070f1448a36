"""Tokens: what a file of them may hold, and whom a real server lets in with which role."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.access import TokenFile, new_token, read_tokens
from router.client import RouterClient, RouterError
from router.errors import ForbiddenError, InvalidInputError, UnauthenticatedError
from router.roles import ROLE_OF_METHOD, Role
from router.v1 import router_service_pb2, task_service_pb2
from tests.fakes import FakeLanguageModel, make_router, make_settings, running_server

DIGEST = hashlib.sha256(b"secret").hexdigest()


def write(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump({"tokens": list(entries)}))
    return path


def entry(name: str, token: str, *roles: str) -> dict[str, object]:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return {"name": name, "sha256": digest, "roles": list(roles)}


def bearing(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write(
        tmp_path / "tokens.yaml",
        entry("shop", "token-of-shop", "route", "generate"),
        entry("monitor", "token-of-monitor", "read"),
    )


@pytest.fixture
def address(tokens: Path) -> Iterator[str]:
    settings = make_settings(tokens=tokens)
    with running_server(make_router(model=FakeLanguageModel()), settings) as address:
        yield address


# ---- the server


def calls(client: RouterClient) -> dict[str, Callable[[], object]]:
    return {
        "Route": lambda: client.route("weather"),
        "BatchRoute": lambda: client.batch_route(["weather"]),
        "StreamRoute": lambda: list(client.stream_route(["weather"])),
        "Generate": lambda: list(client.generate("weather with rain")),
        "GetSoftPrompt": lambda: client.get_soft_prompt("weather"),
        "GetStatus": client.status,
        "ListTasks": lambda: list(client.list_tasks()),
        "GetTask": lambda: client.get_task("weather"),
    }


@pytest.mark.parametrize(
    ("token", "allowed"),
    [
        ("token-of-shop", {"Route", "BatchRoute", "StreamRoute", "Generate"}),
        ("token-of-monitor", {"GetSoftPrompt", "GetStatus", "ListTasks", "GetTask"}),
    ],
)
def test_a_token_opens_the_methods_of_its_roles_and_no_other(
    address: str, token: str, allowed: set[str]
) -> None:
    with RouterClient(address, token=token) as client:
        for method, call in calls(client).items():
            if method in allowed:
                call()
                continue
            with pytest.raises(RouterError, match="it needs the role") as refused:
                call()
            assert refused.value.reason == "PERMISSION_DENIED", method


@pytest.mark.parametrize("token", ["", "another", "token-of-sho", DIGEST])
def test_without_a_known_token_nothing_can_be_called(address: str, token: str) -> None:
    with RouterClient(address, token=token) as client:
        for method, call in calls(client).items():
            with pytest.raises(RouterError) as refused:
                call()
            assert refused.value.reason == "UNAUTHENTICATED", method
            assert refused.value.field == "authorization"
            assert not token or token not in refused.value.message


def test_what_cannot_be_read_is_refused_for_its_token_first(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/router.v1.RouterService/Route")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\xff\xff\xff", timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_health_needs_no_token(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        response = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_every_method_of_our_services_needs_a_role() -> None:
    services = [
        router_service_pb2.DESCRIPTOR.services_by_name["RouterService"],
        task_service_pb2.DESCRIPTOR.services_by_name["TaskService"],
    ]
    assert {method.name for each in services for method in each.methods} == set(ROLE_OF_METHOD)


# ---- the file


def test_tokens_are_read_again_when_the_file_changes(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.access._SECONDS_BETWEEN_LOOKS", 0.0)
    access = TokenFile(tokens)
    access.check(Role.ROUTE, bearing("token-of-shop"))
    with pytest.raises(UnauthenticatedError):
        access.check(Role.ROUTE, bearing("new"))
    other = write(tokens.with_name("new.yaml"), entry("shop", "new", "route"))
    os.replace(other, tokens)
    access.check(Role.ROUTE, bearing("new"))
    with pytest.raises(UnauthenticatedError):
        access.check(Role.ROUTE, bearing("token-of-shop"))


@pytest.mark.parametrize("damage", ["tokens: [", "nothing", None])
def test_a_new_version_that_cannot_be_used_leaves_the_old_tokens(
    tokens: Path, damage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.access._SECONDS_BETWEEN_LOOKS", 0.0)
    access = TokenFile(tokens)
    good = tokens.read_text()
    if damage is None:
        tokens.unlink()
    else:
        tokens.write_text(damage)
    access.check(Role.READ, bearing("token-of-monitor"))
    tokens.write_text(good.replace("monitor", "watcher"))
    with pytest.raises(ForbiddenError, match="the token of watcher; it needs the role 'route'"):
        access.check(Role.ROUTE, bearing("token-of-monitor"))


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ([], "missing"),
        ([("authorization", "Basic dXNlcg==")], "another scheme"),
        ([("authorization", "token-of-shop")], "another scheme"),
        (bearing("token-of-shop") + bearing("token-of-monitor"), "2 of them"),
        (bearing("é\udcff".encode("utf-8", "surrogatepass").decode("latin-1")), "unknown"),
        (bearing("\ud800"), "unknown"),
        (bearing(""), "unknown"),
    ],
)
def test_metadata_without_one_bearer_token_are_refused(
    tokens: Path, metadata: list[tuple[str, str | bytes]], found: str
) -> None:
    with pytest.raises(UnauthenticatedError, match=found):
        TokenFile(tokens).check(Role.ROUTE, metadata)


def test_the_scheme_may_be_written_in_any_case(tokens: Path) -> None:
    TokenFile(tokens).check(Role.ROUTE, [("authorization", "bearer token-of-shop")])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no list 'tokens'"),
        ("tokens: 7", "no list 'tokens'"),
        ("tokens: [", "no YAML"),
        ("tokens: [7]", "token 1: other keys"),
        (f"tokens: [{{name: a, sha256: {DIGEST}}}]", "token 1: other keys"),
        (f"tokens: [{{name: '', sha256: {DIGEST}, roles: [read]}}]", "token 1, name"),
        ("tokens: [{name: a, sha256: hunter2, roles: [read]}]", "token 1, sha256: no digest"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, roles: []}}]", "token 1, roles"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, roles: [admin]}}]", "token 1, roles"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, roles: read}}]", "token 1, roles"),
        (f"tokens: [{{name: a, sha256: {DIGEST}, roles: [[read]]}}]", "token 1, roles"),
        (
            f"tokens: [{{name: a, sha256: {DIGEST}, roles: [read]}},"
            f" {{name: b, sha256: {DIGEST}, roles: [read]}}]",
            "token 2: b; list every name and every token once",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_place(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInputError) as refused:
        read_tokens(path)
    assert problem in str(refused.value)
    assert "hunter2" not in str(refused.value)  # it may be the token itself


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    with pytest.raises(InvalidInputError, match="No such file"):
        read_tokens(path)
    path.write_text("#" * ((1 << 20) + 1))
    with pytest.raises(InvalidInputError, match="over 1 MiB"):
        read_tokens(path)
    path.write_bytes(b"tokens: [caf\xe9]")
    with pytest.raises(InvalidInputError, match="UTF-8"):
        read_tokens(path)


def test_a_new_token_is_known_by_its_entry_and_not_in_it(tmp_path: Path) -> None:
    secret, made = new_token("shop", [Role.ROUTE, Role.READ, Role.READ])
    assert secret not in str(made)
    assert made["roles"] == ["read", "route"]
    assert new_token("shop", [Role.ROUTE])[0] != secret
    TokenFile(write(tmp_path / "tokens.yaml", made)).check(Role.READ, bearing(secret))


def test_a_token_for_nobody_or_nothing_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="say whom"):
        new_token("", [Role.ROUTE])
    with pytest.raises(InvalidInputError, match="roles"):
        new_token("shop", [])
