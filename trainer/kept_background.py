"""Keeps what an encoder makes of text in general, so that a new process need not embed that.

Derived, and safe to lose: where anything of it is missing, damaged or of another encoder, the texts
are embedded again. To embed them takes a second of each command that publishes.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np

from router.background import background_of, embed_general_texts, general_texts
from router.errors import PromptyardError
from router.fitting import Background
from router.interfaces import Encoder, FloatArray
from trainer.artifact_writer import ArtifactWriter, write_durably

FOLDER = "background"
_VECTORS = "vectors"


def kept_background(home: Path, encoder: Encoder) -> Background:
    """The background of `encoder`, which `home` keeps, or does from now on."""
    files = ArtifactWriter(home / FOLDER)
    asked = "\n".join([encoder.fingerprint, *general_texts()])
    named = home / FOLDER / f"of-{hashlib.sha256(asked.encode()).hexdigest()}"
    vectors = _read(files, named, encoder.dimension)
    if vectors is None:
        vectors = embed_general_texts(encoder)
        with contextlib.suppress(OSError, PromptyardError):
            digest = files.write_tensors({_VECTORS: vectors})
            write_durably(named, digest.encode())
    return background_of(vectors)


def _read(files: ArtifactWriter, named: Path, dimension: int) -> FloatArray | None:
    try:
        digest = named.read_text(encoding="ascii")
        vectors = files.read_tensor(digest, _VECTORS, np.float32, dimension)
    except (OSError, ValueError, PromptyardError):
        return None
    return vectors.astype(np.float32, copy=False)
