"""Values to messages and back, requests that cannot be read, and errors to gRPC status."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

import router.errors
from router.answer import AnswerSummary, FinishReason
from router.decision import Candidate, Decision, Outcome, Use
from router.errors import (
    InvalidInputError,
    OverloadedError,
    PromptyardError,
    TaskNotFoundError,
    TaskOutOfServiceError,
)
from router.explanation import ExplainedCandidate, Explanation, ScoreTerm, StoredExample
from router.rejection import RejectionPolicy
from router.tasks import TaskKey
from router.v1 import decision_pb2, error_reason_pb2, explanation_pb2
from router.v1 import router_service_pb2 as messages
from router.wire import (
    Unreadable,
    answer_message,
    answer_value,
    failure,
    request_reader,
    stream_error_message,
    task_message,
)
from router.wire_decisions import (
    decision_message,
    decision_value,
    explanation_message,
    explanation_value,
    rejection_message,
    rejection_value,
)
from tests.fakes import make_task, without_prompt

PROJECT_ERRORS = [
    value
    for value in vars(router.errors).values()
    if isinstance(value, type) and issubclass(value, PromptyardError)
]

keys = st.builds(TaskKey, st.text(min_size=1), st.integers(1, 2**62))
decisions = st.builds(
    Decision,
    st.sampled_from(Outcome),
    st.none() | keys,
    *[st.floats(allow_nan=False)] * 3,
    st.integers(0, 2**62),
    st.booleans(),
    st.lists(st.builds(Candidate, keys, *[st.floats(allow_nan=False)] * 2), max_size=3).map(tuple),
    st.none() | keys,
    st.sampled_from(Use),
    st.none() | st.floats(0, 1),
)

numbers = st.floats(allow_nan=False)
explanations = st.builds(
    Explanation,
    st.text(),
    st.lists(
        st.builds(
            ExplainedCandidate,
            keys,
            *[numbers] * 3,
            st.lists(st.builds(ScoreTerm, st.text(), numbers), max_size=2).map(tuple),
            st.lists(st.builds(StoredExample, st.integers(0, 9), numbers), max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
    numbers,
    st.lists(st.text(), max_size=2).map(tuple),
)


@given(decisions)
def test_a_decision_survives_the_wire(decision: Decision) -> None:
    raw = decision_message(decision).SerializeToString()
    assert decision_value(decision_pb2.Decision.FromString(raw)) == decision


@pytest.mark.parametrize(
    "event",
    [
        "a piece",
        AnswerSummary(FinishReason.LENGTH, 5, 20, 64, truncated=True),
        Decision(Outcome.MATCHED, TaskKey("a", 1), 0.5, math.inf, 0.1, 7, truncated=False),
    ],
)
def test_a_step_of_an_answer_survives_the_wire(event: Any) -> None:
    raw = answer_message(event, 7).SerializeToString()
    message = messages.GenerateResponse.FromString(raw)
    assert answer_value(message) == event
    assert message.revision == 7


def test_a_decision_of_a_server_that_knows_no_policies_uses_its_task() -> None:
    for outcome, task, use in (
        (decision_pb2.OUTCOME_MATCHED, TaskKey("a", 2), Use.MATCHED),
        (decision_pb2.OUTCOME_UNKNOWN, None, Use.ABSTAINED),
    ):
        message = decision_pb2.Decision(outcome=outcome)
        if task is not None:
            message.task, message.task_revision = task.name, task.revision
        decision = decision_value(message)
        assert (decision.used, decision.use) == (task, use)


@given(explanations)
def test_an_explanation_survives_the_wire(explanation: Explanation) -> None:
    raw = explanation_message(explanation).SerializeToString()
    assert explanation_value(explanation_pb2.Explanation.FromString(raw)) == explanation


@pytest.mark.parametrize(
    "policy",
    [None, *map(RejectionPolicy.parse, ("abstain", "best", "fallback:help.desk-2"))],
    ids=str,
)
def test_a_rejection_policy_survives_the_wire(policy: RejectionPolicy | None) -> None:
    request = messages.RouteRequest(text="x", on_unknown=rejection_message(policy))
    raw = request.SerializeToString()
    assert rejection_value(messages.RouteRequest.FromString(raw).on_unknown) == policy


@pytest.mark.parametrize(
    ("action", "task", "field"),
    [
        (9, "", "on_unknown.action"),
        (0, "help", "on_unknown.action"),
        (decision_pb2.REJECTION_ACTION_FALLBACK, "", "on_unknown.fallback_task"),
        (decision_pb2.REJECTION_ACTION_FALLBACK, "../help", "on_unknown.fallback_task"),
        (decision_pb2.REJECTION_ACTION_FALLBACK, "x" * 101, "on_unknown.fallback_task"),
        (decision_pb2.REJECTION_ACTION_BEST, "help", "on_unknown.fallback_task"),
        (decision_pb2.REJECTION_ACTION_ABSTAIN, "help", "on_unknown.fallback_task"),
    ],
)
def test_a_rejection_policy_that_makes_no_sense_is_refused_by_field(
    action: Any, task: str, field: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        rejection_value(decision_pb2.RejectionPolicy(action=action, fallback_task=task))
    assert caught.value.field == field


def test_every_outcome_and_finish_reason_has_a_message() -> None:
    for outcome in Outcome:
        assert (
            f"OUTCOME_{outcome.name}"
            in decision_pb2.DESCRIPTOR.enum_types_by_name["Outcome"].values_by_name
        )
    for reason in FinishReason:
        assert (
            f"FINISH_REASON_{reason.name}"
            in messages.DESCRIPTOR.enum_types_by_name["FinishReason"].values_by_name
        )


def test_a_task_without_a_prompt_has_none_on_the_wire() -> None:
    message = task_message(without_prompt(make_task("weather", None)), threshold=0.5)
    assert not message.HasField("prompt")
    assert not message.outputs


# ---- requests


def test_a_readable_request_is_read() -> None:
    raw = messages.RouteRequest(text="ä", top_k=2).SerializeToString()
    request = request_reader(messages.RouteRequest, 100)(raw)
    assert isinstance(request, messages.RouteRequest)
    assert (request.text, request.top_k) == ("ä", 2)


@pytest.mark.parametrize(
    ("request_", "raw", "field"),
    [
        (messages.RouteRequest, b"\x0a\x02\xff\xfe", "text"),
        (messages.BatchRouteRequest, b"\x0a\x01a\x0a\x01\xff", "texts[1]"),
        (messages.GenerateRequest, b"\x0a\x01a\x12\x02\xc3\x28", "task"),
        (messages.GenerateRequest, b"\x1a\x01a\x1a\x01b\x1a\x01\x80", "context[2]"),
        (messages.RouteRequest, b"\x0a\xff", "request"),
        (messages.RouteRequest, b"x" * 101, "request"),
    ],
)
def test_an_unreadable_request_is_told_by_field(
    request_: type[Message], raw: bytes, field: str
) -> None:
    found = request_reader(request_, 100)(raw)
    assert isinstance(found, Unreadable)
    assert found.error.field == field


def test_a_number_in_the_place_of_a_text_does_not_hide_the_text_that_is_at_fault() -> None:
    read = request_reader(messages.RouteRequest, 100)
    unreadable = read(b"\x08\x07" + b"\x0a\x02\xff\xfe")
    assert isinstance(unreadable, Unreadable)
    assert unreadable.error.field == "text"


def test_an_unreadable_request_keeps_its_id() -> None:
    found = request_reader(messages.StreamRouteRequest, 100)(b"\x0a\x01\xff\x1a\x02no")
    assert isinstance(found, Unreadable)
    assert found.id == "no"


@given(st.binary(max_size=120))
def test_no_bytes_make_the_reader_raise(raw: bytes) -> None:
    for request in (messages.StreamRouteRequest, messages.GenerateRequest):
        assert isinstance(request_reader(request, 100)(raw), Unreadable | request)


# ---- errors


def status_of(error: Exception) -> status_pb2.Status:
    trailers = dict(failure(error).trailers)
    return status_pb2.Status.FromString(trailers["grpc-status-details-bin"])


def detail(error: Exception, kind: type[Message]) -> Any:
    found = kind()
    return found if any(packed.Unpack(found) for packed in status_of(error).details) else None


@pytest.mark.parametrize("kind", PROJECT_ERRORS)
def test_every_error_has_a_reason_of_the_contract_and_a_status(
    kind: type[PromptyardError],
) -> None:
    error = kind("field", "value", "remedy")
    ending = failure(error)
    assert (
        f"ERROR_REASON_{kind.reason}"
        in error_reason_pb2.DESCRIPTOR.enum_types_by_name["ErrorReason"].values_by_name
    )
    assert ending.message == status_of(error).message == "field: value; remedy"
    assert status_of(error).code == ending.code.value[0]
    info = detail(error, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (kind.reason, "promptyard")
    assert dict(info.metadata) == {"field": "field", "value": "value", "remedy": "remedy"}


@pytest.mark.parametrize("kind", [kind for kind in PROJECT_ERRORS if kind is not PromptyardError])
def test_the_status_is_the_one_that_the_error_tree_draws(kind: type[PromptyardError]) -> None:
    drawing = (router.errors.__doc__ or "").splitlines()
    [line] = [line for line in drawing if f" {kind.__name__} " in line]
    assert line.split()[-2:] == [kind.reason, failure(kind("f", "v", "r")).code.name]


def test_bad_input_names_the_field() -> None:
    error = InvalidInputError("texts[3]", "40000 bytes", "send at most 32768 bytes")
    [violation] = detail(error, error_details_pb2.BadRequest).field_violations
    assert violation.field == "texts[3]"
    assert violation.description == "40000 bytes; send at most 32768 bytes"
    assert detail(TaskNotFoundError("task", "x", "y"), error_details_pb2.BadRequest) is None


def test_overload_says_when_to_come_back() -> None:
    error = OverloadedError("queue", "full", "try again", retry_after=0.25)
    assert failure(error).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 250
    assert dict(failure(error).trailers)["grpc-retry-pushback-ms"] == "250"


def test_a_task_out_of_service_wants_no_retry() -> None:
    error = TaskOutOfServiceError("task", "x", "y")
    assert dict(failure(error).trailers)["grpc-retry-pushback-ms"] == "-1"


def test_a_defect_tells_nothing_but_that_it_is_one() -> None:
    error = ValueError("secret")
    ending = failure(error)
    assert ending.code is grpc.StatusCode.INTERNAL
    assert "secret" not in repr(ending)
    assert detail(error, error_details_pb2.ErrorInfo).reason == "INTERNAL"


def test_an_error_in_a_stream_carries_reason_field_and_message() -> None:
    message = stream_error_message(InvalidInputError("text", "''", "send a text"))
    assert (message.reason, message.field) == ("INVALID_INPUT", "text")
    assert message.message == "text: ''; send a text"
