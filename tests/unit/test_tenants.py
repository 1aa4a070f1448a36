"""Tenants: catalogs of their own behind one server, over a real server, channel and files."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import yaml
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from router.access import read_tokens
from router.batching import BatchLimits
from router.bootstrap import Models, open_routers
from router.catalog import CATALOG_FILE, CatalogReader
from router.client import RouterClient, RouterError
from router.errors import InvalidInputError
from router.interfaces import Embeddings
from router.prometheus import PrometheusMetrics, serving
from router.rejection import OnUnknown, RejectionPolicy
from router.server import CATALOG_HEALTH, RouterServer
from router.settings import ServerSettings
from router.tenants import tenant_home
from router.v1 import decision_pb2
from router.v1 import router_service_pb2 as messages
from router.v1 import task_service_pb2 as task_messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from router.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import until
from tests.catalogs import (
    BASE_MODEL,
    PlaceEncoder,
    new_workshop,
    publish,
    served_models,
    texts_of,
)
from tests.fakes import FakeLanguageModel, make_settings
from trainer.cli import app

ROLES = ["route", "generate", "read"]
SHARED = "delivery"  # both tenants have a task of this name, with other texts
RED = ("red-secret", "red-plans")
BLUE = ("blue-secret", "blue-plans")


class SlowEncoder(PlaceEncoder):
    """Embeds nothing while it is `blocked`."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()
        self.batches: list[list[str]] = []

    def encode(self, texts: list[str]) -> Embeddings:  # type: ignore[override]
        self.batches.append(list(texts))
        assert self.free.wait(20)
        return super().encode(texts)


class PlaceModel(FakeLanguageModel):
    fingerprint = BASE_MODEL


def token_of(tenant: str) -> str:
    return f"token-of-{tenant or 'operator'}"


def write_tokens(path: Path, *tenants: str) -> Path:
    """A file in which every tenant has a token with all roles, and so has the home's own."""
    entries = []
    for tenant in ("", *tenants):
        digest = hashlib.sha256(token_of(tenant).encode()).hexdigest()
        entry: dict[str, object] = {"name": token_of(tenant), "sha256": digest, "roles": ROLES}
        entries.append(entry | ({"tenant": tenant} if tenant else {}))
    new = path.with_suffix(".new")
    new.write_text(yaml.safe_dump({"tokens": entries}))
    os.replace(new, path)
    return path


class Served:
    """A server over a home with two tenants, and what it runs on."""

    def __init__(self, home: Path, **changes: object) -> None:
        self.home = home
        self.tokens = write_tokens(home / "tokens.yaml", "red", "blue")
        self.encoder = SlowEncoder()
        self.settings: ServerSettings = make_settings(
            home=home, tokens=self.tokens, poll_seconds=0.05, **changes
        )
        self.metrics = PrometheusMetrics()

    def client(self, tenant: str) -> RouterClient:
        return RouterClient(self.address, token=token_of(tenant))

    @contextlib.contextmanager
    def running(self) -> Iterator[Served]:
        models = Models(self.encoder, PlaceModel(), served_models())
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="server-loop")
        thread.start()
        with open_routers(self.settings, models, self.metrics) as self.routers:
            self.metrics.watch(lambda: serving(self.routers.look()))
            server = RouterServer(self.routers, self.settings, "1.2.3")
            try:
                self.address = asyncio.run_coroutine_threadsafe(server.start(), loop).result(20)
                yield self
            finally:
                self.encoder.free.set()
                asyncio.run_coroutine_threadsafe(server.stop(), loop).result(20)
                loop.call_soon_threadsafe(loop.stop)
                thread.join(10)
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()


def register(home: Path, tenant: str, *names: str) -> None:
    with new_workshop(tenant_home(home, tenant)) as workshop:
        # Its texts lie elsewhere than those of the other tenant's task of the same name.
        publish(workshop, SHARED, texts=texts_of(f"{tenant}-parcel", 20), with_prompt=True)
        for name in names:
            publish(workshop, name, with_prompt=True)


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    register(home, "")
    register(home, "red", *RED)
    register(home, "blue", *BLUE, "blue-more")
    return home


@pytest.fixture(scope="module")
def served(catalogs: Path) -> Iterator[Served]:
    with Served(catalogs).running() as served:
        yield served


@pytest.fixture
def home(tmp_path: Path) -> Path:
    register(tmp_path, "red", "red-secret")
    register(tmp_path, "blue", "blue-secret")
    return tmp_path


def tasks_of(served: Served, tenant: str) -> list[str]:
    with served.client(tenant) as client:
        return [task.name for task in client.list_tasks()]


# ---- what a caller sees


def test_a_caller_sees_the_tasks_of_its_own_tenant(served: Served) -> None:
    assert tasks_of(served, "red") == sorted([SHARED, *RED])
    assert tasks_of(served, "blue") == sorted([SHARED, *BLUE, "blue-more"])
    assert tasks_of(served, "") == [SHARED]


def test_a_task_of_the_same_name_is_another_task_for_each_tenant(served: Served) -> None:
    with served.client("red") as red, served.client("blue") as blue:
        assert str(red.route("red-parcel 7").task) == f"{SHARED}@1"
        assert red.route("blue-parcel 7").task is None
        assert str(blue.route("blue-parcel 7").task) == f"{SHARED}@1"
        assert blue.route("red-parcel 7").task is None
        digests = {client.get_task(SHARED).record_sha256 for client in (red, blue)}
        assert len(digests) == 2


def test_status_and_revision_are_those_of_the_tenant(served: Served) -> None:
    for tenant, revision in (("", 1), ("red", 3), ("blue", 4)):
        with served.client(tenant) as client:
            status = client.status()
            assert (status.revision, status.newest_revision) == (revision, revision)
            assert status.tasks == revision
            assert client.route("somewhere 1").revision == revision


def failure(call: Callable[[], object]) -> tuple[object, ...]:
    with pytest.raises(RouterError) as refused:
        call()
    error = refused.value
    return (error.reason, error.field, error.value, error.remedy, error.message)


def test_a_task_of_another_tenant_fails_as_one_that_does_not_exist(served: Served) -> None:
    theirs, nobody = "blue-secret", "grey-secret"

    def calls(client: RouterClient, name: str) -> list[tuple[object, ...]]:
        policy = RejectionPolicy(OnUnknown.FALLBACK, name)
        return [
            failure(lambda: client.get_task(name)),
            failure(lambda: client.get_soft_prompt(name)),
            failure(lambda: client.route("somewhere 1", on_unknown=policy)),
            failure(lambda: list(client.generate("red-secret 1", task=name))),
        ]

    with served.client("red") as red:
        found, expected = calls(red, theirs), calls(red, nobody)
    hidden = [tuple(str(part).replace(theirs, nobody) for part in error) for error in found]
    assert hidden == [tuple(map(str, error)) for error in expected]
    assert {error[0] for error in expected} == {"TASK_NOT_FOUND"}


def secrets_of(home: Path, tenant: str) -> set[bytes]:
    """Names, digests and prompts of a tenant that are in no other one's catalog."""
    found = set()
    with CatalogReader(tenant_home(home, tenant)) as catalog:
        newest = catalog.newest_revision()
        for key in catalog.live(newest):
            record = catalog.record(key)
            assert record.prompt is not None
            found |= {record.sha256, record.embeddings_sha256, record.description}
            if key.name != SHARED:
                found |= {record.name, record.prompt.sha256}
        found |= {catalog.revision(number).head_sha256 for number in range(1, newest + 1)}
    assert f"about {SHARED}" in found
    return {text.encode() for text in found - {f"about {SHARED}"}}


NAMES = [SHARED, *RED, *BLUE, "grey", ""]
TEXTS = [*(f"{name} 3" for name in NAMES if name), "red-parcel 3", "blue-parcel 3"]


def policies() -> st.SearchStrategy[decision_pb2.RejectionPolicy]:
    return st.builds(
        decision_pb2.RejectionPolicy,
        action=st.sampled_from([0, 1, 2, 3]),
        fallback_task=st.sampled_from(NAMES),
    )


texts = st.sampled_from(TEXTS)
REQUESTS: st.SearchStrategy[tuple[str, Message]] = st.one_of(
    st.tuples(
        st.just("Route"),
        st.builds(
            messages.RouteRequest,
            text=texts,
            top_k=st.integers(0, 9),
            on_unknown=policies(),
            explain=st.booleans(),
        ),
    ),
    st.tuples(
        st.just("BatchRoute"),
        st.builds(
            messages.BatchRouteRequest,
            texts=st.lists(texts, min_size=1, max_size=4),
            top_k=st.integers(0, 9),
            on_unknown=policies(),
        ),
    ),
    st.tuples(
        st.just("StreamRoute"),
        st.builds(
            messages.StreamRouteRequest,
            text=texts,
            top_k=st.integers(0, 9),
            on_unknown=policies(),
        ),
    ),
    st.tuples(
        st.just("Generate"),
        st.builds(
            messages.GenerateRequest,
            text=texts,
            task=st.sampled_from(NAMES),
            top_k=st.integers(0, 9),
            on_unknown=policies(),
        ),
    ),
    st.tuples(
        st.just("GetSoftPrompt"),
        st.builds(messages.GetSoftPromptRequest, task=st.sampled_from(NAMES)),
    ),
    st.tuples(st.just("GetStatus"), st.builds(messages.GetStatusRequest)),
    st.tuples(
        st.just("GetTask"), st.builds(task_messages.GetTaskRequest, name=st.sampled_from(NAMES))
    ),
    st.tuples(
        st.just("ListTasks"),
        st.builds(
            task_messages.ListTasksRequest,
            page_size=st.integers(0, 3),
            page_token=st.sampled_from(["", "YWZ0ZXI6Ymx1ZQ=="]),
        ),
    ),
)


def answer(channel: grpc.Channel, method: str, request: Message, tenant: str) -> bytes:
    """Everything that comes back from a call: responses, or message and details of its error."""
    tasks, router = TaskServiceStub(channel), RouterServiceStub(channel)
    call = getattr(tasks if hasattr(tasks, method) else router, method)
    options = {"metadata": [("authorization", f"Bearer {token_of(tenant)}")], "timeout": 20}
    try:
        found = call(iter([request]) if method == "StreamRoute" else request, **options)
        responses = [found] if isinstance(found, Message) else list(found)
        return b"".join(response.SerializeToString() for response in responses)
    except grpc.RpcError as error:
        trailers = error.trailing_metadata()  # type: ignore[attr-defined]
        parts = [error.details() or "", *(value for _, value in trailers)]  # type: ignore[attr-defined]
        return b"\n".join(part.encode() if isinstance(part, str) else part for part in parts)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=REQUESTS)
def test_no_answer_to_a_tenant_holds_anything_of_another(
    served: Served, asked: tuple[str, Message]
) -> None:
    method, request = asked
    with grpc.insecure_channel(served.address) as channel:
        for tenant, other in (("red", "blue"), ("blue", "red"), ("", "red")):
            found = answer(channel, method, request, tenant)
            # What the caller wrote itself may come back in an error.
            said = request.SerializeToString()
            for secret in secrets_of(served.home, other):
                assert secret not in found or secret in said, (tenant, secret)


def test_the_check_for_secrets_would_find_one(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        found = answer(channel, "ListTasks", task_messages.ListTasksRequest(), "blue")
    assert any(secret in found for secret in secrets_of(served.home, "blue"))


def test_health_names_no_tenant(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        state = stub.Check(health_pb2.HealthCheckRequest(service=CATALOG_HEALTH)).status
        assert state == health_pb2.HealthCheckResponse.SERVING
        for name in ("red", f"{CATALOG_HEALTH}.red", f"{CATALOG_HEALTH}/red"):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


# ---- what is shared


def test_no_batch_no_cache_and_no_count_is_shared(home: Path) -> None:
    with Served(home).running() as served:
        with served.client("red") as red, served.client("blue") as blue:
            served.encoder.batches.clear()
            served.encoder.free.clear()
            threads = [
                threading.Thread(target=client.batch_route, args=([f"{name}-parcel {n}"],))
                for n in range(4)
                for name, client in (("red", red), ("blue", blue))
            ]
            for thread in threads:
                thread.start()
            until(lambda: sum(router.queued["routing"] for router in both(served)) == 8)
            served.encoder.free.set()
            for thread in threads:
                thread.join(20)
            for batch in served.encoder.batches:
                assert len({text.split("-")[0] for text in batch}) == 1
            # What one tenant asked for is not remembered for the other.
            red.route("the same text")
            blue.route("the same text")
            assert served.encoder.batches.count(["the same text"]) == 2
        hits = {
            tenant: served.metrics.registry.get_sample_value(
                "promptyard_cache_texts_total", {"tenant": tenant, "result": "hit"}
            )
            for tenant in ("red", "blue")
        }
        assert hits == {"red": 0, "blue": 0}


def both(served: Served) -> list:  # type: ignore[type-arg]
    found = served.routers.look()
    return [router for tenant, router in found.items() if tenant and router is not None]


def test_the_overload_of_a_tenant_is_refused_to_that_tenant(home: Path) -> None:
    limits = BatchLimits(queue_items=256, batch_items=2, batch_tokens=4096, queue_seconds=20.0)
    with (
        Served(home, routing_batches=limits, max_calls=3).running() as served,
        served.client("red") as red,
        served.client("blue") as blue,
    ):
        served.encoder.free.clear()
        waiting = [
            threading.Thread(target=red.batch_route, args=([f"red-parcel {n}"] * 64,))
            for n in range(3)
        ]
        for thread in waiting:
            thread.start()
        until(lambda: sum(router.queued["routing"] for router in both(served)) == 192)
        assert failure(lambda: red.route("red-parcel 1"))[:2] == ("OVERLOADED", "calls")
        answered: list[object] = []
        other = threading.Thread(target=lambda: answered.append(blue.route("blue-parcel 1")))
        other.start()
        until(lambda: sum(router.queued["routing"] for router in both(served)) == 193)
        served.encoder.free.set()
        other.join(20)
        [decision] = answered
        assert str(decision.task) == f"{SHARED}@1"  # type: ignore[attr-defined]
        for thread in waiting:
            thread.join(20)


# ---- tenants come, go and break


def test_a_tenant_that_the_tokens_name_later_is_served_without_a_restart(home: Path) -> None:
    with Served(home).running() as served:
        with served.client("green") as green:
            assert failure(lambda: green.route("green-parcel 1"))[0] == "UNAUTHENTICATED"
            register(home, "green", "green-secret")
            write_tokens(served.tokens, "red", "blue", "green")
            until(lambda: "green" in served.routers.look())
            assert str(green.route("green-parcel 1").task) == f"{SHARED}@1"
        assert tasks_of(served, "red") == [SHARED, "red-secret"]


def test_a_tenant_that_no_token_names_any_more_is_closed_and_forgotten(home: Path) -> None:
    def told(tenant: str) -> float | None:
        return served.metrics.registry.get_sample_value(
            "promptyard_calls_total", {"tenant": tenant, "method": "ListTasks", "code": "OK"}
        )

    with Served(home).running() as served:
        assert tasks_of(served, "blue")
        assert tasks_of(served, "red")
        until(lambda: told("blue") == 1)
        write_tokens(served.tokens, "red")
        until(lambda: "blue" not in served.routers.look() and told("blue") is None)
        with served.client("blue") as blue:
            assert failure(lambda: blue.route("blue-parcel 1"))[0] == "UNAUTHENTICATED"
        assert told("red") == 1
        assert tasks_of(served, "red")


def test_a_call_that_runs_keeps_the_router_of_a_tenant_that_left(home: Path) -> None:
    with Served(home).running() as served, served.client("blue") as blue:
        served.encoder.free.clear()
        answered: list[object] = []
        thread = threading.Thread(target=lambda: answered.append(blue.route("blue-parcel 1")))
        thread.start()
        until(lambda: sum(router.queued["routing"] for router in both(served)) == 1)
        write_tokens(served.tokens, "red")
        with served.client("blue") as other:
            until(lambda: _is_refused(other))
        time.sleep(0.2)  # several looks of the watcher
        assert "blue" in served.routers.look()
        served.encoder.free.set()
        thread.join(20)
        assert str(answered[0].task) == f"{SHARED}@1"  # type: ignore[attr-defined]
        until(lambda: "blue" not in served.routers.look())


def _is_refused(client: RouterClient) -> bool:
    try:
        client.status()
    except RouterError as error:
        return error.reason == "UNAUTHENTICATED"
    return False


def test_a_tenant_whose_catalog_is_damaged_leaves_the_others_alone(home: Path) -> None:
    file = tenant_home(home, "blue") / CATALOG_FILE
    good = file.read_bytes()
    file.write_bytes(b"no catalog at all" * 100)
    with Served(home).running() as served, served.client("blue") as blue:
        reason, field, *_, message = failure(lambda: blue.route("blue-parcel 1"))
        assert (reason, field) == ("CATALOG_UNAVAILABLE", "catalog")
        assert str(home) not in str(message)
        assert tasks_of(served, "red") == [SHARED, "red-secret"]
        assert tasks_of(served, "") == []
        tell = served.metrics.registry.get_sample_value
        assert tell("promptyard_tenants_out_of_service") == 1
        file.write_bytes(good)
        until(lambda: served.routers.look().get("blue") is not None)
        assert str(blue.route("blue-parcel 1").task) == f"{SHARED}@1"
        assert tell("promptyard_tenants_out_of_service") == 0


def test_a_tenant_without_a_catalog_is_served_as_an_empty_one(tmp_path: Path) -> None:
    with Served(tmp_path).running() as served, served.client("red") as red:
        assert red.route("red-parcel 1").task is None
        register(tmp_path, "red")
        until(lambda: red.status().revision == 1)
        assert str(red.route("red-parcel 1").task) == f"{SHARED}@1"
        assert tasks_of(served, "blue") == []


# ---- names, files and the command


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "/etc", "Red", "red_team", "-red", "a" * 41, "réd", "red\n", 7, None],
)
def test_a_name_that_could_be_a_path_or_look_like_another_is_refused(
    tmp_path: Path, name: object
) -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    entry = {"name": "a", "sha256": digest, "roles": ["read"], "tenant": name}
    path = tmp_path / "tokens.yaml"
    path.write_text(yaml.safe_dump({"tokens": [entry]}))
    with pytest.raises(InvalidInputError, match=r"token 1, tenant: .*lower-case letters"):
        read_tokens(path)


def test_more_tenants_than_allowed_are_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", "red", "blue", "green")
    assert len(read_tokens(path, 3)) == 4
    with pytest.raises(InvalidInputError, match="3 tenants; name at most 2"):
        read_tokens(path, 2)


def promptyard(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


def test_the_command_works_on_the_catalog_of_the_tenant(catalogs: Path) -> None:
    for tenant, seen, unseen in (("red", RED, BLUE), ("blue", BLUE, RED)):
        code, output = promptyard("--tenant", tenant, "list", "--home", catalogs, "--json")
        assert code == 0, output
        assert all(name in output for name in seen)
        assert not any(name in output for name in unseen)
    code, output = promptyard("list", "--home", catalogs, "--json")
    assert (code, "secret" in output) == (0, False)
    code, output = promptyard("--tenant", "grey", "list", "--home", catalogs)
    assert (code, "holds no catalog" in output) == (1, True)


@pytest.mark.parametrize("name", ["../red", "Red", ""])
def test_the_command_refuses_a_name_that_is_none(name: str, tmp_path: Path) -> None:
    code, output = promptyard("--tenant", name, "list", "--home", tmp_path)
    assert code == 2
    assert "--tenant: " in output


@pytest.mark.parametrize(
    "command", [["serve", "--check"], ["status"], ["route", "--server", "127.0.0.1:1", "hello"]]
)
def test_a_server_takes_no_tenant_from_the_command(command: list[str]) -> None:
    code, output = promptyard("--tenant", "red", *command)
    assert code == 2
    assert "a server knows a caller's tenant by the token" in output


@pytest.mark.parametrize(
    "arguments", [["token", "shop", "--tenant", "red"], ["--tenant", "red", "token", "shop"]]
)
def test_a_token_is_made_for_a_tenant(arguments: list[str], tmp_path: Path) -> None:
    code, output = promptyard(*arguments, "--role", "route", "--json")
    assert code == 0, output
    entry = yaml.safe_load(output)["entry"]
    path = tmp_path / "tokens.yaml"
    path.write_text(yaml.safe_dump({"tokens": [entry]}))
    [token] = read_tokens(path).values()
    assert (token.name, token.tenant) == ("shop", "red")


def test_settings_for_tenants_are_checked_before_anything_starts(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.yaml", "red", "blue")
    arguments = ["serve", "--check", "--listen", "127.0.0.1:0", "--home", tmp_path]
    code, output = promptyard(*arguments, "--tokens", path, "--max-tenants", 1)
    assert code == 2
    assert "2 tenants; name at most 1" in output
    assert replace(make_settings(), max_tenants=1).max_tenants == 1
