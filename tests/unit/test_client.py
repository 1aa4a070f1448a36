"""The client against a real server with fake models, and against none."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from router.answer import AnswerSummary, FinishReason
from router.client import RouterClient, RouterError
from router.decision import Decision, Outcome
from tests.fakes import (
    BASE_MODEL,
    FakeEncoder,
    FakeLanguageModel,
    FixedLive,
    make_router,
    make_settings,
    make_snapshot,
    make_task,
    running_server,
)


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def model() -> FakeLanguageModel:
    return FakeLanguageModel()


@pytest.fixture
def live() -> FixedLive:
    return FixedLive(make_snapshot())


@pytest.fixture
def client(
    encoder: FakeEncoder, model: FakeLanguageModel, live: FixedLive
) -> Iterator[RouterClient]:
    with (
        running_server(make_router(encoder, model, live)) as address,
        RouterClient(address) as client,
    ):
        yield client
        encoder.blocked.set()
        model.steps.release(1000)


def test_a_text_is_routed_to_the_same_value_that_the_server_decided(client: RouterClient) -> None:
    decision = client.route("weather report", top_k=2)
    assert isinstance(decision, Decision)
    assert decision.outcome is Outcome.MATCHED
    assert str(decision.task) == "weather@1"
    assert len(decision.candidates) == 2
    assert client.route("tax law").task is None


def test_an_error_names_what_is_wrong_and_how_the_server_calls_the_call(
    client: RouterClient,
) -> None:
    with pytest.raises(RouterError) as caught:
        client.get_task("none")
    error = caught.value
    assert (error.reason, error.field, error.value) == ("TASK_NOT_FOUND", "task", "none")
    assert "ListTasks" in error.remedy
    assert len(error.request_id) == 16


def test_a_batch_is_routed_in_order(client: RouterClient) -> None:
    decisions = client.batch_route(["sport", "weather"])
    assert [str(decision.task) for decision in decisions] == ["sport@1", "weather@1"]


def test_a_stream_gives_a_result_a_text_and_errors_in_their_places(client: RouterClient) -> None:
    first, second, third = client.stream_route(iter(["sport", "", "weather"]))
    assert isinstance(first, Decision)
    assert isinstance(second, RouterError)
    assert (second.reason, second.field) == ("INVALID_INPUT", "text")
    assert isinstance(third, Decision)


def test_a_stream_can_be_left_early(client: RouterClient) -> None:
    results = client.stream_route("weather" for _ in range(10_000))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert str(client.route("sport").task) == "sport@1"


def test_an_answer_comes_as_values(client: RouterClient) -> None:
    decision, *pieces, summary = client.generate("a story of two mice", max_output_tokens=3)
    assert isinstance(decision, Decision)
    assert pieces == ["A ", "STORY ", "OF "]
    assert summary == AnswerSummary(FinishReason.LENGTH, 5, 4, 3)


def test_leaving_an_answer_cancels_it_on_the_server(
    client: RouterClient, model: FakeLanguageModel
) -> None:
    model.slow = True
    events = client.generate("many words " * 20, task="story")
    next(events)
    model.steps.release()
    assert next(events) == "MANY "
    events.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while not model.stopped_rows and time.monotonic() < deadline:
        model.steps.release()
        time.sleep(0.01)
    assert len(model.stopped_rows) == 1


def test_a_soft_prompt_arrives_whole(client: RouterClient, live: FixedLive) -> None:
    values = np.random.default_rng(0).normal(size=(100, 384)).astype(np.float32)
    task = make_task("weather", None)
    assert task.prompt is not None
    live.snapshot = make_snapshot(tasks=[replace(task, prompt=replace(task.prompt, values=values))])
    prompt = client.get_soft_prompt("weather")
    assert np.array_equal(prompt.values, values)
    assert prompt.values.flags.writeable
    assert prompt.base_model == BASE_MODEL


def test_tasks_are_listed_over_pages_and_read(client: RouterClient, live: FixedLive) -> None:
    names = [f"task-{n:03}" for n in range(150)]
    live.snapshot = make_snapshot(tasks=[make_task(name, None) for name in names])
    assert [task.name for task in client.list_tasks()] == names
    assert client.get_task("task-007").examples == 80
    assert client.status().tasks == 150


def test_an_error_carries_reason_field_and_message(client: RouterClient) -> None:
    with pytest.raises(RouterError) as caught:
        client.batch_route(["fine", ""])
    assert (caught.value.reason, caught.value.field) == ("INVALID_INPUT", "texts[1]")
    assert "not empty" in caught.value.message
    with pytest.raises(RouterError) as caught:
        client.get_task("nonsense")
    assert (caught.value.reason, caught.value.field) == ("TASK_NOT_FOUND", "task")
    with pytest.raises(RouterError) as caught:
        list(client.generate("text", task="nonsense"))
    assert caught.value.reason == "TASK_NOT_FOUND"


def test_a_call_has_a_deadline_by_default(encoder: FakeEncoder) -> None:
    encoder.blocked.clear()
    with (
        running_server(make_router(encoder)) as address,
        RouterClient(address, timeout=0.2) as client,
    ):
        with pytest.raises(RouterError) as caught:
            client.route("weather")
        encoder.blocked.set()
    assert caught.value.reason == "DEADLINE_EXCEEDED"


def test_where_no_server_listens_the_error_comes_soon_and_says_so() -> None:
    started = time.monotonic()
    with RouterClient("127.0.0.1:9") as client, pytest.raises(RouterError) as caught:
        client.route("weather")
    assert caught.value.reason == "UNAVAILABLE"
    assert time.monotonic() - started < 8


def test_a_call_is_tried_again_until_the_server_is_there() -> None:
    with running_server(make_router()) as address:
        pass
    found: list[Decision] = []

    def call() -> None:
        with RouterClient(address) as client:
            found.append(client.route("weather"))

    calling = threading.Thread(target=call)
    calling.start()
    with running_server(make_router(), make_settings(listen=address)):
        calling.join(10)
    assert [str(decision.task) for decision in found] == ["weather@1"]


def test_the_client_imports_neither_torch_nor_faiss_nor_transformers() -> None:
    code = (
        "import sys, router.client; "
        "print([m for m in ('torch', 'faiss', 'transformers', 'onnxruntime', 'scipy')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
