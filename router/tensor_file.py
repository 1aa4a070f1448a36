"""The format of safetensors, in parts: large tensors are written from where they are."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# What the format calls the types that a head has, in the order in which a file has them.
_NAMES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "int16": "I16",
    "uint8": "U8",
}
_ALIGNMENT = 8


def tensor_file(
    tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]
) -> list[memoryview]:
    """The parts of the file that `safetensors.numpy.save` makes of them, byte by byte.

    Raises:
        KeyError: a tensor of another type than a head has.
    """
    order = sorted(tensors, key=lambda name: (list(_NAMES).index(str(tensors[name].dtype)), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    parts = [memoryview(len(text).to_bytes(8, "little") + text)]
    for name in order:
        if tensors[name].size:
            parts.append(np.ascontiguousarray(tensors[name]).data.cast("B"))
    return parts
