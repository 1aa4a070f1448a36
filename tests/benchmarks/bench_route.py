"""What one `Route` call costs over the encoder alone and an empty gRPC call, in the same run.

    make bench-route

The server is a process of its own, on the catalog of the example tasks (routing only). The three
are timed in turn, so that all of them see the same machine; medians of several rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.bootstrap import load_encoder
from router.client import RouterClient
from router.interfaces import Encoder
from trainer.commands import RegisterTask
from trainer.demo import EXAMPLES, running_server
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

ROUNDS = 5
CALLS = 300
WARM_UP = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    encoder = load_encoder()
    texts = [
        json.loads(line)["input"]
        for path in sorted((EXAMPLES / "heldout").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    texts = [text for text in texts if len(text.split()) <= 15]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        requests = [
            RegisterTask(path.stem, path, with_prompt=False)
            for path in sorted((EXAMPLES / "heldout").glob("*.jsonl"))
        ]
        with Workshop(home, encoder) as workshop:
            register(workshop, requests, None, TuningSettings())
        # The texts come again and again, and it is the encoder that is to be compared with.
        os.environ["PROMPTYARD_CACHE_MIB"] = "0"
        with running_server(home) as address, contenders(encoder, address) as calls:
            rounds = [
                {name: median_seconds(call, texts) for name, call in calls.items()}
                for _ in range(ROUNDS)
            ]
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    floor = medians["encoder alone"] + medians["empty gRPC call"]
    ratios = [r["Route"] / (r["encoder alone"] + r["empty gRPC call"]) for r in rounds]
    for name, seconds in medians.items():
        print(f"{name:>18}: {1e3 * seconds:.2f} ms")
    print(f"Route / (encoder + empty call): {medians['Route'] / floor:.2f}")
    print(f"in each of {ROUNDS} rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    print("repeat with: make bench-route")
    if arguments.json:
        arguments.json.write_text(json.dumps({"medians": medians, "ratios": ratios}, indent=2))
    sys.exit(0 if medians["Route"] / floor <= 2.5 else 1)


@contextmanager
def contenders(encoder: Encoder, address: str) -> Iterator[dict[str, Callable[[str], object]]]:
    """What is called, by name: `Route` at that address, and the two that are its floor."""
    with grpc.insecure_channel(address) as channel, RouterClient(address) as client:
        health = health_pb2_grpc.HealthStub(channel)
        yield {
            "encoder alone": lambda text: encoder.encode([text]),
            "empty gRPC call": lambda _: health.Check(health_pb2.HealthCheckRequest()),
            "Route": client.route,
        }


def median_seconds(call: Callable[[str], object], texts: list[str]) -> float:
    """The median time of a call, after some that are not counted."""
    chosen = [texts[number % len(texts)] for number in range(CALLS + WARM_UP)]
    seconds = []
    for text in chosen:
        began = time.perf_counter()
        call(text)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


if __name__ == "__main__":
    main()
