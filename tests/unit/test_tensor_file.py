"""The parts of a file of tensors are the bytes that the safetensors library writes."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save

from router.tensor_file import tensor_file

TENSORS = {
    "rows": np.arange(12, dtype=np.float32).reshape(4, 3),
    "every other column": np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2],
    "numbers": np.arange(5),
    "levels": np.array([[0.5, np.nan]]),
    "odd": np.arange(3, dtype=np.int16),
    "decided": np.arange(3, dtype=np.int32),
    "bytes": np.arange(5, dtype=np.uint8),
    "none": np.zeros((0, 7), np.float32),
}


@pytest.mark.parametrize("names", [list(TENSORS), ["odd"], ["rows", "odd", "numbers"], []])
@pytest.mark.parametrize("about", ["", '{"quoted": "Größe \\n"}', "x" * 13])
def test_the_bytes_are_those_of_the_library(names: list[str], about: str) -> None:
    tensors = {name: TENSORS[name] for name in names}
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    found = b"".join(tensor_file(tensors, {"head": about}))
    assert found == save(whole, metadata={"head": about})


def test_a_large_tensor_is_not_copied() -> None:
    rows = TENSORS["rows"]
    _, part = tensor_file({"rows": rows}, {})
    assert np.shares_memory(np.frombuffer(part, np.uint8), rows)
