"""Builds the shipped background statistics: mean and covariance of general text's embeddings.

    python -m trainer.build_background DATA_DIR

DATA_DIR holds public sets whose licence allows it (see SOURCES). Only the aggregate leaves: 768
means and the covariance. None of the sets is one that the project's routing is measured on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from router.backends.onnx_encoder import OnnxMiniLM
from router.background import background_file

# file, field, licence
SOURCES = (
    ("pairs/wikisplit.jsonl.gz", "a", "CC BY-SA 4.0"),
    ("routing/query_wellformedness.jsonl.gz", "text", "CC BY-SA 4.0"),
    ("routing/snips.jsonl.gz", "text", "CC0 1.0"),
)
_ROWS_PER_SOURCE = 4000
_SEED = 0


def main() -> None:
    """Embed a sample of every source and write the statistics."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the sets named in SOURCES")
    folder: Path = parser.parse_args().data
    encoder = OnnxMiniLM(precision="float32")
    texts = [
        text
        for name, field, _ in SOURCES
        for text in _sample(folder / name, field, _ROWS_PER_SOURCE)
    ]
    vectors = encoder.encode(texts).vectors.astype(np.float64)
    covariance = np.cov(vectors.T)
    path = background_file(encoder.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            "mean": vectors.mean(0).astype(np.float32),
            "covariance_upper": covariance[np.triu_indices(len(covariance))].astype(np.float32),
        },
        path,
        metadata={
            "rows": str(len(texts)),
            "sources": "; ".join(f"{name} ({licence})" for name, _, licence in SOURCES),
        },
    )
    print(f"{path}: {len(texts)} texts, {path.stat().st_size} bytes")


def _sample(path: Path, field: str, rows: int) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = sorted({json.loads(line)[field] for line in lines})
    return random.Random(_SEED).sample(texts, min(rows, len(texts)))


if __name__ == "__main__":
    main()
