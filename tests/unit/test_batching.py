"""Micro-batching: what shares a batch, what is refused, and what happens to those who leave."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest

from router.batching import BatchLimits, MicroBatcher
from router.errors import OverloadedError
from router.pace import Pace

LIMITS = BatchLimits(queue_items=100, batch_items=8, batch_tokens=1000)


class Work:
    """Doubles numbers; a batch runs when `free` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.counted: list[list[int]] = []
        self.threads: set[int] = set()
        self.free = threading.Event()
        self.free.set()
        self.results: Callable[[Sequence[int]], Sequence[int]] = lambda items: [
            2 * item for item in items
        ]

    def __call__(self, items: Sequence[int]) -> Sequence[int]:
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        assert self.free.wait(10)
        return self.results(items)

    def count_tokens(self, items: Sequence[int]) -> list[int]:
        self.counted.append(list(items))
        return list(items)


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def batchers(work: Work) -> Iterator[Callable[..., MicroBatcher[int, int]]]:
    made: list[MicroBatcher[int, int]] = []

    def make(limits: BatchLimits = LIMITS, **options: object) -> MicroBatcher[int, int]:
        made.append(MicroBatcher(work, work.count_tokens, limits, name="test", **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    work.free.set()
    for batcher in made:
        batcher.close()


Make = Callable[..., MicroBatcher[int, int]]


async def test_what_would_have_to_wait_too_long_is_refused_at_once(
    batchers: Make, work: Work
) -> None:
    batcher = batchers(BatchLimits(100, 1, 1000, queue_seconds=1.0))

    def slow(items: Sequence[int]) -> Sequence[int]:
        time.sleep(0.05)
        return items

    work.results = slow
    for item in range(3):  # an item takes about 50 ms
        await batcher.submit([item])
    work.free.clear()
    accepted = [asyncio.create_task(batcher.submit([item])) for item in range(10)]
    await asyncio.sleep(0.01)
    assert len(accepted) == batcher.unfinished == 10
    more = [asyncio.create_task(batcher.submit([item])) for item in range(40)]
    await asyncio.sleep(0.01)
    refused = [call for call in more if call.done()]
    assert 10 < batcher.unfinished < 20  # well under a second's worth
    assert len(refused) == 50 - batcher.unfinished
    with pytest.raises(OverloadedError, match=r"test queue: \d+ waiting, for 0\.\d s") as caught:
        await refused[0]
    assert 0.1 <= caught.value.retry_after <= 5.0
    for call in refused:
        call.exception()
    for call in [*accepted, *more]:
        call.cancel()
    work.free.set()


async def test_one_batch_that_stalled_is_no_reason_to_refuse(batchers: Make, work: Work) -> None:
    batcher = batchers(BatchLimits(100, 8, 1000, queue_seconds=0.2))
    for item in range(4):
        await batcher.submit([item])
    work.free.clear()
    stalled = asyncio.create_task(batcher.submit([0]))
    await asyncio.sleep(0.15)
    work.free.set()
    await stalled
    assert await asyncio.gather(*(batcher.submit([n]) for n in range(50))) == [
        [2 * n] for n in range(50)
    ]


async def test_small_batches_that_are_slow_are_no_reason_to_refuse_what_fits_into_the_next(
    batchers: Make, work: Work
) -> None:
    """Nine callers, of whom none has to wait for more than two batches, are all served."""
    batcher = batchers(BatchLimits(100, 32, 1000, queue_seconds=0.3))

    def slow(items: Sequence[int]) -> Sequence[int]:
        time.sleep(0.05)
        return items

    work.results = slow
    for item in range(4):
        await batcher.submit([item])

    async def caller() -> None:
        for item in range(5):
            assert await batcher.submit([item, item]) == [item, item]

    await asyncio.gather(*(caller() for _ in range(9)))


async def test_a_refusing_queue_takes_everything_again_after_a_few_small_batches(
    batchers: Make, work: Work
) -> None:
    batcher = batchers(BatchLimits(100, 2, 1000, queue_seconds=1.0))

    def slow(items: Sequence[int]) -> Sequence[int]:
        time.sleep(0.1)
        return items

    work.results = slow
    assert await batcher.submit([*range(8)]) == [*range(8)]  # four batches that are full
    work.free.clear()
    running = [asyncio.create_task(batcher.submit([1])) for _ in range(30)]
    await asyncio.sleep(0.05)
    assert any(call.done() for call in running)
    for call in running:
        call.cancel()
    work.free.set()
    await asyncio.gather(*running, return_exceptions=True)
    for item in range(7):
        assert await batcher.submit([item]) == [item]
    assert all(await asyncio.gather(*(batcher.submit([n + 1]) for n in range(12))))


def test_a_machine_that_gets_slower_is_noticed_after_three_batches() -> None:
    pace = Pace("test", 1000, 10.0)
    for seconds in [*[0.1] * 7, 0.4, 0.4]:
        pace.note(seconds)
    pace.admit(1, 20)
    pace.note(0.4)
    with pytest.raises(OverloadedError, match=r"20 waiting, for 8\.0 s"):
        pace.admit(1, 20)


async def test_an_idle_queue_takes_whatever_it_can_hold(batchers: Make, work: Work) -> None:
    batcher = batchers(BatchLimits(100, 8, 1000, queue_seconds=0.001))

    def slow(items: Sequence[int]) -> Sequence[int]:
        time.sleep(0.01)
        return items

    work.results = slow
    for _ in range(4):
        assert await batcher.submit([1]) == [1]


async def test_what_waited_too_long_is_refused_and_what_came_later_is_not(
    batchers: Make, work: Work
) -> None:
    batcher = batchers(BatchLimits(100, 8, 1000, queue_seconds=0.2))
    work.free.clear()
    running = asyncio.create_task(batcher.submit([1]))
    await asyncio.sleep(0.01)
    stale = asyncio.create_task(batcher.submit([2, 3]))
    await asyncio.sleep(0.3)
    late = asyncio.create_task(batcher.submit([4]))
    await asyncio.sleep(0.01)
    work.free.set()
    assert await running == [2]  # it was being worked on, however long that took
    with pytest.raises(OverloadedError, match=r"test queue: waited over 0\.2 s; try again"):
        await stale
    assert await late == [8]
    assert work.batches == [[1], [4]]
    assert batcher.unfinished == 0


async def test_a_large_call_is_not_refused_for_what_its_own_batches_take(
    batchers: Make, work: Work
) -> None:
    batcher = batchers(BatchLimits(100, 8, 1000, queue_seconds=0.1))

    def slow(items: Sequence[int]) -> Sequence[int]:
        time.sleep(0.03)
        return items

    work.results = slow
    for _ in range(3):
        large = list(range(1, 60))  # eight batches
        assert await batcher.submit(large) == large


async def start_blocked(work: Work, batcher: MicroBatcher[int, int]) -> asyncio.Task[list[int]]:
    """A call whose batch is running and does not end until `work.free` is set."""
    work.free.clear()
    task = asyncio.create_task(batcher.submit([1]))
    while not work.batches:
        await asyncio.sleep(0.001)
    return task


async def test_an_idle_batcher_runs_one_item_at_once_and_counts_no_tokens(
    work: Work, batchers: Make
) -> None:
    assert await batchers().submit([21]) == [42]
    assert work.batches == [[21]]
    assert not work.counted


async def test_the_work_is_done_in_one_other_thread(work: Work, batchers: Make) -> None:
    batcher = batchers()
    await asyncio.gather(*(batcher.submit([n]) for n in range(1, 50)))
    assert len(work.threads) == 1
    assert threading.get_ident() not in work.threads


async def test_what_gathers_while_a_batch_runs_shares_the_next_ones(
    work: Work, batchers: Make
) -> None:
    batcher = batchers()
    first = await start_blocked(work, batcher)
    others = [asyncio.create_task(batcher.submit([n])) for n in range(2, 14)]
    await asyncio.sleep(0)
    work.free.set()
    assert await first == [2]
    assert await asyncio.gather(*others) == [[2 * n] for n in range(2, 14)]
    assert work.batches == [[1], [2, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13]]


async def test_a_large_call_is_split_and_put_together_in_order(work: Work, batchers: Make) -> None:
    items = list(range(1, 60))
    assert await batchers().submit(items) == [2 * item for item in items]
    assert max(map(len, work.batches)) == LIMITS.batch_items


async def test_a_batch_is_bounded_in_tokens_but_a_long_item_still_runs(
    work: Work, batchers: Make
) -> None:
    batcher = batchers(BatchLimits(queue_items=100, batch_items=8, batch_tokens=10))
    await batcher.submit([4, 4, 4, 50, 1, 2])
    assert work.batches == [[4, 4], [4], [50], [1, 2]]


async def test_tokens_of_an_item_are_counted_once(work: Work, batchers: Make) -> None:
    await batchers().submit(list(range(1, 40)))
    counted = [item for items in work.counted for item in items]
    assert sorted(counted) == sorted(set(counted))


async def test_a_full_queue_refuses_at_once_and_recovers(work: Work, batchers: Make) -> None:
    batcher = batchers(BatchLimits(queue_items=3, batch_items=8, batch_tokens=1000))
    first = await start_blocked(work, batcher)
    second = asyncio.create_task(batcher.submit([2, 3]))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError) as caught:
        await batcher.submit([4])
    assert caught.value.retry_after > 0
    assert "3 waiting" in str(caught.value)
    work.free.set()
    assert await first + await second == [2, 4, 6]
    assert await batcher.submit([4, 5, 6]) == [8, 10, 12]


async def test_a_cancelled_call_leaves_the_queue(work: Work, batchers: Make) -> None:
    batcher = batchers(BatchLimits(queue_items=3, batch_items=8, batch_tokens=1000))
    first = await start_blocked(work, batcher)
    leaving = asyncio.create_task(batcher.submit([2, 3]))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    staying = asyncio.create_task(batcher.submit([4, 5]))
    await asyncio.sleep(0)
    work.free.set()
    assert await first == [2]
    assert await staying == [8, 10]
    assert work.batches == [[1], [4, 5]]


async def test_a_call_that_is_cancelled_while_it_runs_does_not_disturb_its_batch(
    work: Work, batchers: Make
) -> None:
    batcher = batchers()
    first = await start_blocked(work, batcher)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    work.free.set()
    assert await batcher.submit([5]) == [10]


async def test_an_error_reaches_the_calls_of_its_batch_and_no_others(
    work: Work, batchers: Make
) -> None:
    def fail_on_seven(items: Sequence[int]) -> Sequence[int]:
        if 7 in items:
            raise ValueError("seven")
        return [2 * item for item in items]

    work.results = fail_on_seven
    batcher = batchers()
    # The failing batch is the first of three; the rest of the call is dropped.
    with pytest.raises(ValueError, match="seven"):
        await batcher.submit([7, *range(8, 30)])
    assert work.batches == [[7, 8, 9, 10, 11, 12, 13, 14]]
    assert await batcher.submit([3]) == [6]


async def test_a_wrong_number_of_results_is_an_error(work: Work, batchers: Make) -> None:
    work.results = lambda items: [1]
    with pytest.raises(ValueError, match="1 results for 2 items"):
        await batchers().submit([1, 2])


async def test_the_event_loop_stays_free_while_a_batch_runs(work: Work, batchers: Make) -> None:
    batcher = batchers()
    running = await start_blocked(work, batcher)
    async with asyncio.timeout(1):
        await asyncio.sleep(0.05)
    assert not running.done()
    work.free.set()
    await running


async def test_an_idle_batcher_keeps_nothing_of_its_last_batch() -> None:
    class Text:
        """Something that can be seen to be gone."""

    batcher: MicroBatcher[Text, int] = MicroBatcher(
        lambda items: [1] * len(items), lambda items: [1] * len(items), LIMITS, name="test"
    )
    text = Text()
    gone = weakref.ref(text)
    assert await batcher.submit([text]) == [1]
    del text
    until = time.monotonic() + 5
    while gone() is not None and time.monotonic() < until:
        await asyncio.sleep(0.01)
    assert gone() is None
    batcher.close()
