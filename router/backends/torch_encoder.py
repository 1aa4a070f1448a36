"""Sentence encoders on torch: any sentence-transformers model, and the embedded one on a GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer

from router.backends.minilm_graph import PROMPT_WIDTH
from router.backends.onnx_encoder import (
    NAME,
    POOLED_LAYERS,
    POOLING,
    TUNED_DIMENSIONS,
    WEIGHTS_SHA256,
    WINDOW_TOKENS,
    batches_by_length,
    check_encoder_prompts,
    check_weights,
    learner,
    model_folder,
    token_weights,
)
from router.backends.prompted_minilm import (
    MiniLMLearner,
    even_weights,
    pooled_states,
    unit_means,
)
from router.errors import IncompatibleModelError, InvalidInputError
from router.interfaces import Embeddings, FloatArray, HalfArray

# Enough to keep a GPU busy.
_MAX_BATCH_TOKENS = 4096


class TorchEncoder:
    """A sentence-transformers model as an `Encoder`, float32, on a CPU or a GPU.

    Without `layers` it keeps its own pooling. With `layers` its token states at those layers (0:
    embeddings) are mean-pooled, each L2-normalised, concatenated and scaled to a unit vector.
    """

    def __init__(
        self,
        name_or_folder: str,
        layers: Sequence[int] = (),
        device: str = "cpu",
        window: int | None = None,
    ) -> None:
        """Load a model by hub name or folder.

        Raises:
            InvalidInputError: there is no such model.
            IncompatibleModelError: it has no such layers.
        """
        try:
            _check_exists(name_or_folder)
            self._model = SentenceTransformer(name_or_folder, device=device)
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                "encoder", name_or_folder, "give all-MiniLM-L6-v2, fast, a hub name or a folder"
            ) from error
        self._model.eval()
        if window is not None:
            self._model.max_seq_length = window
        self._layers = tuple(layers)
        # Two hosts may keep the same model in different folders.
        self._name = Path(name_or_folder).name if Path(name_or_folder).is_dir() else name_or_folder
        self._weights_sha256 = _weights_digest(self._model)
        if self._layers and max(self._layers) > self._transformer.config.num_hidden_layers:
            raise IncompatibleModelError(
                "layers",
                self._layers,
                f"the model has {self._transformer.config.num_hidden_layers} layers",
            )

    @property
    def name(self) -> str:
        """The hub name, or the folder's name."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Weights, pooling, window, runtime and precision."""
        return (
            f"{self._name}:{self._weights_sha256[:16]}:{self._pooling}"
            f":window-{self._model.max_seq_length}:torch-float32"
        )

    @property
    def dimension(self) -> int:
        """The width of an embedding."""
        if self._layers:
            return int(self._transformer.config.hidden_size) * len(self._layers)
        width = self._model.get_embedding_dimension()
        return int(width or 0)

    @property
    def window(self) -> int:
        """As the model's own settings say, or as it was set."""
        return int(self._model.max_seq_length or 512)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, cut to the window."""
        return [min(length, self.window) for length in self._lengths(texts)]

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Embed `texts` `[B]` to unit vectors `[B, D]`."""
        lengths = np.array(self._lengths(texts), np.int32)
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        with torch.inference_mode():
            for chosen in batches_by_length(np.minimum(lengths, self.window), _MAX_BATCH_TOKENS):
                rows = [texts[row] for row in chosen]
                vectors[chosen] = self._pooled(rows) if self._layers else self._own(rows)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return Embeddings(vectors / np.maximum(norms, 1e-12), lengths > self.window)

    @property
    def _pooling(self) -> str:
        return "mean-" + "+".join(map(str, self._layers)) if self._layers else "own"

    @property
    def _transformer(self) -> Any:  # noqa: ANN401 - any Hugging Face model
        return self._model[0].model

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        encoded = self._model.tokenizer(list(texts), truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def _own(self, texts: Sequence[str]) -> FloatArray:
        vectors: FloatArray = self._model.encode(list(texts), show_progress_bar=False)
        return vectors

    def _tokens(self, texts: Sequence[str]) -> Any:  # noqa: ANN401 - a tokenizer's own mapping
        """Ids and mask of texts, cut to the window and padded on the right, on the device."""
        return self._model.tokenizer(
            list(texts), truncation=True, max_length=self.window, padding=True, return_tensors="pt"
        ).to(self._model.device)

    def _pooled(self, texts: Sequence[str]) -> FloatArray:
        tokens = self._tokens(texts)
        states = self._transformer(**tokens, output_hidden_states=True).hidden_states
        weights = self._weights(tokens["attention_mask"])
        pooled = unit_means([states[layer] for layer in self._layers], weights)
        joined = torch.cat(pooled, 1) / len(self._layers) ** 0.5
        vectors: FloatArray = joined.cpu().numpy()
        return vectors

    def _weights(self, mask: torch.Tensor) -> torch.Tensor:
        """What the tokens in `mask` `[B, T]` count in the mean of each pooled layer `[B, L, T]`."""
        return even_weights(mask)[:, None].expand(-1, len(self._layers), -1)


class TorchMiniLM(TorchEncoder):
    """The embedded all-MiniLM-L6-v2 on torch: the same features as on ONNX Runtime in float32."""

    def __init__(self, device: str = "cpu") -> None:
        """Load the weights of the installed package.

        Raises:
            IncompatibleModelError: they are not the published ones.
        """
        folder = model_folder()
        check_weights((folder / "model.safetensors").read_bytes())
        super().__init__(str(folder), POOLED_LAYERS, device, WINDOW_TOKENS)
        self._name = NAME
        self._weights_sha256 = WEIGHTS_SHA256

    @property
    def _pooling(self) -> str:
        return POOLING

    def _weights(self, mask: torch.Tensor) -> torch.Tensor:
        weights = token_weights(mask.sum(1).cpu().numpy(), mask.shape[1])
        return torch.from_numpy(weights).to(mask.device)

    @property
    def prompt_width(self) -> int:
        """3072: keys and values of four layers."""
        return PROMPT_WIDTH

    @property
    def tuned_dimensions(self) -> slice:
        """Those of layer 6."""
        return TUNED_DIMENSIONS

    def for_gradients(self) -> MiniLMLearner:
        """The same network, to tune encoder prompts with."""
        return learner()

    def encode_prompted(self, texts: Sequence[str], prompts: Sequence[HalfArray]) -> FloatArray:
        """Embed `texts` `[B]` under their encoder prompts `[P, W]` to unit vectors `[B, 1152]`.

        Raises:
            IncompatibleModelError: a prompt is of another width.
        """
        check_encoder_prompts(prompts)
        lengths = np.minimum(self._lengths(texts), self.window).astype(np.int32)
        sizes = np.array([len(prompt) for prompt in prompts], np.int32)
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for size in np.unique(sizes):  # those of one batch have one length
            rows = np.flatnonzero(sizes == size)
            for chosen in batches_by_length(lengths[rows] + size, _MAX_BATCH_TOKENS):
                places = rows[chosen]
                tokens = self._tokens([texts[i] for i in places])
                stacked = torch.from_numpy(
                    np.stack([prompts[i] for i in places]).astype(np.float32)
                )
                with torch.inference_mode():
                    pooled = pooled_states(
                        self._transformer,
                        tokens["input_ids"],
                        tokens["attention_mask"],
                        stacked.to(self._model.device),
                        self._layers,
                        self._weights(tokens["attention_mask"]),
                    )
                joined = torch.cat(pooled, 1) / len(pooled) ** 0.5
                vectors[places] = joined.cpu().numpy()
        return vectors


def _check_exists(name_or_folder: str) -> None:
    """Ask the hub once: sentence-transformers would ask for more than a minute.

    Raises:
        OSError: neither a folder nor on the hub (nor in its cache, where it cannot be reached).
        ValueError: not a name that the hub could have.
    """
    if name_or_folder and Path(name_or_folder).is_dir():
        return
    try:
        snapshot_download(name_or_folder, allow_patterns=["config.json"])
    except OSError:
        if "/" in name_or_folder:
            raise
        snapshot_download(f"sentence-transformers/{name_or_folder}", allow_patterns=["config.json"])


def _weights_digest(model: SentenceTransformer) -> str:
    """SHA-256 over the parameters by name: also of a model that has no single weights file."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
