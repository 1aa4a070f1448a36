"""The `fast` encoder: a vector for each token, and for a text the mean of its tokens' vectors.

The token vectors are distilled from the installed all-MiniLM-L6-v2, after Model2Vec (Tulkens and
van Dongen 2024, github.com/MinishLab/model2vec): what the model makes of a token that stands alone,
less the mean over the vocabulary. Its embedding layer is all that is run for that. On training rows
of four data sets (cross-fitted), vectors of layer 1 routed no better, nor did those of deeper
layers, fewer dimensions (PCA), or weights that take frequent words back (SIF, Arora et al. 2017):
function words tell intents apart.

The vectors are made on first use, in double precision and then rounded, so that they have the same
bits on every machine, and are kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy.sparse import csr_array

from router.backends.minilm_graph import HIDDEN
from router.backends.onnx_encoder import (
    NAME,
    WEIGHTS_SHA256,
    check_weights,
    load_tokenizer,
    model_folder,
)
from router.interfaces import Embeddings, FloatArray

WINDOW_TOKENS = 1024
CACHE_VARIABLE = "PROMPTYARD_CACHE"

# Of the way in which the vectors are made: another way is another file.
_VERSION = 1
_TENSOR = "token_vectors"
_EPSILON = 1e-12

_log = structlog.get_logger(__name__)


class StaticMiniLM:
    """Mean of token vectors, scaled to a unit vector: an `Encoder` with D = 384. Thread-safe.

    The tokens of a text are counted alike in any order. A text without a token counts as a word
    that is not known.
    """

    def __init__(self, cache: Path | None = None) -> None:
        """Load the token vectors from the folder `cache`, or make them and keep them there.

        The default is `$PROMPTYARD_CACHE`, or the user's cache folder. One that cannot be written
        costs a second at every start.

        Raises:
            IncompatibleModelError: the installed weights are not the published ones.
        """
        folder = model_folder()
        self._tokenizer = load_tokenizer(folder, WINDOW_TOKENS)
        self._unknown = self._tokenizer.get_vocab()["[UNK]"]
        fixed = _cached_token_vectors(_cache_folder() if cache is None else cache)
        self._digest = _digest(fixed)
        self._vectors = fixed.astype(np.float32)

    @property
    def name(self) -> str:
        """`fast`."""
        return "fast"

    @property
    def fingerprint(self) -> str:
        """The digest of the token vectors, what they are of, pooling, window and precision."""
        return (
            f"fast-{NAME}:{self._digest[:16]}:mean-of-tokens:window-{WINDOW_TOKENS}:static-float32"
        )

    @property
    def dimension(self) -> int:
        """384."""
        return HIDDEN

    @property
    def window(self) -> int:
        """1024."""
        return WINDOW_TOKENS

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, cut to the window."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [max(len(encoding), 1) for encoding in encodings]

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Embed `texts` `[B]` to unit vectors `[B, 384]`."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [encoding.ids or [self._unknown] for encoding in encodings]
        ends = np.cumsum([0, *map(len, ids)])
        tokens = np.fromiter((token for row in ids for token in row), np.int64, int(ends[-1]))
        counts = csr_array(
            (np.ones(len(tokens), np.float32), tokens, ends),
            shape=(len(ids), len(self._vectors)),
        )
        # Row by row, so that the bits of one do not depend on the others.
        sums: FloatArray = counts @ self._vectors
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        truncated = np.array([bool(encoding.overflowing) for encoding in encodings], np.bool_)
        return Embeddings(sums / np.maximum(norms, np.float32(_EPSILON)), truncated)


def make_token_vectors() -> NDArray[np.float16]:
    """A vector `[V, 384]` for every token of the installed all-MiniLM-L6-v2.

    Raises:
        IncompatibleModelError: the installed weights are not the published ones.
    """
    content = (model_folder() / "model.safetensors").read_bytes()
    check_weights(content)
    weights = load(content)
    layer = "embeddings."
    # A token that stands alone is at place 1, behind the one that begins a text.
    states = (
        weights[f"{layer}word_embeddings.weight"].astype(np.float64)
        + weights[f"{layer}position_embeddings.weight"][1]
        + weights[f"{layer}token_type_embeddings.weight"][0]
    )
    states -= states.mean(1, keepdims=True)
    states /= np.sqrt((states**2).mean(1, keepdims=True) + _EPSILON)
    states *= weights[f"{layer}LayerNorm.weight"]
    vectors: NDArray[np.float16] = (states - states.mean(0)).astype(np.float16)
    return vectors


def _cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_path("promptyard"))


def _cached_token_vectors(folder: Path) -> NDArray[np.float16]:
    path = folder / f"fast-{WEIGHTS_SHA256[:16]}-{_VERSION}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    made = make_token_vectors()
    _keep(path, made)
    return made


def _read(path: Path) -> NDArray[np.float16] | None:
    """What `_keep` wrote; None where there is nothing, or not all of it."""
    try:
        content = path.read_bytes()
        stored = load(content)
        vectors: NDArray[np.float16] = stored[_TENSOR]
        whole = bool(stored["sha256"].tobytes().hex() == _digest(vectors))
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return vectors if whole and vectors.dtype == np.float16 and vectors.ndim == 2 else None


def _keep(path: Path, vectors: NDArray[np.float16]) -> None:
    """Write the file whole or not at all; where that cannot be, the next start makes it again."""
    digest = np.frombuffer(bytes.fromhex(_digest(vectors)), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save({_TENSOR: vectors, "sha256": digest}))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        _log.info("token vectors not kept", folder=str(path.parent), problem=error.strerror)


def _digest(vectors: NDArray[np.float16]) -> str:
    return hashlib.sha256(vectors.tobytes()).hexdigest()
