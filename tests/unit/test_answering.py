"""Answers: labels and free text, batches across tasks, and callers who leave."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from router.answering import Answerer, Question
from router.batching import BatchLimits
from router.errors import OverloadedError
from router.interfaces import Generation, PromptedInput
from tests.fakes import FakeLanguageModel

LIMITS = BatchLimits(queue_items=6, batch_items=4, batch_tokens=4096)


@pytest.fixture
def model() -> FakeLanguageModel:
    return FakeLanguageModel()


@pytest.fixture
def answerer(model: FakeLanguageModel) -> Iterator[Answerer]:
    answerer = Answerer(model, LIMITS)
    yield answerer
    model.blocked.set()
    model.steps.release(1000)
    answerer.close()


def question(text: str, outputs: tuple[str, ...] | None = None, length: int = 9) -> Question:
    prompt = np.zeros((4, 8), np.float32)
    return Question(PromptedInput(text, prompt), outputs, length)


async def ask(answerer: Answerer, asked: Question) -> tuple[list[str], Generation]:
    *pieces, generation = [step async for step in answerer.answer(asked)]
    assert isinstance(generation, Generation)
    assert all(isinstance(piece, str) for piece in pieces)
    return [str(piece) for piece in pieces], generation


async def wait_for_batch(model: FakeLanguageModel) -> None:
    async with asyncio.timeout(10):
        while not model.batches:
            await asyncio.sleep(0.001)


async def test_the_most_probable_label_is_the_answer(answerer: Answerer) -> None:
    pieces, generation = await ask(answerer, question("it will rain", ("sun", "rain")))
    assert pieces == ["rain"]
    assert (generation.text, generation.finish_reason) == ("rain", "label")


async def test_a_label_answer_counts_its_tokens(answerer: Answerer) -> None:
    _, short = await ask(answerer, question("it will soon rain", ("sun", "soon rain")))
    assert (short.input_tokens, short.output_tokens, short.truncated) == (4, 2, False)
    _, long = await ask(answerer, question("rain " * 300, ("sun", "rain")))
    assert (long.input_tokens, long.output_tokens, long.truncated) == (256, 1, True)


async def test_free_text_comes_in_pieces_that_make_up_the_answer(answerer: Answerer) -> None:
    pieces, generation = await ask(answerer, question("two mice"))
    assert pieces == ["TWO ", "MICE "]
    assert generation.text == "".join(pieces)
    assert generation.finish_reason == "stop"


async def test_pieces_arrive_before_the_answer_is_complete(
    answerer: Answerer, model: FakeLanguageModel
) -> None:
    model.slow = True
    steps = answerer.answer(question("two mice"))
    model.steps.release()
    assert await anext(steps) == "TWO "
    model.steps.release(5)
    assert await anext(steps) == "MICE "
    await steps.aclose()


async def test_questions_of_several_tasks_share_a_batch(
    answerer: Answerer, model: FakeLanguageModel
) -> None:
    prompts = [np.full((4, 8), n, np.float32) for n in range(3)]
    for outputs in (("text",), None):
        model.batches.clear()
        model.blocked.clear()
        first = asyncio.create_task(ask(answerer, question("first", outputs)))
        await wait_for_batch(model)
        others = [
            asyncio.create_task(
                ask(answerer, Question(PromptedInput(f"text {n}", prompt), outputs, n + 1))
            )
            for n, prompt in enumerate(prompts)
        ]
        await asyncio.sleep(0.01)
        model.blocked.set()
        await asyncio.gather(first, *others)
        assert [len(batch) for batch in model.batches] == [1, 3]
        assert all(
            row.prompt is prompt for row, prompt in zip(model.batches[1], prompts, strict=True)
        )


async def test_labels_and_free_text_wait_for_one_another_by_the_turn_only(
    answerer: Answerer, model: FakeLanguageModel
) -> None:
    model.slow = True
    long = asyncio.create_task(ask(answerer, question("a b c d e", length=5)))
    await wait_for_batch(model)
    label = asyncio.create_task(ask(answerer, question("label", ("label",))))
    while not label.done():  # before the long answer has ended
        model.steps.release()
        await asyncio.sleep(0.06)
    assert not long.done()
    model.steps.release(10)
    assert (await long)[1].text == "A B C D E "


async def test_a_caller_who_leaves_while_waiting_is_never_worked_on(
    answerer: Answerer, model: FakeLanguageModel
) -> None:
    for outputs in (("text",), None):
        model.batches.clear()
        model.blocked.clear()
        first = asyncio.create_task(ask(answerer, question("first", outputs)))
        await wait_for_batch(model)
        leaving = asyncio.create_task(ask(answerer, question("leaving", outputs)))
        await asyncio.sleep(0.01)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert sum(answerer.queued.values()) == 1
        model.blocked.set()
        await first
        await ask(answerer, question("last", outputs))
        assert [[row.text for row in batch] for batch in model.batches] == [["first"], ["last"]]


async def test_a_full_queue_refuses(answerer: Answerer, model: FakeLanguageModel) -> None:
    for name, outputs in (("scoring", ("text",)), ("generating", None)):
        model.batches.clear()
        model.blocked.clear()
        tasks = [asyncio.create_task(ask(answerer, question("x", outputs))) for _ in range(6)]
        await wait_for_batch(model)
        with pytest.raises(OverloadedError, match=f"{name} queue"):
            await ask(answerer, question("one too many", outputs))
        model.blocked.set()
        assert len(await asyncio.gather(*tasks)) == 6


async def test_an_error_of_the_model_reaches_the_caller(
    answerer: Answerer, model: FakeLanguageModel
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    model.score = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        await ask(answerer, question("x", ("a",)))
    assert (await ask(answerer, question("y")))[0] == ["Y "]
