"""semantic-router in a process of its own, timed in that process: no network on its side.

    python -m tests.benchmarks.peer_worker [SITE-PACKAGES]

The folder is of an environment that has semantic-router; it comes last on the path, so that both
sides have the same torch and numpy. Prints the version; then for every line of stdin, which names
an encoder, the median seconds of a call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from router.backends.onnx_encoder import model_folder
from router.bootstrap import load_encoder
from tests.benchmarks.bench_route import median_seconds
from tests.benchmarks.serving_homes import example_requests, short_texts
from trainer.data import read_labelled

THEIR_ENCODER = "semantic-router, its own encoder"
OUR_ENCODER = "semantic-router, our encoder"


def _routers() -> dict[str, Callable[[str], object]]:
    """Their router over the example tasks, with their encoder and with ours; same weights."""
    from semantic_router import Route
    from semantic_router.encoders import DenseEncoder, HuggingFaceEncoder
    from semantic_router.routers import IndexedRouter

    ours = load_encoder()

    class OurEncoder(DenseEncoder):
        def __call__(self, docs: list[str]) -> list[list[float]]:
            return ours.encode(docs).vectors.tolist()

    routes = [
        Route(name=task.name, utterances=[row.input for row in read_labelled(task.data).examples])
        for task in example_requests()
    ]
    encoders = {
        THEIR_ENCODER: HuggingFaceEncoder(name=str(model_folder())),
        OUR_ENCODER: OurEncoder(name="ours"),
    }
    return {name: IndexedRouter(encoder, routes) for name, encoder in encoders.items()}


def _main() -> None:
    sys.path += sys.argv[1:]
    try:
        from semantic_router import __version__
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    routers = _routers()
    texts = short_texts()
    print(json.dumps({"version": __version__}), flush=True)
    while line := sys.stdin.readline():
        print(json.dumps(median_seconds(routers[line.strip()], texts)), flush=True)


if __name__ == "__main__":
    _main()
