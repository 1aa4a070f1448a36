"""The example tasks' held-out rows stay apart from the rows that are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from router.backends.onnx_encoder import TUNED_DIMENSIONS, OnnxMiniLM
from router.interfaces import FloatArray
from trainer.demo import EXAMPLES

# The cosine of what all-MiniLM-L6-v2 makes of two texts, its last layer alone. Rows that say the
# same of the same thing come to 0.8 and more; the closest that do not, to 0.76.
_SAME_TEXT = 0.77
TASKS = sorted(file.name for file in (EXAMPLES / "heldout").iterdir())


@pytest.fixture(scope="module")
def encoder() -> OnnxMiniLM:
    return OnnxMiniLM()


def inputs_of(file: Path) -> list[str]:
    return [json.loads(line)["input"] for line in file.read_text(encoding="utf-8").splitlines()]


def last_layer(encoder: OnnxMiniLM, texts: list[str]) -> FloatArray:
    vectors = encoder.encode(texts).vectors[:, TUNED_DIMENSIONS]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_every_task_has_held_out_rows() -> None:
    assert len(TASKS) == 10
    assert all((EXAMPLES / name).is_file() for name in TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_no_held_out_row_says_what_a_training_row_says(name: str, encoder: OnnxMiniLM) -> None:
    trained, held_out = inputs_of(EXAMPLES / name), inputs_of(EXAMPLES / "heldout" / name)
    cosines = last_layer(encoder, trained) @ last_layer(encoder, held_out).T
    row, other = np.unravel_index(cosines.argmax(), cosines.shape)
    assert cosines.max() < _SAME_TEXT, (trained[row], held_out[other])
