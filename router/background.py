"""The shipped background statistics: what an encoder makes of general text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from router.fitting import Background

FOLDER = Path(__file__).parent / "models" / "background"


def load_background(encoder_fingerprint: str) -> Background | None:
    """The background of an encoder, or None where none is shipped for its features.

    Runtime and precision, the last part of a fingerprint, change embeddings by less than the
    background's own sampling error, so that they do not matter here.
    """
    path = background_file(encoder_fingerprint)
    if not path.exists():
        return None
    tensors = load_file(path)
    mean = tensors["mean"].astype(np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    covariance[np.triu_indices(len(mean))] = tensors["covariance_upper"]
    covariance += np.triu(covariance, 1).T
    return Background(mean, covariance)


def background_file(encoder_fingerprint: str) -> Path:
    """Where the background of an encoder's features is shipped."""
    features = encoder_fingerprint.rsplit(":", 1)[0].replace(":", "_")
    return FOLDER / f"{features}.safetensors"
