"""Turns with a model: a lock, and a thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from router.turns import ModelThread, Turns
from tests.calls import until


def test_turns_are_taken_in_the_order_of_asking() -> None:
    turns, taken = Turns(), []

    def take(number: int) -> None:
        with turns:
            taken.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    with turns:
        for number, thread in enumerate(threads):
            thread.start()
            until(lambda number=number: len(turns._waiting) == number + 1)  # type: ignore[misc]
        assert taken == []
    for thread in threads:
        thread.join(10)
    assert taken == list(range(6))
    with pytest.raises(ZeroDivisionError), turns:
        raise ZeroDivisionError
    with turns:
        pass


def test_a_model_thread_does_all_work_in_the_order_in_which_it_came() -> None:
    model_thread, done, began = ModelThread(), [], threading.Event()
    waiting = model_thread._executor._work_queue

    def work(number: int) -> int:
        if not number:
            began.wait(10)
        done.append((number, threading.get_ident()))
        return number

    with ThreadPoolExecutor(6) as callers:
        results = []
        for number in range(6):
            results.append(callers.submit(model_thread.run, partial(work, number)))
            until(lambda number=number: waiting.qsize() == number)  # type: ignore[misc]
        began.set()
        assert [result.result(10) for result in results] == list(range(6))
    assert [number for number, _ in done] == list(range(6))
    assert len({thread for _, thread in done}) == 1
    with pytest.raises(ZeroDivisionError):
        model_thread.run(lambda: 1 // 0)
