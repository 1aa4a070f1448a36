"""Answers and soft prompts of a real server over a real channel; only the models are fakes."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from router.client import RouterClient, RouterError
from router.v1 import decision_pb2, task_pb2
from router.v1 import router_service_pb2 as messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from tests.calls import (
    TIMEOUT,
    Serving,
    assert_invalid,
    failed,
    generate,
    read_one,
    reason,
    route,
    start_generating,
)
from tests.fakes import (
    BASE_MODEL,
    make_router,
    make_snapshot,
    make_task,
    running_server,
    without_prompt,
)


def test_a_task_with_closed_outputs_answers_with_its_best_label(serving: Serving) -> None:
    decision, piece, summary = generate(serving, "the weather brings rain", top_k=1)
    assert decision.decision.task == "weather"
    assert len(decision.decision.candidates) == 1
    assert piece.piece == "rain"
    assert summary.summary.finish_reason == messages.FINISH_REASON_LABEL
    assert summary.summary.prompt_tokens == 4
    assert summary.summary.input_tokens == 4
    assert summary.summary.output_tokens == 1
    assert not summary.summary.truncated
    assert {event.revision for event in (decision, piece, summary)} == {3}


def test_a_text_cut_to_the_base_models_window_is_reported_for_labels_too(serving: Serving) -> None:
    *_, summary = generate(serving, "the weather brings rain " * 100, task="weather")
    assert summary.summary.truncated
    assert summary.summary.input_tokens == 256


def test_a_free_text_task_answers_in_pieces(serving: Serving) -> None:
    decision, *pieces, summary = generate(serving, "a story of two mice")
    assert decision.decision.task == "story"
    assert "".join(piece.piece for piece in pieces) == "A STORY OF TWO MICE "
    assert len(pieces) == 5
    assert summary.summary.finish_reason == messages.FINISH_REASON_STOP
    assert summary.summary.output_tokens == 5
    assert summary.summary.input_tokens == 5


def test_the_length_of_an_answer_is_bounded(serving: Serving) -> None:
    *_, summary = generate(serving, "a story of two mice", max_output_tokens=2)
    assert summary.summary.finish_reason == messages.FINISH_REASON_LENGTH
    assert summary.summary.output_tokens == 2


def test_where_no_task_fits_there_is_a_decision_but_no_answer(serving: Serving) -> None:
    decision, summary = generate(serving, "tax law")
    assert decision.decision.outcome == decision_pb2.OUTCOME_UNKNOWN
    assert summary.summary.finish_reason == messages.FINISH_REASON_NO_TASK
    assert not serving.model.batches


def test_a_named_task_skips_routing(serving: Serving) -> None:
    decision, piece, _ = generate(serving, "the goal of the sun", task="weather")
    assert decision.decision.task == "weather"
    assert decision.decision.outcome == decision_pb2.OUTCOME_MATCHED
    assert np.isnan(decision.decision.score)
    assert piece.piece == "sun"
    assert not serving.encoder.batches


def test_context_reaches_the_base_model_but_not_the_encoder(serving: Serving) -> None:
    generate(serving, "weather please", context=["it will snow", "or not"])
    assert serving.encoder.batches == [["weather please"]]
    [[asked]] = serving.model.batches
    assert asked.text == "weather please\nit will snow\nor not"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": ""}, "text"),
        ({"max_output_tokens": 513}, "max_output_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"context": ["ok", ""]}, "context[1]"),
        ({"context": ["ok"] * 33}, "context"),
        ({"context": ["x" * 20_000, "y" * 20_000]}, "context"),
        ({"top_k": 101}, "top_k"),
    ],
)
def test_a_bad_generate_request_is_refused_by_field(
    serving: Serving, fields: dict[str, Any], field: str
) -> None:
    assert_invalid(lambda: generate(serving, **{"text": "weather", **fields}), field)


def test_a_task_that_does_not_exist_is_not_found(serving: Serving) -> None:
    error, status = failed(lambda: generate(serving, "weather", task="nonsense"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert reason(status) == "TASK_NOT_FOUND"
    assert "nonsense" in status.message


def test_a_task_without_a_prompt_is_routed_to_but_not_answered(serving: Serving) -> None:
    serving.live.snapshot = make_snapshot(tasks=[without_prompt(make_task("weather", None))])
    call = start_generating(serving, "weather")
    assert read_one(call).decision.task == "weather"
    error, status = failed(lambda: read_one(call))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason(status) == "TASK_HAS_NO_PROMPT"


def test_a_task_that_is_out_of_service_says_so_and_wants_no_retry(serving: Serving) -> None:
    broken = replace(make_task("weather", None), prompt=None, problem="artifact abc: missing")
    serving.live.snapshot = make_snapshot(tasks=[broken, make_task("story", None)])
    error, status = failed(lambda: generate(serving, "the weather"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(status) == "TASK_OUT_OF_SERVICE"
    assert "artifact abc: missing" in status.message
    assert ("grpc-retry-pushback-ms", "-1") in list(error.trailing_metadata())
    assert generate(serving, "a story")[-1].summary.output_tokens == 2


def test_without_a_base_model_texts_are_routed_and_answers_refused() -> None:
    with running_server(make_router()) as address, grpc.insecure_channel(address) as channel:
        stub = RouterServiceStub(channel)
        assert stub.Route(route("weather"), timeout=TIMEOUT).decision.task == "weather"
        error, status = failed(
            lambda: list(stub.Generate(messages.GenerateRequest(text="weather"), timeout=TIMEOUT))
        )
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert reason(status) == "TASK_HAS_NO_PROMPT"
        assert stub.GetStatus(messages.GetStatusRequest(), timeout=TIMEOUT).base_model.name == ""


def test_answers_for_several_tasks_are_given_at_the_same_time(serving: Serving) -> None:
    texts = {
        "weather {} with rain": "rain",
        "sport {} with a goal": "goal",
        "story {}": "STORY {} ",
    }
    wanted = [
        (text.format(n), answer.format(n)) for n in range(20) for text, answer in texts.items()
    ]
    serving.model.blocked.clear()
    calls = [start_generating(serving, text) for text, _ in wanted]
    assert all(read_one(call).HasField("decision") for call in calls)
    serving.model.blocked.set()
    for call, (_, answer) in zip(calls, wanted, strict=True):
        assert "".join(event.piece for event in call) == answer
    prompts = [
        {float(row.prompt[0, 0]) for row in batch if row.prompt is not None}
        for batch in serving.model.batches
    ]
    assert max(len(different) for different in prompts) > 1
    assert len(serving.model.batches) < len(wanted) / 2


def test_a_cancelled_answer_frees_its_place(serving: Serving) -> None:
    serving.model.slow = True
    long = start_generating(serving, "many words " * 50, task="story")
    read_one(long)
    serving.model.steps.release()
    assert read_one(long).piece == "MANY "
    long.cancel()  # type: ignore[no-untyped-call]
    waiting = start_generating(serving, "story")
    read_one(waiting)
    deadline = time.monotonic() + 10
    while not serving.model.stopped_rows and time.monotonic() < deadline:
        serving.model.steps.release()
        time.sleep(0.02)
    assert serving.model.stopped_rows
    serving.model.steps.release(10)
    assert [event.piece for event in waiting][:-1] == ["STORY "]


def test_a_soft_prompt_comes_in_chunks_with_its_digest(serving: Serving) -> None:
    values = np.random.default_rng(0).normal(size=(50, 384)).astype(np.float32)
    task = make_task("weather", None)
    assert task.prompt is not None
    serving.live.snapshot = make_snapshot(
        tasks=[replace(task, prompt=replace(task.prompt, values=values))]
    )
    first, *chunks = serving.router.GetSoftPrompt(
        messages.GetSoftPromptRequest(task="weather"), timeout=TIMEOUT
    )
    about = first.description
    tensor = b"".join(part.chunk for part in chunks)
    assert len(chunks) == 2
    assert (about.task, about.task_revision, about.dtype) == ("weather", 1, "float32")
    assert about.base_model == BASE_MODEL
    assert about.size_bytes == len(tensor)
    assert about.sha256 == hashlib.sha256(tensor).hexdigest()
    assert np.array_equal(np.frombuffer(tensor, "<f4").reshape(*about.shape), values)


def test_a_prefix_comes_with_its_method_and_its_shape_by_layer(serving: Serving) -> None:
    values = np.random.default_rng(0).normal(size=(5, 3 * 2 * 16)).astype(np.float32)
    task = make_task("weather", None)
    assert task.prompt is not None
    prefix = replace(task.prompt, values=values, method="prefix", layers=3)
    assert task.record.prompt is not None
    record = replace(
        task.record, prompt=replace(task.record.prompt, method="prefix", layers=3, hidden_size=16)
    )
    serving.live.snapshot = make_snapshot(tasks=[replace(task, record=record, prompt=prefix)])
    first, *_ = serving.router.GetSoftPrompt(
        messages.GetSoftPromptRequest(task="weather"), timeout=TIMEOUT
    )
    assert list(first.description.shape) == [5, 3, 2, 16]
    assert first.description.method == task_pb2.PROMPT_METHOD_PREFIX
    with RouterClient(serving.address) as client:
        found = client.get_soft_prompt("weather")
        assert (found.method, found.layers, found.shape) == ("prefix", 3, (5, 3, 2, 16))
        assert np.array_equal(found.values, values)
        [listed] = client.list_tasks()
        assert listed.prompt.method == task_pb2.PROMPT_METHOD_PREFIX
        list(client.generate("weather", task="weather"))
    assert serving.model.batches[-1][0].method == "prefix"


def test_a_client_refuses_a_prompt_of_a_method_that_it_does_not_know(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RouterClient(serving.address) as client:
        # A server of before there were methods says none.
        monkeypatch.setattr("router.servicers.prompt_method_message", lambda _: 0)
        assert client.get_soft_prompt("weather").method == "prompt"
        monkeypatch.setattr("router.servicers.prompt_method_message", lambda _: 7)
        with pytest.raises(RouterError, match="method 7, which this client does not know"):
            client.get_soft_prompt("weather")


@pytest.mark.parametrize(
    ("name", "code"), [("", grpc.StatusCode.INVALID_ARGUMENT), ("none", grpc.StatusCode.NOT_FOUND)]
)
def test_a_soft_prompt_of_no_task_is_refused(
    serving: Serving, name: str, code: grpc.StatusCode
) -> None:
    request = messages.GetSoftPromptRequest(task=name)
    error, _ = failed(lambda: list(serving.router.GetSoftPrompt(request, timeout=TIMEOUT)))
    assert error.code() is code
