"""What the head takes of a `Route` call, in a catalog of many tasks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from router.client import RouterClient
from router.interfaces import Encoder
from router.threads import one_blas_thread
from tests.benchmarks.bench_publish import publish
from tests.benchmarks.served import serving
from trainer.evaluate_routing import load_snapshot
from trainer.workshop import Workshop

CALLS = 1000
_WARM_UP = 100
_MOST_BYTES = 80
_DECIDE = ("promptyard_stage_seconds_sum", "routing_decide")


def head_in_a_call(
    encoder: Encoder, texts: Sequence[str], heads: Sequence[str], tasks: int = 1000
) -> list[dict[str, object]]:
    """Means over calls of one caller, with tasks drawn around the embeddings of `texts`.

    The head's own time is measured in this process, after encoding a text, so that the processor's
    caches are as they are in a server. "Deciding" is what the server says it takes: the head,
    thresholds, policy, the decision and what is counted.
    """
    real = encoder.encode(texts).vectors
    short = [text for text in texts if len(text.encode()) <= _MOST_BYTES]
    rows = []
    for head in heads:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "home"
            with Workshop(home, encoder) as workshop, one_blas_thread():
                publish(workshop, real, range(tasks), head, gate=False)
            own = _own_ms(home, encoder, short)
            call, deciding = _call_and_deciding_ms(home, short)
        rows.append(
            {
                "tasks": tasks,
                "head": f"`{head}`",
                "Route, ms": f"{call:.2f}",
                "head, ms": f"{own:.3f}",
                "share": own / call,
                "deciding, ms": f"{deciding:.3f}",
                "share of deciding": deciding / call,
            }
        )
    return rows


def _own_ms(home: Path, encoder: Encoder, texts: Sequence[str]) -> float:
    """From an embedding to the scores of the two best tasks."""
    snapshot = load_snapshot(home, encoder)
    seconds = []
    with one_blas_thread():
        for number in range(_WARM_UP + CALLS):
            vectors = encoder.encode([texts[number % len(texts)]]).vectors
            began = time.perf_counter()
            queries, _ = snapshot.head.queries(vectors)
            snapshot.index.search(queries, 2)
            seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.fmean(seconds[_WARM_UP:])


def _call_and_deciding_ms(home: Path, texts: Sequence[str]) -> tuple[float, float]:
    with (
        serving(home, "--route-only", metrics=True) as served,
        RouterClient(served.address) as client,
    ):
        _mean_ms(client.route, texts, _WARM_UP)
        before = served.scrape()
        call = _mean_ms(client.route, texts, CALLS)
        return call, 1e3 * (served.scrape()[_DECIDE] - before[_DECIDE]) / CALLS


def _mean_ms(call: Callable[[str], object], texts: Sequence[str], calls: int) -> float:
    began = time.perf_counter()
    for number in range(calls):
        call(texts[number % len(texts)])
    return 1e3 * (time.perf_counter() - began) / calls
