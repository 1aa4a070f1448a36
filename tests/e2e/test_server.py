"""A real server on a real port, spoken to over a real channel; only the models are fakes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from router.batching import BatchLimits
from router.errors import InvalidInputError
from router.server import RouterServer
from router.tenant_routers import only
from router.v1 import router_service_pb2 as messages
from router.v1 import task_service_pb2 as task_messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from tests.calls import (
    TIMEOUT,
    Serving,
    assert_invalid,
    assert_overloaded,
    failed,
    health,
    read_one,
    reason,
    route,
    start_generating,
    wait_until,
)
from tests.fakes import BASE_MODEL, make_router, make_settings, make_snapshot, make_task


def test_the_status_says_what_is_served_and_what_is_not() -> None:
    with Serving(problem="revision 4 is damaged") as serving:
        broken = replace(make_task("weather", None), problem="artifact abc: missing")
        serving.live.snapshot = make_snapshot(tasks=[broken, make_task("story", None)])
        serving.live.newest_revision = 4
        status = serving.router.GetStatus(messages.GetStatusRequest(), timeout=TIMEOUT)
    assert (status.revision, status.newest_revision, status.tasks) == (3, 4, 2)
    assert status.problem == "revision 4 is damaged"
    assert [(item.task, item.problem) for item in status.out_of_service] == [
        ("weather", "artifact abc: missing")
    ]
    assert (status.encoder.name, status.encoder.fingerprint) == ("fake-encoder", "fake-encoder:1")
    assert status.base_model.fingerprint == BASE_MODEL
    assert (status.head, status.version) == ("nearest-mean", "1.2.3")
    assert abs(status.started_at.ToSeconds() - time.time()) < 60
    assert (status.max_text_bytes, status.max_batch_texts) == (32768, 256)


def test_a_task_is_read_with_its_prompt_and_threshold(serving: Serving) -> None:
    response = serving.tasks.GetTask(task_messages.GetTaskRequest(name="weather"), timeout=TIMEOUT)
    task = response.task
    assert response.revision == 3
    assert (task.name, task.revision, task.examples) == ("weather", 1, 80)
    assert list(task.outputs) == ["sun", "rain", "snow"]
    assert task.threshold == pytest.approx(0.3)
    assert (task.prompt.tokens, task.prompt.validation_score) == (4, 0.75)
    assert task.created_at.ToJsonString() == "2026-11-24T01:02:03.456Z"
    assert task.record_sha256 == serving.live.snapshot.task("weather").record.sha256


def test_an_unknown_task_cannot_be_read(serving: Serving) -> None:
    request = task_messages.GetTaskRequest(name="none")
    error, status = failed(lambda: serving.tasks.GetTask(request, timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert reason(status) == "TASK_NOT_FOUND"
    empty = task_messages.GetTaskRequest()
    assert_invalid(lambda: serving.tasks.GetTask(empty, timeout=TIMEOUT), "name")


def list_tasks(serving: Serving, size: int, token: str = "") -> task_messages.ListTasksResponse:
    request = task_messages.ListTasksRequest(page_size=size, page_token=token)
    return serving.tasks.ListTasks(request, timeout=TIMEOUT)


def test_pages_of_tasks_hold_every_task_once_by_name(serving: Serving) -> None:
    names = [f"task-{n:03}" for n in range(230)]
    serving.live.snapshot = make_snapshot(tasks=[make_task(name, None) for name in names])
    found, sizes, token = [], [], ""
    while True:
        page = list_tasks(serving, 0, token)
        found += [task.name for task in page.tasks]
        sizes.append(len(page.tasks))
        token = page.next_page_token
        if not token:
            break
    assert found == names
    assert sizes == [100, 100, 30]


def test_a_listing_goes_on_where_it_was_after_the_catalog_changed(serving: Serving) -> None:
    page = list_tasks(serving, 2)
    assert [task.name for task in page.tasks] == ["sport", "story"]
    added = [make_task(name, None) for name in ("animal", "sport", "story", "weather")]
    serving.live.snapshot = make_snapshot(4, added)
    rest = list_tasks(serving, 2, page.next_page_token)
    assert [task.name for task in rest.tasks] == ["weather"]
    assert rest.next_page_token == ""
    assert rest.revision == 4


@pytest.mark.parametrize("token", ["nonsense", "äöü", "bm9uc2Vuc2U=", "====", "_w=="])
def test_a_page_token_that_is_not_ours_is_refused(serving: Serving, token: str) -> None:
    assert_invalid(lambda: list_tasks(serving, 2, token), "page_token")


@pytest.mark.parametrize("size", [-1, 1001])
def test_a_page_size_out_of_range_is_refused(serving: Serving, size: int) -> None:
    assert_invalid(lambda: list_tasks(serving, size), "page_size")


def test_a_deadline_ends_a_call_and_frees_its_place() -> None:
    limits = BatchLimits(queue_items=256, batch_items=32, batch_tokens=4096)
    with Serving(make_settings(routing_batches=limits)) as serving:
        serving.encoder.blocked.clear()
        request = messages.BatchRouteRequest(texts=["weather"] * 256)
        started = time.monotonic()
        error, _ = failed(lambda: serving.router.BatchRoute(request, timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.monotonic() - started < 5

        def has_room() -> bool:
            error, _ = failed(lambda: serving.router.Route(route("sport"), timeout=0.1))
            return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED

        wait_until(has_room)
        serving.encoder.blocked.set()
        assert serving.router.Route(route("sport"), timeout=TIMEOUT).decision.task == "sport"
        # One batch had begun; the rest of the call's texts never reached the encoder.
        assert sum(batch.count("weather") for batch in serving.encoder.batches) <= 32


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    limits = BatchLimits(queue_items=256, batch_items=32, batch_tokens=4096)
    with Serving(make_settings(routing_batches=limits)) as serving:
        serving.encoder.blocked.clear()
        first = serving.router.BatchRoute.future(
            messages.BatchRouteRequest(texts=["weather"] * 256), timeout=TIMEOUT
        )
        wait_until(lambda: bool(serving.encoder.batches))
        assert_overloaded(lambda: serving.router.Route(route("weather"), timeout=TIMEOUT))
        serving.encoder.blocked.set()
        assert len(first.result(TIMEOUT).decisions) == 256
        assert serving.router.Route(route("sport"), timeout=TIMEOUT).decision.task == "sport"


def test_calls_over_the_limit_are_refused_but_health_still_answers() -> None:
    with Serving(make_settings(max_calls=2)) as serving:
        serving.encoder.blocked.clear()
        running = [serving.router.Route.future(route("weather"), timeout=TIMEOUT) for _ in range(2)]
        wait_until(lambda: bool(serving.encoder.batches))
        status = messages.GetStatusRequest()
        assert_overloaded(lambda: serving.router.GetStatus(status, timeout=TIMEOUT))
        assert health(serving, "") == health_pb2.HealthCheckResponse.SERVING
        serving.encoder.blocked.set()
        assert all(call.result(TIMEOUT).decision.task == "weather" for call in running)
        serving.router.GetStatus(status, timeout=TIMEOUT)


def test_one_connection_cannot_take_the_places_of_the_others() -> None:
    with Serving(make_settings(max_connection_calls=2)) as serving:
        serving.model.slow = True
        first, second = (start_generating(serving, "a story") for _ in range(2))
        read_one(first), read_one(second)  # both are running
        error, _ = failed(lambda: serving.router.Route(route("weather"), timeout=0.5))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with grpc.insecure_channel(
            serving.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as another:
            RouterServiceStub(another).Route(route("weather"), timeout=TIMEOUT)
        serving.model.steps.release(100)
        list(first), list(second)
        serving.router.Route(route("weather"), timeout=TIMEOUT)


def test_health_is_reported_overall_and_by_service(serving: Serving) -> None:
    serving.live.snapshot = make_snapshot(
        tasks=[replace(make_task("weather", None), problem="broken")]
    )
    for name in ("", "router.v1.RouterService", "router.v1.TaskService"):
        assert health(serving, name) == health_pb2.HealthCheckResponse.SERVING
    error, _ = failed(lambda: health(serving, "nonsense"))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_the_catalog_has_a_health_of_its_own(serving: Serving) -> None:
    states = health_pb2.HealthCheckResponse
    assert health(serving, "promptyard.catalog") == states.SERVING
    serving.live.problem = "revision 4 is damaged"
    wait_until(lambda: health(serving, "promptyard.catalog") == states.NOT_SERVING)
    assert health(serving, "") == states.SERVING  # the last good revision goes on being served
    serving.live.problem = ""
    wait_until(lambda: health(serving, "promptyard.catalog") == states.SERVING)


def test_reflection_lists_the_services_and_describes_their_methods(serving: Serving) -> None:
    database = ProtoReflectionDescriptorDatabase(serving.channel)
    assert set(database.get_services()) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "router.v1.RouterService",
        "router.v1.TaskService",
    }
    service = DescriptorPool(database).FindServiceByName("router.v1.RouterService")
    assert {method.name for method in service.methods} == {
        "BatchRoute",
        "Generate",
        "GetSoftPrompt",
        "GetStatus",
        "Route",
        "StreamRoute",
    }
    stub = reflection_pb2_grpc.ServerReflectionStub(serving.channel)
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="nonsense")
    [answer] = stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT)
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_an_accepted_call_is_answered_although_the_server_shuts_down() -> None:
    serving = Serving().__enter__()
    serving.encoder.blocked.clear()
    call = serving.router.Route.future(route("weather"), timeout=TIMEOUT)
    wait_until(lambda: bool(serving.encoder.batches))
    watch = health_pb2_grpc.HealthStub(serving.channel).Watch(
        health_pb2.HealthCheckRequest(service=""), timeout=TIMEOUT
    )
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    stopping = threading.Thread(target=serving._running.__exit__, args=(None, None, None))
    stopping.start()
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    serving.encoder.blocked.set()
    assert call.result(TIMEOUT).decision.task == "weather"
    stopping.join(TIMEOUT)
    assert not stopping.is_alive()
    serving.channel.close()


async def test_an_address_in_use_is_refused_with_a_remedy(serving: Serving) -> None:
    settings = make_settings(listen=serving.address)
    server = RouterServer(only(make_router()), settings, version="1")
    with pytest.raises(InvalidInputError, match="choose a free port"):
        await server.start()


def test_a_new_snapshot_is_served_from_the_next_call_on(serving: Serving) -> None:
    assert serving.router.Route(route("animal"), timeout=TIMEOUT).decision.task == ""
    serving.live.snapshot = make_snapshot(4, [make_task("animal", None)])
    response = serving.router.Route(route("animal"), timeout=TIMEOUT)
    assert (response.decision.task, response.revision) == ("animal", 4)
