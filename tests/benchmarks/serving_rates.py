"""Parts of `bench_serving` with many callers: rates of routing, rates of answers, overload."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from router.backends.torch_model import TorchLanguageModel
from router.bootstrap import load_encoder
from router.client import RouterClient
from router.interfaces import Encoder
from router.settings import FAST_ENCODER
from tests.benchmarks.load import OK, Clients, Load, Result, percentile, run_load
from tests.benchmarks.served import Served, serving, serving_nothing
from tests.benchmarks.serving_homes import (
    answering_home,
    held_out,
    routing_home,
    short_texts,
)

CALLERS = 64
BATCH = 32
FAST_BATCHES = (32, 256)
ENCODER_SECONDS = 2.0
# What is asked at once in streams and batches is as much as the unary callers ask.
_STREAMS = {"callers": 4, "outstanding": CALLERS // 4}
_BATCHES = {"callers": 4, "batch": BATCH}
_LONG_TEXT_WORDS = 150
_UNLOADED_CALLS_SECONDS = 5.0


def routing_rates(home: Path, encoder: Encoder, rounds: int, seconds: float) -> dict:
    """Texts a second by way of asking, beside the encoder and a service that does nothing."""
    texts = short_texts()
    loads = {
        "Route": Load("Route", texts, CALLERS),
        "StreamRoute": Load("StreamRoute", texts, **_STREAMS),
        "BatchRoute": Load("BatchRoute", texts, **_BATCHES),
    }
    measured = []
    with serving(home, "--route-only") as served, serving_nothing() as nothing:
        for _ in range(rounds):
            row: dict[str, dict] = {"encoder": {"rate": encoder_rate(encoder, texts)}}
            row["empty service"] = _rate(nothing, Load("Empty", texts, CALLERS), seconds)
            for name, load in loads.items():
                row[name] = _rate(served, load, seconds)
            measured.append(row)
    return {"callers": CALLERS, "seconds": seconds, "rounds": measured}


def fast_rates(home: Path, rounds: int, seconds: float) -> dict:
    """Texts a second with the `fast` encoder, where what is around it is most of the work."""
    routing_home(home, load_encoder(FAST_ENCODER))
    texts = short_texts()
    loads = {
        "Route": Load("Route", texts, CALLERS),
        **{f"BatchRoute {size}": Load("BatchRoute", texts, 4, batch=size) for size in FAST_BATCHES},
    }
    measured = []
    flags = ("--route-only", "--encoder", FAST_ENCODER)
    with serving(home, *flags) as served, serving_nothing() as nothing:
        for _ in range(rounds):
            row = {"empty service": _rate(nothing, Load("Empty", texts, CALLERS), seconds)}
            for name, load in loads.items():
                row[name] = _rate(served, load, seconds)
            measured.append(row)
    return {"callers": CALLERS, "seconds": seconds, "rounds": measured}


def encoder_rate(encoder: Encoder, texts: list[str]) -> float:
    """Texts a second in batches of 32."""
    batches = [texts[start : start + BATCH] for start in range(0, len(texts) - BATCH + 1, BATCH)]
    encoder.encode(batches[0])
    done, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < ENCODER_SECONDS:
        encoder.encode(batches[done % len(batches)])
        done += 1
    return BATCH * done / elapsed


def answer_rates(
    home: Path, encoder: Encoder, base_model: TorchLanguageModel, rounds: int, answers: int
) -> dict:
    """Answers a second of one caller and of many, of 16 tasks mixed and one task after the other.

    The same requests are sent in both orders: they differ in nothing but the switching.
    """
    answering_home(home, encoder, base_model)
    rng = random.Random(0)
    by_task: dict[str, list[str]] = {}
    for text, task in held_out():
        by_task.setdefault(task, []).append(text)
    tasks = [*by_task, *(f"{task}-text" for task in sorted(by_task))]
    with serving(home, "--threads", "2") as served:
        tasks = _served_tasks(served)
        in_turn = [
            (task, text)
            for task in tasks
            for text in _cycled(by_task[task.removesuffix("-text")], answers // len(tasks))
        ]
        mixed = rng.sample(in_turn, len(in_turn))
        few = mixed[: max(len(mixed) // 4, len(tasks))]
        _answers(served, few, CALLERS)  # the first of everything takes longer
        measured = []
        for _ in range(rounds):
            row = {
                "one at a time": _answers(served, few, 1),
                "mixed": _answers(served, mixed, CALLERS),
                "one task after the other": _answers(served, in_turn, CALLERS),
            }
            measured.append(row)
    return {
        "callers": CALLERS,
        "tasks": len(tasks),
        "answers": len(mixed),
        "one at a time": len(few),
        "rounds": measured,
    }


def overload(home: Path, seconds: float, times: float) -> dict:
    """Calls at `times` the rate that the server can do: who is accepted, who refused, and memory.

    The texts are long, so that the server is what is overloaded and not the clients, which share
    its cores.
    """
    texts = long_texts()
    with serving(home, "--route-only") as served:
        unloaded = run_load(served.address, Load("Route", texts, 1, 1), _UNLOADED_CALLS_SECONDS)
        capacity = run_load(served.address, Load("Route", texts, CALLERS), 5.0, 3.0)
        offered = times * capacity.rate
        load = Load("Route", texts, rate=offered, connections=8)
        before = served.resident_mib()
        with Clients(served.address, load) as clients, sampled_memory(served) as memory:
            result = clients.run(seconds, warm_up=0.0)
        after_calm = run_load(served.address, Load("Route", texts, 1, 1), 2.0)
    refused = result.times("RESOURCE_EXHAUSTED")
    return {
        "capacity": capacity.rate,
        "offered": offered,
        "really offered": len(result.calls) / seconds,
        "seconds": seconds,
        "codes": result.codes,
        "problems": result.problems,
        "unloaded": _times(unloaded.times()),
        "at capacity": _times(capacity.times()),
        "refused at capacity": len(capacity.measured) - len(capacity.times()),
        "accepted": _times(result.times()),
        "accepted rate": result.rate,
        "refused": _times(refused),
        "afterwards": _times(after_calm.times()),
        "memory before, MiB": before,
        "memory, MiB": [round(mib, 1) for mib in memory],
        "client cpu share": result.client_cpu_seconds / seconds,
    }


def long_texts() -> list[str]:
    """Texts of 150 words, all of them different."""
    words = " ".join(text for text, _ in held_out()).split()
    step = 37
    return [
        " ".join(words[start : start + _LONG_TEXT_WORDS])
        for start in range(0, len(words) - _LONG_TEXT_WORDS, step)
    ]


@contextlib.contextmanager
def sampled_memory(served: Served) -> Iterator[list[float]]:
    """A server's memory in MiB, once a second, as long as this is open."""
    memory: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            memory.append(served.resident_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


def _rate(served: Served, load: Load, seconds: float) -> dict:
    """One run: rate, times, and processor time of both sides for a text."""
    with Clients(served.address, load) as clients:
        before = served.cpu_seconds()
        result = clients.run(seconds)
        server_cpu = served.cpu_seconds() - before
    _must_be_well(result)
    texts = sum(call.items for call in result.calls)
    return {
        "rate": result.rate,
        **_times(result.times()),
        "server cpu a text": server_cpu / texts,
        "client cpu a text": result.client_cpu_seconds / texts,
    }


def _answers(served: Served, requests: list[tuple[str, str]], callers: int) -> dict:
    load = Load(
        "Generate",
        [text for _, text in requests],
        callers,
        processes=min(callers, 2),
        tasks=[task for task, _ in requests],
        once=True,
        timeout=300.0,
    )
    result = run_load(served.address, load, 0.0, 0.0)
    if result.problems:
        raise RuntimeError(f"calls failed: {result.codes} {result.problems[:3]}")
    refused = len(result.calls) - len(result.times())
    return {"rate": result.rate, "refused": refused, **_times(result.times())}


def _served_tasks(served: Served) -> list[str]:
    with RouterClient(served.address) as client:
        return sorted(task.name for task in client.list_tasks())


def _cycled(texts: list[str], count: int) -> list[str]:
    return [texts[number % len(texts)] for number in range(count)]


def _times(ordered: list[float]) -> dict[str, float]:
    return {"p50": percentile(ordered, 0.5), "p99": percentile(ordered, 0.99), "n": len(ordered)}


def _must_be_well(result: Result) -> None:
    if result.problems or set(result.codes) - {OK}:
        raise RuntimeError(f"calls failed: {result.codes} {result.problems[:3]}")
