"""Builds the ONNX graph of all-MiniLM-L6-v2 from its weights, with pooling inside.

The graph is written down here instead of being exported and optimised, so that nothing has to be
shipped, cached or converted, torch is not needed to serve, and every operator is chosen:

- fused attention, residual LayerNorm and GELU (ONNX Runtime's contrib operators);
- optionally int8 matrix products whose activation scale is **per row**. The usual dynamic
  quantisation takes one scale for the whole batch, so that a text's vector depends on its batch
  neighbours; with one scale per token the integer products are exact for each token by itself.

Pooling: per chosen layer a weighted mean over the tokens, L2-normalised; the layers are
concatenated and scaled to a unit vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Weights = Mapping[str, NDArray[np.float32]]

LAYERS = 6
HEADS = 12
HIDDEN = 384
WORDS = "embeddings.word_embeddings.weight"
# The first layers read every text alike; an encoder prompt stands in those after them.
UNPROMPTED_LAYERS = 2
PROMPT_WIDTH = 2 * HIDDEN * (LAYERS - UNPROMPTED_LAYERS)

_FUSED = "com.microsoft"
_EPSILON = 1e-12
_INT8_LEVELS = 127.0


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A float32 tensor in a file: its name within the folder that the session is told, its place.

    ONNX Runtime maps it into memory, so that processes share one copy and nothing is read that no
    text asks for.
    """

    file: str
    offset: int
    shape: tuple[int, ...]


def build_minilm_graph(
    weights: Weights,
    words: StoredTensor,
    layers: Sequence[int],
    *,
    int8: bool,
    prompted: bool = False,
) -> bytes:
    """A serialised ONNX model.

    Args:
        weights: the tensors of the model's safetensors file, by name.
        words: the largest of them, `WORDS`, which the model refers to instead of holding it.
        layers: the layers to pool, 0 (embeddings) to 6, in the order of concatenation.
        int8: int8 matrix products instead of float32 ones.
        prompted: read every text under an encoder prompt.

    Inputs of the graph: `ids` `[B, T]` int32; `lengths` `[B]` int32 (tokens before the padding);
    `averaging` `[B, len(layers), T]` float32 (what a token counts in the mean of each pooled layer:
    0 on padding); and where it is `prompted`,
    `prompts` `[B, P, PROMPT_WIDTH]` float32, of which each virtual token holds the keys and the
    values of every layer after the `UNPROMPTED_LAYERS`, layer by layer, keys before values; and
    `prompted_lengths` `[B]` int32, P more than `lengths`. Output: `embedding`
    `[B, len(layers) * 384]` float32.
    """
    graph = _Graph(weights, int8)
    hidden = graph.embeddings(words)
    states = [hidden]
    prefixes = graph.prefixes() if prompted else {}
    for layer in range(max(layers)):
        hidden = graph.layer(layer, hidden, prefixes.get(layer))
        states.append(hidden)
    graph.pool([states[layer] for layer in layers])
    return graph.model(len(layers), prompted).SerializeToString()


class _Graph:
    def __init__(self, weights: Weights, int8: bool) -> None:
        self._weights = weights
        self._int8 = int8
        self._nodes: list[NodeProto] = []
        self._tensors: list[TensorProto] = []
        self._quantised: dict[str, tuple[str, str]] = {}
        if int8:
            self._constant("last_axis", np.array([-1], np.int64))
            self._constant("one", np.array(1, np.float32))
            self._constant("levels", np.array(1 / _INT8_LEVELS, np.float32))
            self._constant("tiny", np.array(1e-12, np.float32))
            self._constant("zero_point", np.array(128, np.uint8))

    def embeddings(self, words: StoredTensor) -> str:
        """Word + position + token type 0, normalised."""
        weights = self._weights
        self._stored("words", words)
        positions = weights["embeddings.position_embeddings.weight"]
        types = weights["embeddings.token_type_embeddings.weight"]
        self._constant("positions", positions + types[0])
        gain, bias = self._norm("embeddings.LayerNorm")
        return self._add(
            "EmbedLayerNormalization",
            ["ids", "", "words", "positions", "", gain, bias, ""],
            "embedded",
            outputs=["embedded", "unused_mask"],
            domain=_FUSED,
            epsilon=_EPSILON,
        )

    def prefixes(self) -> dict[int, tuple[str, str]]:
        """By layer, the keys and the values `[B, P, 384]` that the encoder prompts hold for it."""
        layers = range(UNPROMPTED_LAYERS, LAYERS)
        parts = [f"prompt.{layer}.{part}" for layer in layers for part in ("key", "value")]
        self._add("Split", ["prompts"], "prompt", outputs=parts, axis=-1, num_outputs=len(parts))
        return dict(zip(layers, zip(parts[::2], parts[1::2], strict=True), strict=True))

    def layer(self, number: int, hidden: str, prefix_states: tuple[str, str] | None = None) -> str:
        """One post-norm transformer layer, whose tokens attend to those keys and values too."""
        prefix = f"encoder.layer.{number}."
        stacked = [f"{prefix}attention.self.{part}" for part in ("query", "key", "value")]
        weight = np.concatenate([self._weights[f"{part}.weight"] for part in stacked])
        bias = np.concatenate([self._weights[f"{part}.bias"] for part in stacked])
        product = self._product(hidden, weight, f"{prefix}qkv")
        parts = [f"{prefix}{part}" for part in "qkv"]
        added = self._constant(f"{prefix}qkv.bias", bias)
        lengths = "lengths"
        if prefix_states is not None:  # to which no bias is added
            product = self._add("Add", [product, added], f"{prefix}qkv.biased")
        self._add("Split", [product], parts[0], outputs=parts, axis=-1, num_outputs=3)
        if prefix_states is not None:
            added, lengths = "", "prompted_lengths"
            for place, states in enumerate(prefix_states, start=1):
                joined = f"{parts[place]}.prompted"
                parts[place] = self._add("Concat", [states, parts[place]], joined, axis=1)
        attended = self._add(
            "MultiHeadAttention",
            [*parts, added, lengths],
            f"{prefix}attended",
            domain=_FUSED,
            num_heads=HEADS,
        )
        hidden = self._projected(attended, hidden, f"{prefix}attention.output")
        inner = self._product(
            hidden, self._weights[f"{prefix}intermediate.dense.weight"], f"{prefix}inner"
        )
        inner_bias = self._weight(f"{prefix}intermediate.dense.bias")
        activated = self._add("BiasGelu", [inner, inner_bias], f"{prefix}gelu", domain=_FUSED)
        return self._projected(activated, hidden, f"{prefix}output")

    def pool(self, states: Sequence[str]) -> None:
        """Weighted mean over tokens per state, normalised; concatenated to a unit vector."""
        self._constant("token_axis", np.array([1], np.int64))
        self._constant("unit", np.array(len(states) ** -0.5, np.float32))
        weights = [f"{state}.weights" for state in states]
        self._add(
            "Split", ["averaging"], weights[0], outputs=weights, axis=1, num_outputs=len(states)
        )
        pooled = []
        for state, weight in zip(states, weights, strict=True):
            mean = self._add("MatMul", [weight, state], f"{state}.mean")
            mean = self._add("Squeeze", [mean, "token_axis"], f"{state}.flat")
            pooled.append(self._add("LpNormalization", [mean], f"{state}.unit", axis=-1, p=2))
        joined = self._add("Concat", pooled, "joined", axis=-1)
        self._add("Mul", [joined, "unit"], "embedding")

    def model(self, pooled: int, prompted: bool) -> ModelProto:
        """The finished model, of so many pooled layers."""
        value = helper.make_tensor_value_info
        inputs = [
            value("ids", TensorProto.INT32, ["batch", "tokens"]),
            value("lengths", TensorProto.INT32, ["batch"]),
            value("averaging", TensorProto.FLOAT, ["batch", pooled, "tokens"]),
        ]
        if prompted:
            inputs += [
                value("prompts", TensorProto.FLOAT, ["batch", "prompt", PROMPT_WIDTH]),
                value("prompted_lengths", TensorProto.INT32, ["batch"]),
            ]
        graph = helper.make_graph(
            self._nodes,
            "all-MiniLM-L6-v2",
            inputs,
            [value("embedding", TensorProto.FLOAT, ["batch", HIDDEN * pooled])],
            self._tensors,
        )
        versions = [helper.make_opsetid("", 18), helper.make_opsetid(_FUSED, 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=9)

    def _projected(self, inner: str, residual: str, name: str) -> str:
        """Norm(inner @ dense + bias + residual)."""
        product = self._product(inner, self._weights[f"{name}.dense.weight"], f"{name}.product")
        gain, bias = self._norm(f"{name}.LayerNorm")
        return self._add(
            "SkipLayerNormalization",
            [product, residual, gain, bias, self._weight(f"{name}.dense.bias")],
            f"{name}.normed",
            domain=_FUSED,
            epsilon=_EPSILON,
        )

    def _product(self, inputs: str, weight: NDArray[np.float32], name: str) -> str:
        """`inputs [B, T, I] @ weight [O, I]'`."""
        if not self._int8:
            return self._add("MatMul", [inputs, self._constant(f"{name}.w", weight.T)], name)
        quantised, row_scale = self._quantise_rows(inputs)
        column_scale = np.abs(weight).max(1) / _INT8_LEVELS
        integers = np.rint(weight / column_scale[:, None]).astype(np.int8)
        product = self._add(
            "MatMulIntegerToFloat",
            [
                quantised,
                self._constant(f"{name}.int8", integers.T),
                "one",
                self._constant(f"{name}.scale", column_scale.astype(np.float32)),
                "zero_point",
            ],
            f"{name}.unscaled",
            domain=_FUSED,
        )
        return self._add("Mul", [product, row_scale], name)

    def _quantise_rows(self, inputs: str) -> tuple[str, str]:
        """uint8 around 128 with one scale per row (token): the integers, and the scales."""
        if inputs not in self._quantised:
            size = self._add("Abs", [inputs], f"{inputs}.abs")
            largest = self._add("ReduceMax", [size, "last_axis"], f"{inputs}.max", keepdims=1)
            # Padding rows may be all zero.
            largest = self._add("Max", [largest, "tiny"], f"{inputs}.floor")
            scale = self._add("Mul", [largest, "levels"], f"{inputs}.scale")
            scaled = self._add("Div", [inputs, scale], f"{inputs}.scaled")
            integers = self._add("QuantizeLinear", [scaled, "one", "zero_point"], f"{inputs}.uint8")
            self._quantised[inputs] = (integers, scale)
        return self._quantised[inputs]

    def _norm(self, name: str) -> tuple[str, str]:
        return self._weight(f"{name}.weight"), self._weight(f"{name}.bias")

    def _weight(self, name: str) -> str:
        return self._constant(name, self._weights[name])

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        self._tensors.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _stored(self, name: str, stored: StoredTensor) -> None:
        tensor = TensorProto(
            name=name,
            data_type=TensorProto.FLOAT,
            dims=stored.shape,
            data_location=TensorProto.EXTERNAL,
        )
        tensor.external_data.add(key="location", value=stored.file)
        tensor.external_data.add(key="offset", value=str(stored.offset))
        self._tensors.append(tensor)

    def _add(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: float,
    ) -> str:
        node = helper.make_node(operator, inputs, outputs or [name], domain=domain)
        node.attribute.extend(helper.make_attribute(*item) for item in attributes.items())
        self._nodes.append(node)
        return name
