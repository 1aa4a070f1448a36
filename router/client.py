"""A thin client: values in, values out, deadlines, retries. Loads no model and no index."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from router.answer import AnswerEvent
from router.decision import Decision
from router.errors import InvalidInputError
from router.explanation import Explanation
from router.rejection import RejectionPolicy
from router.tasks import SoftPrompt
from router.v1 import router_service_pb2 as messages
from router.v1 import task_pb2
from router.v1 import task_service_pb2 as task_messages
from router.v1.router_service_pb2_grpc import RouterServiceStub
from router.v1.task_service_pb2_grpc import TaskServiceStub
from router.wire import PROMPT_METHODS, answer_value
from router.wire_decisions import decision_value, explanation_value, rejection_message

Response = TypeVar("Response")

DEFAULT_TARGET = "127.0.0.1:50051"

# Every method only reads, so that all of them may be tried again. A server that wants no retry
# says so in its answer (`grpc-retry-pushback-ms`).
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": "router.v1.RouterService"},
                {"service": "router.v1.TaskService"},
            ],
            "retryPolicy": {
                # In all about 3 seconds: a server that restarts is back by then.
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # A server that fails most calls gets no retries on top.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
_OPTIONS = [
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 30_000),
    # By default a lost connection is first tried again after a second, retries or not.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # gRPC would let all clients of a process share one connection, and so one worker of a server.
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files for TLS. All of them may be left out.

    `ca` is the server's authority; without it those count that the system trusts. `certificate`
    and `key` are the client's own, for a server that asks for one.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class RouterError(Exception):
    """A call that failed.

    `reason` is the name of an ErrorReason where the server gave one (`TASK_NOT_FOUND`), otherwise
    of the gRPC status (`DEADLINE_EXCEEDED`). `field` is the field at fault, `value` what was found
    there and `remedy` what to do about it, where the server says so; else they are empty.
    `request_id` is what the server's log calls the call.
    """

    request_id = ""

    def __init__(
        self, reason: str, message: str, field: str = "", value: str = "", remedy: str = ""
    ) -> None:
        self.reason = reason
        self.message = message
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(f"{reason}: {message}")


class RouterClient:
    """Calls a Promptyard server, on one connection. Thread-safe; close it, or use it in a `with`.

    `on_unknown` says which task is used for a text that fits none; None: as the catalog says.
    `request_key` says whose request it is: where a challenger shares the texts of a task, all
    requests of one key are answered by the same revision, those without one by the current one.

    Every method may raise RouterError.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float = 10.0,
        stream_timeout: float = 300.0,
        token: str = "",
        tls: ClientTls | None = None,
    ) -> None:
        """`target` is HOST:PORT. The timeouts (seconds) bound a single call, and a whole stream.

        `token` is sent with every call, for a server that asks for one. Without `tls` everybody on
        the way can read it, and the texts. Nothing is sent before the first call.

        Raises:
            InvalidInputError: a file of `tls` cannot be read.
        """
        self._timeout = timeout
        self._stream_timeout = stream_timeout
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        if tls is None:
            self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, _credentials(tls), options=_OPTIONS)
        self._router = RouterServiceStub(self._channel)
        self._tasks = TaskServiceStub(self._channel)

    def __enter__(self) -> RouterClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that are running are cancelled."""
        self._channel.close()

    def route(
        self,
        text: str,
        top_k: int = 0,
        *,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> Decision:
        """The decision on one text."""
        policy = rejection_message(on_unknown)
        request = messages.RouteRequest(
            text=text, top_k=top_k, on_unknown=policy, request_key=request_key
        )
        with _router_errors():
            return decision_value(
                self._router.Route(request, timeout=self._timeout, metadata=self._metadata).decision
            )

    def explain(
        self,
        text: str,
        top_k: int = 0,
        *,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> tuple[Decision, Explanation]:
        """The decision on one text, and why it is what it is."""
        policy = rejection_message(on_unknown)
        request = messages.RouteRequest(
            text=text, top_k=top_k, on_unknown=policy, explain=True, request_key=request_key
        )
        with _router_errors():
            response = self._router.Route(request, timeout=self._timeout, metadata=self._metadata)
        return decision_value(response.decision), explanation_value(response.explanation)

    def batch_route(
        self,
        texts: Sequence[str],
        top_k: int = 0,
        *,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> list[Decision]:
        """One decision per text, all at one catalog revision."""
        policy = rejection_message(on_unknown)
        request = messages.BatchRouteRequest(
            texts=texts, top_k=top_k, on_unknown=policy, request_key=request_key
        )
        with _router_errors():
            response = self._router.BatchRoute(
                request, timeout=self._timeout, metadata=self._metadata
            )
        return [decision_value(decision) for decision in response.decisions]

    def stream_route(
        self,
        texts: Iterable[str],
        top_k: int = 0,
        *,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> Iterator[Decision | RouterError]:
        """One result per text, in order. A bad text gives its error as the result, unraised."""
        policy = rejection_message(on_unknown)
        requests = (
            messages.StreamRouteRequest(
                text=text, top_k=top_k, on_unknown=policy, request_key=request_key
            )
            for text in texts
        )
        with _reading(
            self._router.StreamRoute(
                requests, timeout=self._stream_timeout, metadata=self._metadata
            )
        ) as responses:
            for response in responses:
                if response.HasField("decision"):
                    yield decision_value(response.decision)
                else:
                    error = response.error
                    yield RouterError(error.reason, error.message, error.field)

    def generate(
        self,
        text: str,
        *,
        task: str = "",
        context: Sequence[str] = (),
        max_output_tokens: int = 0,
        top_k: int = 0,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> Iterator[AnswerEvent]:
        """The decision, pieces of the answer, then a summary. Closing the iterator cancels."""
        request = messages.GenerateRequest(
            text=text,
            task=task,
            context=context,
            max_output_tokens=max_output_tokens,
            top_k=top_k,
            on_unknown=rejection_message(on_unknown),
            request_key=request_key,
        )
        with _reading(
            self._router.Generate(request, timeout=self._stream_timeout, metadata=self._metadata)
        ) as responses:
            for response in responses:
                yield answer_value(response)

    def get_soft_prompt(self, task: str, revision: int = 0) -> SoftPrompt:
        """The task's soft prompt `[P, W]`, its bytes checked against the digest.

        `revision` is the task's: the current one (0), or that of its challenger.
        """
        import numpy as np

        with _router_errors():
            parts = list(
                self._router.GetSoftPrompt(
                    messages.GetSoftPromptRequest(task=task, revision=revision),
                    timeout=self._timeout,
                    metadata=self._metadata,
                )
            )
        description = parts[0].description
        tensor = b"".join(part.chunk for part in parts[1:])
        if hashlib.sha256(tensor).hexdigest() != description.sha256:
            raise RouterError("DATA_LOSS", f"the prompt of {task} arrived damaged; try again")
        if description.method not in PROMPT_METHODS:
            raise RouterError(
                "UNIMPLEMENTED",
                f"the prompt of {task} is of method {description.method}, which this client does"
                " not know; upgrade it",
            )
        tokens, *shape = description.shape
        values = np.frombuffer(tensor, "<f4").astype(np.float32).reshape(tokens, -1)
        method = PROMPT_METHODS[description.method]
        layers = int(shape[0]) if method == "prefix" else 0
        return SoftPrompt(values, description.base_model, method, layers)

    def status(self) -> messages.GetStatusResponse:
        """What is being served."""
        with _router_errors():
            return self._router.GetStatus(
                messages.GetStatusRequest(), timeout=self._timeout, metadata=self._metadata
            )

    def list_tasks(self) -> Iterator[task_pb2.Task]:
        """Every task, by name, fetched page by page."""
        request = task_messages.ListTasksRequest()
        while True:
            with _router_errors():
                response = self._tasks.ListTasks(
                    request, timeout=self._timeout, metadata=self._metadata
                )
            yield from response.tasks
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def get_task(self, name: str) -> task_pb2.Task:
        """One task."""
        request = task_messages.GetTaskRequest(name=name)
        with _router_errors():
            return self._tasks.GetTask(request, timeout=self._timeout, metadata=self._metadata).task


def _credentials(tls: ClientTls) -> grpc.ChannelCredentials:
    def read(path: Path | None) -> bytes | None:
        try:
            return None if path is None else path.read_bytes()
        except OSError as error:
            raise InvalidInputError(
                f"tls {path}", error.strerror or error, "give a PEM file that can be read"
            ) from error

    return grpc.ssl_channel_credentials(read(tls.ca), read(tls.key), read(tls.certificate))


@contextlib.contextmanager
def _router_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        call = cast("grpc.Call", error)
        failed = _router_error(call)
        trailers = dict(call.trailing_metadata() or ())
        failed.request_id = str(trailers.get("x-request-id", ""))
        raise failed from None


@contextlib.contextmanager
def _reading(call: grpc.CallIterator[Response]) -> Iterator[Iterator[Response]]:
    """The responses of a stream, which is cancelled when its reader leaves early."""
    with _router_errors():
        try:
            yield iter(call)
        finally:
            call.cancel()  # type: ignore[no-untyped-call]


def _router_error(call: grpc.Call) -> RouterError:
    code, message = call.code(), call.details() or ""
    status = rpc_status.from_call(call)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        if detail.Unpack(info):
            found = (info.metadata.get(key, "") for key in ("field", "value", "remedy"))
            return RouterError(info.reason, message, *found)
    return RouterError(code.name, message)
