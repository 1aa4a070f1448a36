"""A real server on a real port, spoken to over a real channel; only the models are fakes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, cast

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_status import rpc_status

from router.batching import BatchLimits
from router.client import RouterClient, RouterError
from router.errors import InvalidInputError
from router.interfaces import LanguageModel
from router.rejection import OnUnknown, RejectionPolicy
from router.server import RouterServer
from router.settings import ServerSettings
from router.tenant_routers import only
from router.v1 import decision_pb2, task_pb2
from router.v1 import router_service_pb2 as messages
from router.v1 import task_service_pb2 as task_messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from router.v1.task_service_pb2_grpc import TaskServiceStub
from tests.fakes import (
    BASE_MODEL,
    TASKS,
    FakeEncoder,
    FakeLanguageModel,
    FixedLive,
    make_router,
    make_settings,
    make_snapshot,
    make_task,
    running_server,
    without_prompt,
)

TIMEOUT = 20.0

Received = TypeVar("Received")


class Serving:
    """A running server, the fakes inside it, and stubs to call it."""

    def __init__(
        self,
        settings: ServerSettings | None = None,
        base_model: LanguageModel | None = None,
        **live: str,
    ) -> None:
        self.settings = settings or make_settings()
        self.encoder = FakeEncoder()
        self.model = FakeLanguageModel()
        self.live = FixedLive(make_snapshot())
        self.live.problem = live.get("problem", "")
        self.served = make_router(self.encoder, base_model or self.model, self.live, self.settings)
        self._running = running_server(self.served, self.settings)

    def __enter__(self) -> Serving:
        self.address = self._running.__enter__()
        self.channel = grpc.insecure_channel(self.address)
        self.router = RouterServiceStub(self.channel)
        self.tasks = TaskServiceStub(self.channel)
        return self

    def __exit__(self, *error: object) -> None:
        # Whatever a test left blocked must not hold the shutdown up.
        self.encoder.blocked.set()
        self.model.blocked.set()
        self.model.steps.release(1000)
        self.channel.close()
        self._running.__exit__(None, None, None)

    def raw(self, method: str) -> Callable[..., bytes]:
        """A unary method that takes and gives bytes."""
        path = f"/router.v1.RouterService/{method}"
        return cast("Callable[..., bytes]", self.channel.unary_unary(path, None, None))


@pytest.fixture
def serving() -> Iterator[Serving]:
    with Serving() as running:
        yield running


def route(text: str, top_k: int = 0) -> messages.RouteRequest:
    return messages.RouteRequest(text=text, top_k=top_k)


def failed(call: Callable[[], object]) -> tuple[grpc.Call, status_pb2.Status]:
    """The status and rich details of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = cast("grpc.Call", caught.value)
    return error, rpc_status.from_call(error)


def detail(status: status_pb2.Status, kind: type[Message]) -> Message | None:
    for packed in status.details:
        found = kind()
        if packed.Unpack(found):
            return found
    return None


def reason(status: status_pb2.Status) -> str:
    info = detail(status, error_details_pb2.ErrorInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.domain == "promptyard"
    return str(info.reason)


def violated_field(status: status_pb2.Status) -> str:
    bad = detail(status, error_details_pb2.BadRequest)
    assert isinstance(bad, error_details_pb2.BadRequest)
    return str(bad.field_violations[0].field)


def assert_invalid(call: Callable[[], object], field: str) -> str:
    """The call fails with INVALID_ARGUMENT for `field`; returns the message."""
    error, status = failed(call)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(status) == "INVALID_INPUT"
    assert violated_field(status) == field
    return str(status.message)


# ---- routing


def test_a_text_is_routed_to_the_task_that_it_fits(serving: Serving) -> None:
    response = serving.router.Route(route("weather tomorrow", top_k=2), timeout=TIMEOUT)
    decision = response.decision
    assert decision.outcome == decision_pb2.OUTCOME_MATCHED
    assert (decision.task, decision.task_revision) == ("weather", 1)
    assert decision.score == pytest.approx(0.5**0.5)
    assert decision.threshold == pytest.approx(0.3)
    assert decision.margin == pytest.approx(decision.score)
    assert response.revision == decision.revision == 3
    first, _ = decision.candidates
    assert first.task == "weather"
    assert not decision.truncated


def test_that_no_task_fits_is_a_decision_and_not_an_error(serving: Serving) -> None:
    decision = serving.router.Route(route("tax law"), timeout=TIMEOUT).decision
    assert decision.outcome == decision_pb2.OUTCOME_UNKNOWN
    assert decision.task == ""
    assert not decision.candidates


def test_two_tasks_that_fit_about_equally_are_ambiguous(serving: Serving) -> None:
    decision = serving.router.Route(route("weather sport"), timeout=TIMEOUT).decision
    assert decision.outcome == decision_pb2.OUTCOME_AMBIGUOUS
    assert decision.task in {"weather", "sport"}


def with_policy(text: str, action: str, fallback: str = "") -> messages.RouteRequest:
    policy = decision_pb2.RejectionPolicy(
        action=f"REJECTION_ACTION_{action}",  # type: ignore[arg-type]
        fallback_task=fallback,
    )
    return messages.RouteRequest(text=text, on_unknown=policy)


def test_a_request_says_which_task_is_used_for_a_text_that_fits_none(serving: Serving) -> None:
    for action, fallback, used, use in (
        ("UNSPECIFIED", "", "", decision_pb2.USE_ABSTAINED),
        ("ABSTAIN", "", "", decision_pb2.USE_ABSTAINED),
        ("FALLBACK", "story", "story", decision_pb2.USE_FALLBACK),
        ("BEST", "", "sport", decision_pb2.USE_BEST_ANYWAY),
    ):
        # One word of twelve: nearest to sport, and under its threshold.
        text = "sport and tax law of the land that we all live in"
        request = with_policy(text, action, fallback)
        response = serving.router.Route(request, timeout=TIMEOUT)
        decision = response.decision
        assert decision.outcome == decision_pb2.OUTCOME_UNKNOWN
        assert (decision.task, decision.used_task, decision.use) == ("", used, use)
        assert decision.used_task_revision == bool(used)
        assert not decision.candidates


def test_a_text_that_fits_is_not_touched_by_a_policy(serving: Serving) -> None:
    decision = serving.router.Route(with_policy("weather", "BEST"), timeout=TIMEOUT).decision
    assert (decision.used_task, decision.use) == ("weather", decision_pb2.USE_MATCHED)
    both = with_policy("weather sport", "FALLBACK", "story")
    decision = serving.router.Route(both, timeout=TIMEOUT).decision
    assert decision.outcome == decision_pb2.OUTCOME_AMBIGUOUS
    assert (decision.used_task, decision.use) == (
        decision.task,
        decision_pb2.USE_BEST_OF_AMBIGUOUS,
    )


def test_a_catalogs_policy_holds_unless_the_request_has_one(serving: Serving) -> None:
    to_story = RejectionPolicy(OnUnknown.FALLBACK, "story")
    serving.live.snapshot = replace(make_snapshot(), rejection=to_story)
    policy = with_policy("", "ABSTAIN").on_unknown
    texts = ["tax law", "weather"]
    for asked, used in ((None, ["story", "weather"]), (policy, ["", "weather"])):
        batch = messages.BatchRouteRequest(texts=texts, on_unknown=asked)
        response = serving.router.BatchRoute(batch, timeout=TIMEOUT)
        assert [decision.used_task for decision in response.decisions] == used
        stream = [messages.StreamRouteRequest(text=text, on_unknown=asked) for text in texts]
        responses = list(serving.router.StreamRoute(iter(stream), timeout=TIMEOUT))
        assert [response.decision.used_task for response in responses] == used


def test_a_catalogs_fallback_that_was_retired_is_told_and_is_no_error(serving: Serving) -> None:
    gone = RejectionPolicy(OnUnknown.FALLBACK, "retired")
    serving.live.snapshot = replace(make_snapshot(), rejection=gone)
    decision = serving.router.Route(route("tax law"), timeout=TIMEOUT).decision
    assert (decision.used_task, decision.use) == ("", decision_pb2.USE_FALLBACK_MISSING)
    status = serving.router.GetStatus(messages.GetStatusRequest(), timeout=TIMEOUT)
    assert (status.on_unknown, status.fallback_missing) == ("fallback:retired", True)
    request = messages.GenerateRequest(text="tax law")
    *_, summary = serving.router.Generate(request, timeout=TIMEOUT)
    assert summary.summary.finish_reason == messages.FINISH_REASON_NO_TASK


def test_a_requests_fallback_that_does_not_exist_is_not_found(serving: Serving) -> None:
    request = with_policy("weather", "FALLBACK", "nobody")
    error, status = failed(lambda: serving.router.Route(request, timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert reason(status) == "TASK_NOT_FOUND"
    assert "on_unknown.fallback_task: nobody" in status.message


def test_a_bad_policy_in_a_stream_is_an_error_of_its_own(serving: Serving) -> None:
    bad = decision_pb2.RejectionPolicy(fallback_task="story")
    requests = [
        messages.StreamRouteRequest(text="tax law", on_unknown=bad, id="bad"),
        messages.StreamRouteRequest(text="tax law", id="good"),
    ]
    first, second = serving.router.StreamRoute(iter(requests), timeout=TIMEOUT)
    assert (first.id, first.error.field) == ("bad", "on_unknown.action")
    assert second.decision.outcome == decision_pb2.OUTCOME_UNKNOWN


def test_an_unknown_text_is_answered_under_the_task_of_the_policy(serving: Serving) -> None:
    policy = with_policy("", "FALLBACK", "weather").on_unknown
    request = messages.GenerateRequest(text="snow on tax law", on_unknown=policy)
    first, piece, last = serving.router.Generate(request, timeout=TIMEOUT)
    assert first.decision.outcome == decision_pb2.OUTCOME_UNKNOWN
    assert (first.decision.used_task, piece.piece) == ("weather", "snow")
    assert last.summary.finish_reason == messages.FINISH_REASON_LABEL


def test_truncation_to_the_encoders_window_is_reported(serving: Serving) -> None:
    decision = serving.router.Route(route("weather " * 300), timeout=TIMEOUT).decision
    assert decision.truncated


def test_a_catalog_without_tasks_answers_unknown() -> None:
    with Serving() as serving:
        serving.live.snapshot = replace(make_snapshot(), revision=0)
        empty = make_snapshot(revision=0).head
        serving.live.snapshot = make_snapshot(revision=0).build(
            0,
            replace(
                empty,
                tasks=(),
                thresholds=(),
                rows=empty.rows[:0],
                row_task=empty.row_task[:0],
            ),
            {},
        )
        decision = serving.router.Route(route("weather", top_k=3), timeout=TIMEOUT).decision
        assert decision.outcome == decision_pb2.OUTCOME_UNKNOWN


def test_a_batch_is_decided_in_its_order_at_one_revision(serving: Serving) -> None:
    texts = [f"{name} number {n}" for n in range(85) for name in TASKS]
    response = serving.router.BatchRoute(
        messages.BatchRouteRequest(texts=texts, top_k=1), timeout=TIMEOUT
    )
    assert [decision.task for decision in response.decisions] == list(TASKS) * 85
    assert {decision.revision for decision in response.decisions} == {response.revision} == {3}


def test_500_texts_of_a_stream_are_answered_in_order_and_share_batches(serving: Serving) -> None:
    names = [list(TASKS)[n % 3] for n in range(500)]

    def requests() -> Iterator[messages.StreamRouteRequest]:
        serving.encoder.blocked.clear()
        for n, name in enumerate(names):
            if n == 40:  # texts gather behind the first one, however slowly they come
                while serving.served.queued["routing"] < 40:
                    time.sleep(0.001)
                serving.encoder.blocked.set()
            yield messages.StreamRouteRequest(text=f"{name} {n}", id=str(n))

    responses = list(serving.router.StreamRoute(requests(), timeout=TIMEOUT))
    assert [response.id for response in responses] == [str(n) for n in range(500)]
    assert [response.decision.task for response in responses] == names
    assert [len(batch) for batch in serving.encoder.batches[:2]] == [1, 32]


def test_a_bad_text_in_a_stream_gets_an_error_of_its_own(serving: Serving) -> None:
    good = messages.StreamRouteRequest(text="weather", id="good").SerializeToString()
    not_utf8 = b"\x0a\x02\xff\xfe\x1a\x03bad"
    requests = [
        good,
        messages.StreamRouteRequest(text=" ", id="empty").SerializeToString(),
        not_utf8,
        messages.StreamRouteRequest(text="x", top_k=-1, id="k").SerializeToString(),
        good,
    ]
    stream = serving.channel.stream_stream(
        "/router.v1.RouterService/StreamRoute",
        None,
        messages.StreamRouteResponse.FromString,
    )
    responses = list(stream(iter(requests), timeout=TIMEOUT))
    assert [response.id for response in responses] == ["good", "empty", "bad", "k", "good"]
    assert [response.error.field for response in responses] == ["", "text", "text", "top_k", ""]
    assert {response.error.reason for response in responses[1:4]} == {"INVALID_INPUT"}
    assert responses[4].decision.task == "weather"
    assert all(response.revision == 3 for response in responses)


def test_a_stream_that_is_abandoned_leaves_nothing_behind(serving: Serving) -> None:
    def endless() -> Iterator[messages.StreamRouteRequest]:
        while True:
            yield messages.StreamRouteRequest(text="weather")

    call = serving.router.StreamRoute(endless(), timeout=TIMEOUT)
    for _ in range(10):
        read_one(call)
    call.cancel()  # type: ignore[no-untyped-call]
    assert serving.router.Route(route("sport"), timeout=TIMEOUT).decision.task == "sport"


# ---- bad input


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (route(""), "text"),
        (route(" \n\t"), "text"),
        (route("x" * (33 * 1024)), "text"),
        (route("a\0b"), "text"),
        (route("x", top_k=-1), "top_k"),
        (route("x", top_k=101), "top_k"),
    ],
)
def test_a_bad_route_request_is_refused_by_field(
    serving: Serving, request_: messages.RouteRequest, field: str
) -> None:
    assert_invalid(lambda: serving.router.Route(request_, timeout=TIMEOUT), field)


def test_the_refusal_names_the_value_and_the_remedy(serving: Serving) -> None:
    request = route("ä" * (17 * 1024))
    message = assert_invalid(lambda: serving.router.Route(request, timeout=TIMEOUT), "text")
    assert message == "text: 34816 bytes; send at most 32768 bytes of UTF-8"


@pytest.mark.parametrize(
    ("texts", "field"),
    [([], "texts"), (["x"] * 257, "texts"), (["x", "y", "", "z"], "texts[2]")],
)
def test_a_bad_batch_is_refused_by_field(serving: Serving, texts: list[str], field: str) -> None:
    request = messages.BatchRouteRequest(texts=texts)
    assert_invalid(lambda: serving.router.BatchRoute(request, timeout=TIMEOUT), field)


def test_bytes_that_are_not_utf8_are_refused_by_field(serving: Serving) -> None:
    message = assert_invalid(
        lambda: serving.raw("Route")(b"\x0a\x04ab\xff\xfe", timeout=TIMEOUT), "text"
    )
    assert "at byte 2" in message
    second = b"\x0a\x02ok" + b"\x0a\x02\xc3\x28"
    assert_invalid(lambda: serving.raw("BatchRoute")(second, timeout=TIMEOUT), "texts[1]")


def test_bytes_that_are_no_message_are_refused(serving: Serving) -> None:
    assert_invalid(lambda: serving.raw("Route")(b"\xff\xff\xff", timeout=TIMEOUT), "request")


def test_a_message_of_5_megabytes_is_refused_with_the_limit(serving: Serving) -> None:
    request = route("x" * 5_000_000)
    message = assert_invalid(lambda: serving.router.Route(request, timeout=TIMEOUT), "text")
    assert "5000000 bytes" in message


def test_a_message_over_the_request_limit_is_refused_unparsed(serving: Serving) -> None:
    request = route("x" * (serving.settings.limits.max_request_bytes + 1))
    assert_invalid(lambda: serving.router.Route(request, timeout=TIMEOUT), "request")


def test_a_message_over_the_transports_cap_is_refused_by_grpc(serving: Serving) -> None:
    request = route("x" * (3 * serving.settings.limits.max_request_bytes))
    error, _ = failed(lambda: serving.router.Route(request, timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert serving.router.Route(route("weather"), timeout=TIMEOUT).decision.task == "weather"


def test_a_full_batch_of_the_longest_texts_fits_a_request(serving: Serving) -> None:
    limits = serving.settings.limits
    text = "weather " * (limits.max_text_bytes // 8)
    request = messages.BatchRouteRequest(texts=[text] * limits.max_batch_texts)
    response = serving.router.BatchRoute(request, timeout=TIMEOUT)
    assert len(response.decisions) == limits.max_batch_texts


def test_a_defect_is_internal_and_tells_the_client_nothing(
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    serving.encoder.broken = RuntimeError("secret text of a caller")
    error, status = failed(lambda: serving.router.Route(route("weather"), timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert reason(status) == "INTERNAL"
    assert "secret" not in repr(error)
    assert "Traceback" not in repr(error)
    assert ".py" not in repr(error)
    logged = "".join(capsys.readouterr())
    assert "RuntimeError" in logged
    assert "tests/fakes.py" in logged
    assert "secret" not in logged


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("order-7/step:2", True), ("", False), ("two words", False), ("x" * 129, False)],
)
def test_a_call_that_fails_is_named_by_its_request_id(
    serving: Serving, capsys: pytest.CaptureFixture[str], sent: str, kept: bool
) -> None:
    serving.encoder.broken = RuntimeError("a defect")
    metadata = [("x-request-id", sent)] if sent else []
    error, _ = failed(
        lambda: serving.router.Route(route("weather"), timeout=TIMEOUT, metadata=metadata)
    )
    trailers = dict(error.trailing_metadata())
    assert (trailers["x-request-id"] == sent) is kept
    assert trailers["x-request-id"] in "".join(capsys.readouterr())


def test_calls_are_logged_where_that_is_asked_for_and_texts_never(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Serving(make_settings(log_calls=True)) as serving:
        metadata = [("x-request-id", "order-7")]
        serving.router.Route(route("secret weather"), timeout=TIMEOUT, metadata=metadata)
        generate(serving, "a secret story")
        failed(lambda: serving.router.Route(route(""), timeout=TIMEOUT))
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if "request_id" in line]
    assert len(lines) == 3
    for line, parts in zip(
        lines,
        (["order-7", "Route", "OK"], ["Generate", "OK"], ["Route", "INVALID_ARGUMENT"]),
        strict=True,
    ):
        assert all(part in line for part in parts), line
        assert "milliseconds" in line
        assert "secret" not in line


def test_without_being_asked_the_server_logs_no_calls(
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    serving.router.Route(route("weather"), timeout=TIMEOUT)
    assert "request_id" not in "".join(capsys.readouterr())


# ---- answers


def generate(serving: Serving, text: str, **fields: Any) -> list[messages.GenerateResponse]:
    return list(start_generating(serving, text, **fields))


def start_generating(
    serving: Serving, text: str, **fields: Any
) -> grpc.CallIterator[messages.GenerateResponse]:
    request = messages.GenerateRequest(text=text, **fields)
    return serving.router.Generate(request, timeout=TIMEOUT)


def read_one(call: grpc.CallIterator[Received]) -> Received:
    return next(iter(call))


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


# ---- soft prompts


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
        task.record,
        prompt=replace(task.record.prompt, method="prefix", layers=3, hidden_size=16),
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
    ("name", "code"),
    [("", grpc.StatusCode.INVALID_ARGUMENT), ("none", grpc.StatusCode.NOT_FOUND)],
)
def test_a_soft_prompt_of_no_task_is_refused(
    serving: Serving, name: str, code: grpc.StatusCode
) -> None:
    request = messages.GetSoftPromptRequest(task=name)
    error, _ = failed(lambda: list(serving.router.GetSoftPrompt(request, timeout=TIMEOUT)))
    assert error.code() is code


# ---- status and tasks


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


# ---- deadlines, overload, health, reflection, shutdown


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


def assert_overloaded(call: Callable[[], object]) -> None:
    started = time.monotonic()
    error, status = failed(call)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason(status) == "OVERLOADED"
    retry = detail(status, error_details_pb2.RetryInfo)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert 0 < retry.retry_delay.ToMilliseconds() < 10_000
    pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
    assert int(pushback) == retry.retry_delay.ToMilliseconds()
    assert time.monotonic() - started < 1


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


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def health(serving: Serving, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(serving.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT).status)


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
    wait_for(lambda: health(serving, "promptyard.catalog") == states.NOT_SERVING)
    assert health(serving, "") == states.SERVING  # the last good revision goes on being served
    serving.live.problem = ""
    wait_for(lambda: health(serving, "promptyard.catalog") == states.SERVING)


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
