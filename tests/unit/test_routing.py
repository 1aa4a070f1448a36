"""The use case without a server: decisions, answers, revisions and the checks of input."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from router.answer import AnswerSummary, FinishReason
from router.decision import Decision, Outcome
from router.errors import (
    InvalidInputError,
    NoPromptError,
    TaskNotFoundError,
    TaskOutOfServiceError,
)
from router.limits import Limits
from router.routing import Router
from tests.fakes import (
    FakeEncoder,
    FakeLanguageModel,
    FixedLive,
    make_router,
    make_snapshot,
    make_task,
    without_prompt,
)


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def live() -> FixedLive:
    return FixedLive(make_snapshot())


@pytest.fixture
def router(encoder: FakeEncoder, live: FixedLive) -> Iterator[Router]:
    model = FakeLanguageModel()
    router = make_router(encoder, model, live)
    yield router
    encoder.blocked.set()
    router.close()
    assert router.answerer is not None
    router.answerer.close()


async def answer(router: Router, text: str, **options: object) -> list[object]:
    return [event async for event in router.generate(text, **options)]  # type: ignore[arg-type]


async def test_a_text_is_decided_at_the_live_revision(router: Router) -> None:
    decision = await router.route("weather report", top_k=1)
    assert decision.outcome is Outcome.MATCHED
    assert str(decision.task) == "weather@1"
    assert decision.revision == 3
    assert len(decision.candidates) == 1


async def test_every_caller_gets_as_many_candidates_as_it_asked_for(
    router: Router, encoder: FakeEncoder
) -> None:
    encoder.blocked.clear()
    blocking = asyncio.create_task(router.route("first"))
    await asyncio.sleep(0.01)
    asked = [router.route("weather", top_k=k) for k in (0, 3, 1, 100)]
    waiting = asyncio.gather(*asked)
    await asyncio.sleep(0.01)
    encoder.blocked.set()
    await blocking
    assert [len(decision.candidates) for decision in await waiting] == [0, 3, 1, 3]
    assert len(encoder.batches) == 2


async def test_calls_of_one_batch_keep_the_revisions_that_they_began_with(
    router: Router, encoder: FakeEncoder, live: FixedLive
) -> None:
    encoder.blocked.clear()
    blocking = asyncio.create_task(router.route("first"))
    await asyncio.sleep(0.01)
    old = asyncio.create_task(router.route_batch(["animal", "sport"]))
    await asyncio.sleep(0.01)
    live.snapshot = make_snapshot(4, [make_task("animal", None)])
    new = asyncio.create_task(router.route_batch(["animal", "sport"]))
    await asyncio.sleep(0.01)
    encoder.blocked.set()
    await blocking
    assert [(d.revision, d.task and d.task.name) for d in await old] == [(3, None), (3, "sport")]
    assert [(d.revision, d.task and d.task.name) for d in await new] == [(4, "animal"), (4, None)]
    assert encoder.batches[1] == ["animal", "sport"] * 2


async def test_a_decision_does_not_depend_on_its_batch(router: Router) -> None:
    texts = [f"{name} text number {n}" for n in range(20) for name in ("weather", "sport", "x")]
    together = await router.route_batch(texts, top_k=2)
    alone = [await router.route(text, top_k=2) for text in texts]
    assert together == alone


async def test_an_answer_is_a_decision_then_pieces_then_a_summary(router: Router) -> None:
    decision, piece, summary = await answer(router, "weather with snow")
    assert isinstance(decision, Decision)
    assert piece == "snow"
    assert summary == AnswerSummary(FinishReason.LABEL, 3, 4, 1)


async def test_a_named_task_is_not_routed_and_has_no_score(
    router: Router, encoder: FakeEncoder
) -> None:
    decision, *_ = await answer(router, "sun", task="weather")
    assert isinstance(decision, Decision)
    assert decision.outcome is Outcome.MATCHED
    assert math.isnan(decision.score)
    assert math.isnan(decision.margin)
    assert decision.threshold == pytest.approx(0.3)
    assert not encoder.batches


async def test_an_ambiguous_text_is_answered_under_the_best_task(router: Router) -> None:
    decision, *_, summary = await answer(router, "weather sport")
    assert isinstance(decision, Decision)
    assert decision.outcome is Outcome.AMBIGUOUS
    assert isinstance(summary, AnswerSummary)
    assert summary.finish_reason is FinishReason.LABEL


async def test_an_unknown_text_is_not_answered(router: Router) -> None:
    decision, summary = await answer(router, "tax law")
    assert isinstance(decision, Decision)
    assert decision.task is None
    assert summary == AnswerSummary(FinishReason.NO_TASK)


async def test_tasks_that_cannot_answer_say_why(router: Router, live: FixedLive) -> None:
    routed_only = without_prompt(make_task("weather", None))
    broken = replace(make_task("sport", None), prompt=None, problem="file is damaged")
    live.snapshot = make_snapshot(tasks=[routed_only, broken])
    with pytest.raises(NoPromptError, match="only routed to"):
        await answer(router, "weather")
    with pytest.raises(TaskOutOfServiceError, match="file is damaged"):
        await answer(router, "sport")
    with pytest.raises(TaskNotFoundError, match="nonsense"):
        await answer(router, "sport", task="nonsense")


async def test_without_a_base_model_nothing_is_answered() -> None:
    router = make_router()
    with pytest.raises(NoPromptError, match="none is loaded"):
        await answer(router, "weather")
    router.close()


LIMITS = Limits()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not empty"),
        (" \n", "not empty"),
        ("x" * 32769, "32769 bytes"),
        ("ä" * 16385, "32770 bytes"),
        ("ab\0c", "NUL at character 2"),
        ("ab\ud800", "surrogate at character 2"),
    ],
)
def test_a_bad_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said) as caught:
        LIMITS.check_text(text, "somewhere")
    assert caught.value.field == "somewhere"


@pytest.mark.parametrize("text", ["x", "x" * 32768, "ä" * 16384, "\u202eabc", "🙂", "a\nb"])
def test_a_good_text_passes(text: str) -> None:
    LIMITS.check_text(text)


def test_limits_are_inclusive() -> None:
    LIMITS.check_texts(["x"] * 256)
    LIMITS.check_top_k(0)
    LIMITS.check_top_k(100)
    LIMITS.check_context(["x"] * 32, "x")
    assert LIMITS.output_tokens(512) == 512
    assert LIMITS.output_tokens(0) == 64


async def test_a_batch_names_the_text_at_fault(router: Router) -> None:
    with pytest.raises(InvalidInputError) as caught:
        await router.route_batch(["good", "good", "", "good"])
    assert caught.value.field == "texts[2]"


def test_a_request_within_the_limits_fits_a_message() -> None:
    largest = LIMITS.max_batch_texts * LIMITS.max_text_bytes
    assert largest < LIMITS.max_request_bytes < 1.1 * largest
