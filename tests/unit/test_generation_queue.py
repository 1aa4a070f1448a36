"""Continuous batching for callers: who joins, who is refused, what becomes of those who leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from router.batching import BatchLimits
from router.errors import OverloadedError
from router.generation_queue import GenerationQueue
from router.interfaces import Generation, PromptedInput
from router.observing import Unobserved
from router.turns import ModelThread
from tests.fakes import FakeLanguageModel, FakeRunningBatch

LIMITS = BatchLimits(queue_items=8, batch_items=3, batch_tokens=4096)

Make = Callable[..., GenerationQueue]


@pytest.fixture
def model() -> FakeLanguageModel:
    return FakeLanguageModel()


@pytest.fixture
def queues(model: FakeLanguageModel) -> Iterator[Make]:
    made: list[GenerationQueue] = []

    def make(limits: BatchLimits = LIMITS, thread: ModelThread | None = None) -> GenerationQueue:
        made.append(GenerationQueue(model, limits, thread or ModelThread()))
        return made[-1]

    yield make
    model.blocked.set()
    model.steps.release(1000)
    for queue in made:
        queue.close()


class Call:
    """One caller, who reads what comes."""

    def __init__(self, queue: GenerationQueue, text: str, length: int = 9) -> None:
        self.pieces: list[str] = []
        self.answer: Generation | None = None
        self.task = asyncio.create_task(self._read(queue, text, length))

    async def _read(self, queue: GenerationQueue, text: str, length: int) -> None:
        async for event in queue.write(PromptedInput(text, None), length):
            if isinstance(event, Generation):
                self.answer = event
            else:
                self.pieces.append(event)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_row_joins_while_another_is_written_and_both_go_on(
    queues: Make, model: FakeLanguageModel
) -> None:
    model.slow = True
    queue = queues()
    long = Call(queue, "a b c d e f")
    model.steps.release(2)
    await until(lambda: long.pieces == ["A ", "B "])
    late = Call(queue, "x y")
    await until(lambda: queue.unfinished == 2)
    model.steps.release(2)
    await until(lambda: late.pieces)
    assert not long.task.done()
    model.steps.release(20)
    await asyncio.gather(long.task, late.task)
    assert "".join(long.pieces) == "A B C D E F "
    assert late.pieces == ["X ", "Y "]
    assert [[row.text for row in batch] for batch in model.batches] == [["a b c d e f"], ["x y"]]


async def test_who_leaves_is_dropped_before_the_next_step_and_makes_room(
    queues: Make, model: FakeLanguageModel
) -> None:
    model.slow = True
    queue = queues(BatchLimits(queue_items=8, batch_items=1, batch_tokens=4096))
    leaving = Call(queue, "a b c d e f")
    waiting = Call(queue, "x")
    model.steps.release()
    await until(lambda: leaving.pieces)
    leaving.task.cancel()
    await until(lambda: queue.unfinished == 1)
    # The step that was running as the caller left, then the first one of the next row.
    model.steps.release(2)
    await until(lambda: waiting.pieces)
    assert model.stopped_rows == ["a b c d e f"]
    model.steps.release()
    await waiting.task
    assert waiting.pieces == ["X "]
    assert len(leaving.pieces) == 1


async def test_rows_wait_for_their_place_in_the_order_in_which_they_came(
    queues: Make, model: FakeLanguageModel
) -> None:
    model.blocked.clear()
    model.room = 2
    queue = queues(BatchLimits(queue_items=8, batch_items=4, batch_tokens=4096))
    first = Call(queue, "first")
    await until(lambda: model.batches)
    others = [Call(queue, f"text {n}") for n in range(4)]
    await until(lambda: queue.unfinished == 5)
    model.blocked.set()
    await asyncio.gather(first.task, *(call.task for call in others))
    joined = [row.text for batch in model.batches for row in batch]
    assert joined == ["first", *(f"text {n}" for n in range(4))]
    assert max(len(batch) for batch in model.batches) <= 2


async def test_inputs_that_are_read_between_two_steps_are_bounded_in_tokens(
    queues: Make, model: FakeLanguageModel
) -> None:
    model.blocked.clear()
    queue = queues(BatchLimits(queue_items=8, batch_items=8, batch_tokens=20))
    first = Call(queue, "first")
    await until(lambda: model.batches)
    texts = ["short", "words " * 10, "words " * 100, "short"]  # about 2, 16, 151 and 2 tokens
    others = [Call(queue, text, 1) for text in texts]
    await until(lambda: queue.unfinished == 5)
    model.blocked.set()
    await asyncio.gather(first.task, *(call.task for call in others))
    assert [len(batch) for batch in model.batches] == [1, 2, 1, 1]


async def test_a_row_that_cannot_be_read_fails_alone(
    queues: Make, model: FakeLanguageModel
) -> None:
    model.blocked.clear()
    model.broken = {"bad"}
    queue = queues()
    first = Call(queue, "first one")
    await until(lambda: model.batches)
    good, bad = Call(queue, "good"), Call(queue, "bad")
    await until(lambda: queue.unfinished == 3)
    model.blocked.set()
    await asyncio.gather(first.task, good.task)
    with pytest.raises(RuntimeError, match="cannot read bad"):
        await bad.task
    assert (first.pieces, good.pieces) == (["FIRST ", "ONE "], ["GOOD "])
    assert queue.unfinished == 0


async def test_a_step_that_fails_ends_its_rows_and_the_queue_goes_on(
    queues: Make, model: FakeLanguageModel
) -> None:
    queue = queues()
    model.broken_step = RuntimeError("out of memory")
    calls = [Call(queue, "a"), Call(queue, "b")]
    for call in calls:
        with pytest.raises(RuntimeError, match="out of memory"):
            await call.task
    model.broken_step = None
    after = Call(queue, "after")
    await after.task
    assert after.pieces == ["AFTER "]


class Mistaken(Unobserved):
    """Raises what an observer must not raise, until it is mended."""

    broken = True

    def batch_ended(self, queue: str, items: int) -> None:
        if self.broken:
            raise KeyError(queue)


async def test_a_mistake_beside_the_model_is_told_to_all_and_the_queue_goes_on(
    model: FakeLanguageModel,
) -> None:
    observer = Mistaken()
    limits = BatchLimits(queue_items=8, batch_items=1, batch_tokens=4096)
    queue = GenerationQueue(model, limits, ModelThread(), observer)
    calls = [Call(queue, "being written"), Call(queue, "waiting")]
    for call in calls:
        with pytest.raises(KeyError, match="generating"):
            async with asyncio.timeout(10):
                await call.task
    assert queue.unfinished == 0
    observer.broken = False
    after = Call(queue, "after")
    await after.task
    assert after.pieces == ["AFTER "]
    queue.close()


async def test_a_full_queue_refuses_and_what_waited_too_long_is_refused(
    queues: Make, model: FakeLanguageModel
) -> None:
    model.blocked.clear()
    queue = queues(BatchLimits(queue_items=3, batch_items=1, batch_tokens=4096, queue_seconds=0.2))
    running = Call(queue, "running")
    await until(lambda: model.batches)
    stale = Call(queue, "stale")
    await asyncio.sleep(0.25)
    late = Call(queue, "late")
    await until(lambda: queue.unfinished == 3)
    refused = Call(queue, "one too many")
    with pytest.raises(OverloadedError, match="generating queue: 3 waiting") as caught:
        await refused.task
    assert caught.value.retry_after > 0
    model.blocked.set()
    with pytest.raises(OverloadedError, match=r"generating queue: waited over 0\.2 s"):
        await stale.task
    await asyncio.gather(running.task, late.task)
    assert (running.pieces, late.pieces) == (["RUNNING "], ["LATE "])


async def test_what_would_have_to_wait_too_long_is_refused_but_not_for_answers_that_were_alone(
    queues: Make, model: FakeLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("router.generation_queue.time", clock)
    monkeypatch.setattr(FakeRunningBatch, "step", clock.taking_a_second(FakeRunningBatch.step))
    limits = BatchLimits(queue_items=100, batch_items=2, batch_tokens=4096, queue_seconds=9.0)
    queue = queues(limits)
    for _ in range(3):  # two seconds each, which another answer could have shared
        await Call(queue, "alone", 9).task
    model.blocked.clear()
    model.batches.clear()
    burst = [Call(queue, "a")]
    await until(lambda: model.batches)
    burst += [Call(queue, f"b{n}") for n in range(20)]
    await until(lambda: queue.unfinished + sum(call.task.done() for call in burst) == 21)
    refused = [call for call in burst if call.task.done()]
    assert queue.unfinished == 7  # one second each: the eighth would wait for seven
    for call in refused:
        with pytest.raises(OverloadedError, match=r"generating queue: 7 waiting, for 7\.0 s"):
            await call.task
    for call in burst:
        call.task.cancel()
    model.blocked.set()
    await asyncio.gather(*(call.task for call in burst), return_exceptions=True)


class Clock:
    """Stands in for the module `time`; an hour is nothing to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking_a_second(self, work: Callable[..., object]) -> Callable[..., object]:
        def slowed(*args: object) -> object:
            self.now += 1.0
            return work(*args)

        return slowed


async def test_others_get_their_turn_while_rows_are_written(
    queues: Make, model: FakeLanguageModel
) -> None:
    model_thread = ModelThread()
    queue = queues(thread=model_thread)
    taken = threading.Event()

    model.slow = True
    call = Call(queue, "words " * 50, 50)
    model.steps.release()
    await until(lambda: call.pieces)
    other = threading.Thread(target=model_thread.run, args=[taken.set])
    other.start()
    while not taken.is_set():
        model.steps.release()
        await asyncio.sleep(0.01)
    assert not call.task.done()
    model.steps.release(100)
    await call.task
    other.join(10)


async def test_callers_who_are_left_when_the_queue_closes_are_told_so(
    queues: Make, model: FakeLanguageModel
) -> None:
    model.slow = True
    queue = queues(BatchLimits(queue_items=8, batch_items=1, batch_tokens=4096))
    calls = [Call(queue, "a b c"), Call(queue, "waiting")]
    model.steps.release()
    await until(lambda: calls[0].pieces)
    closing = asyncio.create_task(asyncio.to_thread(queue.close))
    await asyncio.sleep(0.01)
    model.steps.release()
    await closing
    for call in [*calls, Call(queue, "after")]:
        with pytest.raises(OverloadedError, match="generating queue: closed"):
            await call.task
