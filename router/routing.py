"""The use case: decide which task a text belongs to, and answer under that task's prompt."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol, cast

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from router.answer import AnswerEvent, AnswerSummary, FinishReason
from router.answering import Answerer, Question
from router.batching import BatchLimits, MicroBatcher
from router.challenging import named, with_challengers
from router.decision import Decision
from router.errors import (
    InvalidInputError,
    NoPromptError,
    TaskNotFoundError,
    TaskOutOfServiceError,
)
from router.explaining import LEAST_EXPLAINED, Explainer
from router.explanation import Explanation
from router.interfaces import (
    Embeddings,
    Encoder,
    FloatArray,
    Generation,
    Observer,
    PromptedInput,
)
from router.label_classifier import ClassifierInput
from router.limits import Limits
from router.observing import UNOBSERVED
from router.rejection import RejectionPolicy
from router.snapshot import Snapshot
from router.tasks import ServedTask, SoftPrompt
from router.templates import fill
from router.tracing import stage


class Live(Protocol):
    """What is being served. `snapshot` may be another one at the next look: look once."""

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot of the catalog revision that is being served."""

    @property
    def newest_revision(self) -> int:
        """The newest revision in the catalog."""

    @property
    def problem(self) -> str:
        """Why the newest revision is not being served; empty where it is."""


@dataclass(frozen=True, slots=True, eq=False)
class _Question:
    """One text in the encoder's queue, the snapshot that its caller took, and the policy.

    `decided` is the decision where a caller named the task: only the embedding is asked for.
    `full`: the full encoder decides, whatever the fast one says.
    """

    text: str
    top_k: int
    snapshot: Snapshot
    rejection: RejectionPolicy
    request_key: str = ""
    decided: Decision | None = None
    full: bool = False


@dataclass(frozen=True, slots=True)
class _Batch:
    """When (`time.perf_counter`) a batch of so many texts began, was encoded, and was decided."""

    texts: int
    began: float
    encoded: float
    decided: float


@dataclass(frozen=True, slots=True, eq=False)
class _Routed:
    """The decision on a text, its embedding `[D]`, and the batch that it was in.

    The embedding is None where the fast encoder decided.
    """

    decision: Decision
    vector: FloatArray | None
    batch: _Batch


class Router:
    """Routes texts and answers them. Belongs to one event loop; the models run in threads.

    `on_unknown` says which task is used for a text that fits none; None: as the catalog says.
    `request_key` says which revision answers where a challenger shares the texts of a task: all
    requests of one key get the same one, those without a key the current one.

    Every method checks its input, and may raise:
        InvalidInputError: a field is malformed or over a limit.
        TaskNotFoundError: `on_unknown` falls back to a task that is not served.
        OverloadedError: too much is waiting already.
    """

    def __init__(
        self,
        live: Live,
        encoder: Encoder,
        answerer: Answerer | None,
        limits: Limits,
        batch_limits: BatchLimits,
        observer: Observer = UNOBSERVED,
        explainer: Explainer | None = None,
        note: Callable[[Sequence[tuple[str, Decision]]], None] | None = None,
    ) -> None:
        """`note` is told the texts of every batch and their decisions, in the worker thread.

        These are of the snapshot's own head, also where a challenger answers, and list the best
        candidate, whatever the caller wants listed.
        """
        self.live = live
        self.encoder = encoder
        self.answerer = answerer
        self.limits = limits
        self.observer = observer
        self._explainer = explainer
        self._note = note
        self._batch_tokens = batch_limits.batch_tokens
        self._batcher = MicroBatcher(
            self._decide,
            self._count_tokens,
            batch_limits,
            name="routing",
            prepare_thread=_use_one_thread_for_arrays,
            observer=observer,
        )

    @property
    def queued(self) -> dict[str, int]:
        """Texts in each queue, those that are being worked on included."""
        queued = {"routing": self._batcher.unfinished}
        if self.answerer is not None:
            queued |= self.answerer.queued
        return queued

    async def route(
        self,
        text: str,
        top_k: int = 0,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> Decision:
        """The decision on one text."""
        self.limits.check_text(text)
        [routed] = await self._route([text], top_k, self.live.snapshot, on_unknown, request_key)
        return routed.decision

    async def explain(
        self,
        text: str,
        top_k: int = 0,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> tuple[Decision, Explanation]:
        """The decision on one text, and why it is what it is."""
        if self._explainer is None:
            raise InvalidInputError("explain", True, "ask a server that reads stored rows")
        self.limits.check_text(text)
        snapshot = self.live.snapshot
        explained = max(top_k, LEAST_EXPLAINED) if top_k >= 0 else top_k
        [routed] = await self._route(
            [text], explained, snapshot, on_unknown, request_key, full=True
        )
        decision = routed.decision
        explanation = await self._explainer.explain(
            snapshot.answering(decision), self.encoder, text, decision
        )
        return _listing(decision, top_k), explanation

    async def route_batch(
        self,
        texts: Sequence[str],
        top_k: int = 0,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> list[Decision]:
        """One decision per text, all at one catalog revision."""
        self.limits.check_texts(texts)
        routed = await self._route(texts, top_k, self.live.snapshot, on_unknown, request_key)
        return [each.decision for each in routed]

    async def generate(
        self,
        text: str,
        *,
        task: str = "",
        context: Sequence[str] = (),
        max_output_tokens: int = 0,
        top_k: int = 0,
        on_unknown: RejectionPolicy | None = None,
        request_key: str = "",
    ) -> AsyncGenerator[AnswerEvent]:
        """The decision, then the answer in pieces, then a summary, all of one catalog revision.

        A named `task` skips routing: its decision has NaN for score and margin. The text alone is
        routed; the base model reads `context` with it, where the task's template puts it. Close the
        iterator to stop.

        Raises:
            TaskNotFoundError: the snapshot has no task of that name.
            NoPromptError: the task has no prompt, or no base model is loaded.
            TaskOutOfServiceError: the task's artifacts could not be loaded.
        """
        self.limits.check_text(text)
        self.limits.check_context(context, text)
        output_tokens = self.limits.output_tokens(max_output_tokens)
        if self.answerer is None:
            raise _no_base_model()
        snapshot = self.live.snapshot
        vector = None
        if task:
            self.limits.check_top_k(top_k)
            self.limits.check_request_key(request_key)
            decision = named(snapshot, task, request_key, self.observer)
        else:
            [routed] = await self._route([text], top_k, snapshot, on_unknown, request_key)
            decision, vector = routed.decision, routed.vector
        yield decision
        if decision.used is None:
            yield AnswerSummary(FinishReason.NO_TASK)
            return
        served = snapshot.answering(decision).task(decision.used.name)
        prompt = usable_prompt(served)
        classified = None
        if served.classifier is not None:
            if vector is None and served.classifier.encoder_prompt is None:
                vector = await self._embed(text, snapshot, decision)
            classified = ClassifierInput(served.classifier, text, vector)
        question = Question(
            PromptedInput(
                fill(served.record.template, text, context), prompt.values, prompt.method
            ),
            served.record.outputs,
            output_tokens,
            classified,
        )
        asked = time.perf_counter()
        async with aclosing(self.answerer.answer(question)) as steps:
            async for step in steps:
                if isinstance(step, str):
                    yield step
                    continue
                tokens = {"input_tokens": step.input_tokens, "output_tokens": step.output_tokens}
                stage("generate", asked, time.perf_counter(), **tokens)
                yield _summary(step, prompt)

    def close(self) -> None:
        """Wait for the batch that is running and end its thread."""
        self._batcher.close()

    async def _route(
        self,
        texts: Sequence[str],
        top_k: int,
        snapshot: Snapshot,
        on_unknown: RejectionPolicy | None,
        request_key: str,
        *,
        full: bool = False,
    ) -> list[_Routed]:
        """Decide texts that were checked."""
        self.limits.check_top_k(top_k)
        self.limits.check_request_key(request_key)
        rejection = _rejection(snapshot, on_unknown)
        return await self._ask(
            [_Question(text, top_k, snapshot, rejection, request_key, full=full) for text in texts]
        )

    async def _ask(self, questions: Sequence[_Question]) -> list[_Routed]:
        asked = time.perf_counter()
        routed = await self._batcher.submit(questions)
        for batch in dict.fromkeys(each.batch for each in routed):
            waited = batch.began - asked
            stage("encode", asked, batch.encoded, waited_seconds=waited, batch_texts=batch.texts)
            stage("decide", batch.encoded, batch.decided)
        return routed

    async def _embed(self, text: str, snapshot: Snapshot, decided: Decision) -> FloatArray:
        """The embedding `[D]` of a text whose task was named."""
        question = _Question(text, 0, snapshot, snapshot.rejection, decided=decided)
        [routed] = await self._ask([question])
        return cast("FloatArray", routed.vector)

    def _count_tokens(self, questions: Sequence[_Question]) -> list[int]:
        # A token has a byte or more: where so many are few enough, nobody need count them.
        most = [min(len(question.text.encode()), self.encoder.window) for question in questions]
        if sum(most) <= self._batch_tokens:
            return most
        return self.encoder.count_tokens([question.text for question in questions])

    def _decide(self, questions: Sequence[_Question]) -> list[_Routed]:
        """In the worker thread: what the fast encoder is not sure of, the full one decides."""
        fast = self._decide_fast(questions)
        left = [question for place, question in enumerate(questions) if place not in fast]
        full = iter(self._decide_full(left) if left else ())
        return [fast[place] if place in fast else next(full) for place in range(len(questions))]

    def _decide_fast(self, questions: Sequence[_Question]) -> dict[int, _Routed]:
        """What the cascade of the texts' snapshot is sure of, by place; nothing without one."""
        snapshot = questions[0].snapshot
        places = [
            place
            for place, question in enumerate(questions)
            if question.snapshot is snapshot and question.decided is None and not question.full
        ]
        if snapshot.cascade is None or not places:
            return {}
        began = time.perf_counter()
        top_k = max(1, *(questions[place].top_k for place in places))
        found = snapshot.cascade.decide([questions[place].text for place in places], top_k)
        decided = time.perf_counter()
        self.observer.stage_ended("routing_fast", decided - began)
        # Embedding and deciding are one to the cascade.
        batch = _Batch(len(places), began, decided, decided)
        sure = {
            place: decision
            for place, decision in zip(places, found, strict=True)
            if decision is not None
        }
        for decision in sure.values():
            self.observer.decided(decision)
        return {
            place: _Routed(_listing(decision, questions[place].top_k), None, batch)
            for place, decision in sure.items()
        }

    def _decide_full(self, questions: Sequence[_Question]) -> list[_Routed]:
        """Encode the batch, and let each text's own snapshot decide."""
        began = time.perf_counter()
        embeddings = self.encoder.encode([question.text for question in questions])
        encoded = time.perf_counter()
        self.observer.stage_ended("routing_encode", encoded - began)
        places = [place for place, question in enumerate(questions) if question.decided is None]
        asked = [questions[place] for place in places]
        found = iter(self._search(asked, _rows(embeddings, places)) if asked else ())
        decided = time.perf_counter()
        self.observer.stage_ended("routing_decide", decided - encoded)
        batch = _Batch(len(questions), began, encoded, decided)
        return [
            _Routed(question.decided or next(found), vector, batch)
            for question, vector in zip(questions, embeddings.vectors, strict=True)
        ]

    def _search(self, questions: Sequence[_Question], embeddings: Embeddings) -> list[Decision]:
        """The decisions on texts with these embeddings."""
        first = questions[0].snapshot
        # A policy may use the best candidate.
        top_k = max(1, *(question.top_k for question in questions))
        if all(question.snapshot is first for question in questions):
            current, answers = self._decide_at(first, questions, embeddings, top_k)
        else:
            # The catalog changed while these texts were coming in.
            current, answers = [], []
            for position, question in enumerate(questions):
                row = _rows(embeddings, [position])
                [mine], [answer] = self._decide_at(question.snapshot, [question], row, top_k)
                current.append(mine)
                answers.append(answer)
        decided = [
            _listing(question.snapshot.apply(answer, question.rejection), question.top_k)
            for answer, question in zip(answers, questions, strict=True)
        ]
        for decision in decided:
            self.observer.decided(decision)
        if self._note is not None:
            texts = [question.text for question in questions]
            self._note(list(zip(texts, current, strict=True)))
        return decided

    def _decide_at(
        self,
        snapshot: Snapshot,
        questions: Sequence[_Question],
        embeddings: Embeddings,
        top_k: int,
    ) -> tuple[list[Decision], list[Decision]]:
        """The decisions of the snapshot's own head, and those to answer with."""
        current = snapshot.decide(embeddings, top_k)
        keys = [question.request_key for question in questions]
        answers = with_challengers(snapshot, embeddings, current, keys, top_k, self.observer)
        return current, answers


def _use_one_thread_for_arrays() -> None:
    """Keep numpy and FAISS from sharing out products that take 50 microseconds alone.

    Their threads wait actively for one another: beside other load on 2 cores that made it 12 ms.
    The OpenMP part is a setting of the calling thread, the BLAS part one of the process. Neither
    touches the encoder, whose runtime has threads of its own.
    """
    threadpool_limits(1)


def usable_prompt(task: ServedTask) -> SoftPrompt:
    """The task's soft prompt.

    Raises:
        TaskOutOfServiceError: it could not be loaded.
        NoPromptError: the task has none, or no base model is loaded to use it.
    """
    if task.problem:
        raise TaskOutOfServiceError("task", f"{task.record.key} ({task.problem})", "see GetStatus")
    if task.record.prompt is None:
        raise NoPromptError(
            "task",
            f"{task.record.key} (only routed to)",
            "register it again with --revise to give it a prompt",
        )
    if task.prompt is None:
        raise _no_base_model()
    return task.prompt


def _no_base_model() -> NoPromptError:
    return NoPromptError(
        "base model", "none is loaded", "start the server with a base model to get answers"
    )


def _rejection(snapshot: Snapshot, asked: RejectionPolicy | None) -> RejectionPolicy:
    """The policy of a request. The catalog's may name a task that was retired since."""
    if asked is None:
        return snapshot.rejection
    if not asked.is_served(snapshot.tasks):
        raise TaskNotFoundError(
            "on_unknown.fallback_task", asked.fallback_task, "name a task that ListTasks lists"
        )
    return asked


def _rows(embeddings: Embeddings, places: list[int]) -> Embeddings:
    if len(places) == len(embeddings.vectors):
        return embeddings
    return Embeddings(embeddings.vectors[places], embeddings.truncated[places])


def _listing(decision: Decision, top_k: int) -> Decision:
    """`decision` with `top_k` candidates: its batch may have asked for more."""
    if len(decision.candidates) <= top_k:
        return decision
    return replace(decision, candidates=decision.candidates[:top_k])


def _summary(generation: Generation, prompt: SoftPrompt) -> AnswerSummary:
    reasons = {
        "stop": FinishReason.STOP,
        "length": FinishReason.LENGTH,
        "label": FinishReason.LABEL,
    }
    return AnswerSummary(
        reasons[generation.finish_reason],
        generation.input_tokens,
        len(prompt.values),
        generation.output_tokens,
        generation.truncated,
    )
