"""The two services: requests to calls of the use case, and its values to responses. Nothing else.

Errors are raised as they are: `router.edge` turns them into gRPC status.
"""

# ruff: noqa: N802, ARG002 - names and parameters are those of the generated base classes.
from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from bisect import bisect_right
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from router.decision import Decision
from router.edge import Context
from router.errors import InvalidInputError, PromptyardError
from router.routing import Router, usable_prompt
from router.snapshot import Snapshot
from router.v1 import router_service_pb2 as messages
from router.v1 import task_pb2
from router.v1 import task_service_pb2 as task_messages
from router.v1.router_service_pb2_grpc import RouterServiceServicer
from router.v1.task_service_pb2_grpc import TaskServiceServicer
from router.wire import (
    Unreadable,
    answer_message,
    prompt_method_message,
    stream_error_message,
    task_message,
    timestamp,
)
from router.wire_decisions import decision_message, explanation_message, rejection_value

CHUNK_BYTES = 64 * 1024
# Texts of one stream that are being decided at the same time: enough to fill batches.
STREAM_WINDOW = 64

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
_CONTINUES_AFTER = "after:"


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What GetStatus says of the process itself."""

    version: str
    started_at: datetime


class RouterServicer(RouterServiceServicer):
    """`router.v1.RouterService`."""

    def __init__(self, router: Router, facts: ServerFacts) -> None:
        self._router = router
        self._facts = facts

    async def Route(
        self, request: messages.RouteRequest, context: Context
    ) -> messages.RouteResponse:
        """One text, one decision."""
        policy = rejection_value(request.on_unknown)
        if request.explain:
            decision, why = await self._router.explain(
                request.text, request.top_k, policy, request.request_key
            )
            return messages.RouteResponse(
                decision=decision_message(decision),
                revision=decision.revision,
                explanation=explanation_message(why),
            )
        decision = await self._router.route(
            request.text, request.top_k, policy, request.request_key
        )
        return messages.RouteResponse(
            decision=decision_message(decision), revision=decision.revision
        )

    async def BatchRoute(
        self, request: messages.BatchRouteRequest, context: Context
    ) -> messages.BatchRouteResponse:
        """Many texts at one revision."""
        policy = rejection_value(request.on_unknown)
        decisions = await self._router.route_batch(
            request.texts, request.top_k, policy, request.request_key
        )
        return messages.BatchRouteResponse(
            decisions=[decision_message(decision) for decision in decisions],
            revision=decisions[0].revision,
        )

    async def StreamRoute(
        self,
        request_iterator: AsyncIterator[messages.StreamRouteRequest | Unreadable],
        context: Context,
    ) -> AsyncIterator[messages.StreamRouteResponse]:
        """Texts are read ahead, so that they share batches; responses keep their order."""
        room = asyncio.Semaphore(STREAM_WINDOW)
        answers: asyncio.Queue[asyncio.Task[messages.StreamRouteResponse] | None] = asyncio.Queue()

        async def read_ahead() -> None:
            async for request in request_iterator:
                await room.acquire()
                answers.put_nowait(asyncio.create_task(self._answer_one(request)))

        reader = asyncio.create_task(read_ahead())
        reader.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                room.release()
            await reader
        finally:
            reader.cancel()
            while not answers.empty():
                if (answer := answers.get_nowait()) is not None:
                    answer.add_done_callback(_forget)
                    answer.cancel()

    async def Generate(
        self, request: messages.GenerateRequest, context: Context
    ) -> AsyncIterator[messages.GenerateResponse]:
        """The decision, pieces of text, a summary."""
        events = self._router.generate(
            request.text,
            task=request.task,
            context=request.context,
            max_output_tokens=request.max_output_tokens,
            top_k=request.top_k,
            on_unknown=rejection_value(request.on_unknown),
            request_key=request.request_key,
        )
        revision = 0
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Decision):
                    revision = event.revision
                yield answer_message(event, revision)

    async def GetSoftPrompt(
        self, request: messages.GetSoftPromptRequest, context: Context
    ) -> AsyncIterator[messages.GetSoftPromptResponse]:
        """The description, then the tensor in chunks."""
        snapshot = self._router.live.snapshot
        name = _required("task", request.task)
        task = snapshot.task_at(name, request.revision) if request.revision else snapshot.task(name)
        prompt = usable_prompt(task)
        tensor = np.ascontiguousarray(prompt.values, dtype="<f4").tobytes()
        yield messages.GetSoftPromptResponse(
            description=messages.SoftPromptDescription(
                task=task.record.name,
                task_revision=task.record.revision,
                shape=prompt.shape,
                dtype="float32",
                sha256=hashlib.sha256(tensor).hexdigest(),
                base_model=prompt.base_model,
                size_bytes=len(tensor),
                method=prompt_method_message(prompt.method),
            ),
            revision=snapshot.revision,
        )
        for start in range(0, len(tensor), CHUNK_BYTES):
            yield messages.GetSoftPromptResponse(
                chunk=tensor[start : start + CHUNK_BYTES], revision=snapshot.revision
            )

    async def GetStatus(
        self, request: messages.GetStatusRequest, context: Context
    ) -> messages.GetStatusResponse:
        """What is being served."""
        live, answerer = self._router.live, self._router.answerer
        snapshot = live.snapshot
        response = messages.GetStatusResponse(
            revision=snapshot.revision,
            newest_revision=live.newest_revision,
            problem=live.problem,
            tasks=len(snapshot.tasks),
            out_of_service=[
                messages.OutOfService(
                    task=task.record.name, task_revision=task.record.revision, problem=task.problem
                )
                for task in snapshot.tasks.values()
                if task.problem
            ],
            encoder=messages.ModelStatus(
                name=self._router.encoder.name, fingerprint=self._router.encoder.fingerprint
            ),
            head=snapshot.head.kind,
            version=self._facts.version,
            started_at=timestamp(self._facts.started_at),
            max_text_bytes=self._router.limits.max_text_bytes,
            max_batch_texts=self._router.limits.max_batch_texts,
            on_unknown=str(snapshot.rejection),
            fallback_missing=not snapshot.rejection.is_served(snapshot.tasks),
            challengers=_challenger_messages(snapshot),
        )
        if answerer is not None:
            response.base_model.name = answerer.model.name
            response.base_model.fingerprint = answerer.model.fingerprint
        return response

    async def _answer_one(
        self, request: messages.StreamRouteRequest | Unreadable
    ) -> messages.StreamRouteResponse:
        try:
            if isinstance(request, Unreadable):
                raise request.error
            policy = rejection_value(request.on_unknown)
            decision = await self._router.route(
                request.text, request.top_k, policy, request.request_key
            )
        except PromptyardError as error:
            return messages.StreamRouteResponse(
                error=stream_error_message(error),
                id=request.id,
                revision=self._router.live.snapshot.revision,
            )
        return messages.StreamRouteResponse(
            decision=decision_message(decision), id=request.id, revision=decision.revision
        )


class TaskServicer(TaskServiceServicer):
    """`router.v1.TaskService`."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def GetTask(
        self, request: task_messages.GetTaskRequest, context: Context
    ) -> task_messages.GetTaskResponse:
        """One task at the served revision."""
        snapshot = self._router.live.snapshot
        name = snapshot.task(_required("name", request.name)).record.name
        [task] = _task_messages(snapshot, [name])
        return task_messages.GetTaskResponse(task=task, revision=snapshot.revision)

    async def ListTasks(
        self, request: task_messages.ListTasksRequest, context: Context
    ) -> task_messages.ListTasksResponse:
        """A page of tasks. A listing that spans revisions neither repeats nor skips old tasks."""
        snapshot = self._router.live.snapshot
        if not 0 <= request.page_size <= MAX_PAGE_SIZE:
            raise InvalidInputError(
                "page_size",
                request.page_size,
                f"send 1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}",
            )
        names = sorted(snapshot.tasks)
        start = bisect_right(names, _last_name(request.page_token)) if request.page_token else 0
        end = start + (request.page_size or DEFAULT_PAGE_SIZE)
        return task_messages.ListTasksResponse(
            tasks=_task_messages(snapshot, names[start:end]),
            next_page_token=_page_token(names[end - 1]) if end < len(names) else "",
            revision=snapshot.revision,
        )


def _forget(answer: asyncio.Task[messages.StreamRouteResponse]) -> None:
    """Look at the outcome that nobody waits for, so that asyncio does not log it with its text."""
    if not answer.cancelled():
        answer.exception()


def _task_messages(snapshot: Snapshot, names: list[str]) -> list[task_pb2.Task]:
    thresholds = dict(zip(snapshot.head.tasks, snapshot.head.thresholds, strict=True))
    tasks = [snapshot.task(name) for name in names]
    return [task_message(task, thresholds[task.record.key]) for task in tasks]


def _challenger_messages(snapshot: Snapshot) -> list[messages.Challenger]:
    found = {each.challenge: "" for each in snapshot.challengers.values()}
    found |= snapshot.broken_challengers
    return [
        messages.Challenger(
            task=challenge.task,
            current_revision=snapshot.task(challenge.task).record.revision,
            challenger_revision=challenge.revision,
            share=challenge.share,
            problem=problem,
        )
        for challenge, problem in sorted(found.items(), key=lambda each: each[0].task)
    ]


def _required(field: str, value: str) -> str:
    if not value:
        raise InvalidInputError(field, "''", "name a task; ListTasks lists them")
    return value


def _page_token(last_name: str) -> str:
    return base64.urlsafe_b64encode(f"{_CONTINUES_AFTER}{last_name}".encode()).decode()


def _last_name(token: str) -> str:
    """The name that a page ended with, from the token that `_page_token` made."""
    try:
        content = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode()
    except (UnicodeError, binascii.Error):
        content = ""
    if not content.startswith(_CONTINUES_AFTER):
        raise InvalidInputError(
            "page_token", token, "send the next_page_token of the page before, or none"
        )
    return content.removeprefix(_CONTINUES_AFTER)
