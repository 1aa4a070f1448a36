"""The wire: proto messages <-> values, and errors -> gRPC status (here and nowhere else)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import error_details_pb2, status_pb2

from router.answer import AnswerEvent, AnswerSummary, FinishReason
from router.decision import Decision
from router.errors import InvalidInputError, OverloadedError, PromptyardError
from router.tasks import PromptMethod, ServedTask
from router.v1 import router_service_pb2, task_pb2
from router.wire_decisions import decision_message, decision_value

ERROR_DOMAIN = "promptyard"
INTERNAL = "INTERNAL"

_DETAILS_TRAILER = "grpc-status-details-bin"
# Retry policies of gRPC clients obey this trailer; they do not read RetryInfo. -1: do not retry.
_PUSHBACK_TRAILER = "grpc-retry-pushback-ms"

_CODE_OF_REASON = {
    "INVALID_INPUT": grpc.StatusCode.INVALID_ARGUMENT,
    "TASK_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "TASK_EXISTS": grpc.StatusCode.ALREADY_EXISTS,
    "TASK_OUT_OF_SERVICE": grpc.StatusCode.UNAVAILABLE,
    "TASK_HAS_NO_PROMPT": grpc.StatusCode.FAILED_PRECONDITION,
    "INCOMPATIBLE_MODEL": grpc.StatusCode.FAILED_PRECONDITION,
    "REGISTRATION_REFUSED": grpc.StatusCode.FAILED_PRECONDITION,
    "CORRUPT_ARTIFACT": grpc.StatusCode.DATA_LOSS,
    "CATALOG_UNAVAILABLE": grpc.StatusCode.UNAVAILABLE,
    "CATALOG_BUSY": grpc.StatusCode.ABORTED,
    "STORAGE_FAILED": grpc.StatusCode.INTERNAL,
    "OVERLOADED": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
    "PERMISSION_DENIED": grpc.StatusCode.PERMISSION_DENIED,
    INTERNAL: grpc.StatusCode.INTERNAL,
}

_FINISH_REASONS = {
    FinishReason.STOP: router_service_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: router_service_pb2.FINISH_REASON_LENGTH,
    FinishReason.LABEL: router_service_pb2.FINISH_REASON_LABEL,
    FinishReason.NO_TASK: router_service_pb2.FINISH_REASON_NO_TASK,
}
_FINISH_REASON_VALUES = {message: value for value, message in _FINISH_REASONS.items()}

# Servers of before there were prefixes do not say the method.
PROMPT_METHODS: Mapping[int, PromptMethod] = {
    task_pb2.PROMPT_METHOD_UNSPECIFIED: "prompt",
    task_pb2.PROMPT_METHOD_PROMPT: "prompt",
    task_pb2.PROMPT_METHOD_PREFIX: "prefix",
}
_PROMPT_METHODS = {
    "prompt": task_pb2.PROMPT_METHOD_PROMPT,
    "prefix": task_pb2.PROMPT_METHOD_PREFIX,
}

Request = TypeVar("Request", bound=Message)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that could not be parsed, and why. `id` is its field of that name, if any."""

    error: InvalidInputError
    id: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call ends that failed: status code, message and trailing metadata."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]


def request_reader(
    request: type[Request], max_bytes: int
) -> Callable[[bytes], Request | Unreadable]:
    """A deserialiser that never raises: gRPC would answer UNKNOWN before any of our code ran."""

    def read(raw: bytes) -> Request | Unreadable:
        if len(raw) > max_bytes:
            return Unreadable(
                InvalidInputError(
                    "request", f"{len(raw)} bytes", f"send at most {max_bytes} bytes in one message"
                )
            )
        try:
            return request.FromString(raw)
        except DecodeError:
            return _why_unreadable(request, raw)

    return read


def failure(error: Exception) -> Failure:
    """How a call ends that raised `error`. Of a defect of ours, nothing but its kind is told."""
    if not isinstance(error, PromptyardError):
        message = "the server made a mistake; its log says which"
        info = error_details_pb2.ErrorInfo(reason=INTERNAL, domain=ERROR_DOMAIN)
        return _failure(grpc.StatusCode.INTERNAL, message, [info])
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=ERROR_DOMAIN,
            metadata={"field": error.field, "value": error.value, "remedy": error.remedy},
        )
    ]
    trailers: list[tuple[str, str | bytes]] = []
    if isinstance(error, InvalidInputError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=f"{error.value}; {error.remedy}", reason=error.reason
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, OverloadedError):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after * 1000))
        details.append(retry)
        trailers.append((_PUSHBACK_TRAILER, str(math.ceil(error.retry_after * 1000))))
    if error.reason == "TASK_OUT_OF_SERVICE":
        # UNAVAILABLE invites a retry, but this lasts until somebody repairs the task.
        trailers.append((_PUSHBACK_TRAILER, "-1"))
    return _failure(_CODE_OF_REASON[error.reason], str(error), details, trailers)


def stream_error_message(error: PromptyardError) -> router_service_pb2.StreamError:
    """An error as one item of a stream."""
    return router_service_pb2.StreamError(
        reason=error.reason, field=error.field, message=str(error)
    )


def answer_message(event: AnswerEvent, revision: int) -> router_service_pb2.GenerateResponse:
    """One step of an answer to its message."""
    response = router_service_pb2.GenerateResponse(revision=revision)
    match event:
        case Decision():
            response.decision.CopyFrom(decision_message(event))
        case str():
            response.piece = event
        case AnswerSummary():
            response.summary.finish_reason = _FINISH_REASONS[event.finish_reason]
            response.summary.input_tokens = event.input_tokens
            response.summary.prompt_tokens = event.prompt_tokens
            response.summary.output_tokens = event.output_tokens
            response.summary.truncated = event.truncated
    return response


def answer_value(response: router_service_pb2.GenerateResponse) -> AnswerEvent:
    """The step that `answer_message` wrote."""
    match response.WhichOneof("event"):
        case "decision":
            return decision_value(response.decision)
        case "piece":
            return response.piece
        case _:
            summary = response.summary
            return AnswerSummary(
                _FINISH_REASON_VALUES[summary.finish_reason],
                summary.input_tokens,
                summary.prompt_tokens,
                summary.output_tokens,
                summary.truncated,
            )


def task_message(task: ServedTask, threshold: float) -> task_pb2.Task:
    """A served task to its message."""
    record = task.record
    message = task_pb2.Task(
        name=record.name,
        revision=record.revision,
        description=record.description,
        created_at=timestamp(datetime.fromisoformat(record.created_at)),
        record_sha256=record.sha256,
        examples=record.data.rows,
        outputs=record.outputs or (),
        threshold=threshold,
        out_of_service=task.problem,
    )
    if record.prompt is not None:
        message.prompt.sha256 = record.prompt.sha256
        message.prompt.tokens = record.prompt.tokens
        message.prompt.base_model = record.prompt.base_model
        message.prompt.validation_score = record.prompt.scores.get("prompt", 0.0)
        message.prompt.method = prompt_method_message(record.prompt.method)
    return message


def prompt_method_message(method: PromptMethod) -> task_pb2.PromptMethod.ValueType:
    """A prompt's method to its message; unspecified for one that this version does not know."""
    return _PROMPT_METHODS.get(method, task_pb2.PROMPT_METHOD_UNSPECIFIED)


def timestamp(at: datetime) -> Timestamp:
    """A time with its zone to its message."""
    message = Timestamp()
    message.FromDatetime(at)
    return message


def _failure(
    code: grpc.StatusCode,
    message: str,
    details: list[Message],
    trailers: list[tuple[str, str | bytes]] | None = None,
) -> Failure:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return Failure(
        code, message, ((_DETAILS_TRAILER, status.SerializeToString()), *(trailers or ()))
    )


def _why_unreadable(request: type[Request], raw: bytes) -> Unreadable:
    """Find the string field that is not UTF-8: to an empty message, every field is unknown."""
    name = request.DESCRIPTOR.full_name
    error = InvalidInputError(
        "request", f"{len(raw)} bytes", f"send a {name} in the wire format of protobuf"
    )
    request_id = ""
    try:
        parts = UnknownFieldSet(Empty.FromString(raw))
    except DecodeError:
        return Unreadable(error)
    occurrences: dict[str, int] = {}
    for part in (parts[position] for position in range(len(parts))):
        field = request.DESCRIPTOR.fields_by_number.get(part.field_number)
        if field is None or field.type != FieldDescriptor.TYPE_STRING:
            continue
        if not isinstance(part.data, bytes):
            continue  # a number under a text's field number
        index = occurrences[field.name] = occurrences.get(field.name, -1) + 1
        try:
            text = part.data.decode()
        except UnicodeDecodeError as problem:
            error = InvalidInputError(
                f"{field.name}[{index}]" if field.is_repeated else field.name,
                f"{problem.object[problem.start : problem.start + 8]!r} at byte {problem.start}",
                "encode the text as UTF-8",
            )
        else:
            request_id = text if field.name == "id" else request_id
    return Unreadable(error, request_id)
