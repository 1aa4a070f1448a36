"""The fast encoder with the real token vectors, distilled anew for the tests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from router.backends.onnx_encoder import load_tokenizer, model_folder
from router.backends.static_encoder import (
    CACHE_VARIABLE,
    WINDOW_TOKENS,
    StaticMiniLM,
    make_token_vectors,
)
from router.background import measure_background
from router.bootstrap import load_encoder
from router.compiling import compile_head
from router.errors import InvalidInputError
from router.pooled_moments import PooledMoments
from router.snapshot import Snapshot
from router.statistics import TaskStatistics, to_fixed_point
from router.tasks import Policy, TaskKey
from tests.catalogs import flip_byte
from tests.unit.test_encoder import LONG_TEXT, ODD_TEXTS, TEXTS, example_texts

EXAMPLES = ("home-intent", "news-topic", "question-type")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def fast(cache: Path) -> StaticMiniLM:
    return StaticMiniLM(cache)


@settings(max_examples=30)
@given(data=st.data())
def test_a_vector_has_the_same_bits_alone_and_in_any_batch(
    fast: StaticMiniLM, data: st.DataObject
) -> None:
    texts = data.draw(
        st.lists(st.sampled_from([*TEXTS, *ODD_TEXTS, LONG_TEXT, ""]), min_size=1, max_size=20)
    )
    together = fast.encode(texts)
    for row, text in enumerate(texts):
        alone = fast.encode([text])
        assert together.vectors[row].tobytes() == alone.vectors[0].tobytes()
        assert together.truncated[row] == alone.truncated[0]


def test_vectors_are_the_same_from_every_thread(fast: StaticMiniLM) -> None:
    expected = fast.encode(TEXTS[:50]).vectors.tobytes()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: fast.encode(TEXTS[:50]).vectors, range(8)))
    assert all(vectors.tobytes() == expected for vectors in found)


def test_vectors_are_unit_vectors_also_of_odd_texts(fast: StaticMiniLM) -> None:
    found = fast.encode([*ODD_TEXTS, "", "   ", "🙂"])
    assert found.vectors.shape == (len(ODD_TEXTS) + 3, fast.dimension)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)


def test_no_texts_give_no_vectors(fast: StaticMiniLM) -> None:
    empty = fast.encode([])
    assert empty.vectors.shape == (0, fast.dimension)
    assert empty.truncated.shape == (0,)
    assert fast.count_tokens([]) == []


def test_what_is_beyond_the_window_is_not_read_and_reported(fast: StaticMiniLM) -> None:
    texts = [" ".join(["time"] * words) for words in (1, WINDOW_TOKENS, WINDOW_TOKENS + 1)]
    assert fast.encode(texts).truncated.tolist() == [False, False, True]
    assert fast.count_tokens([*texts, ""]) == [1, WINDOW_TOKENS, WINDOW_TOKENS, 1]
    whole, cut = fast.encode([texts[1], f"{texts[1]} weather money"]).vectors
    np.testing.assert_array_equal(whole, cut)


def test_token_vectors_are_those_of_the_models_own_embedding_layer_less_their_mean() -> None:
    model = AutoModel.from_pretrained(model_folder())
    ids = torch.arange(1000, 30000, 517)
    begin, end = torch.full_like(ids, 101), torch.full_like(ids, 102)
    with torch.inference_mode():
        states = model.embeddings(input_ids=torch.stack([begin, ids, end], 1))[:, 1].numpy()
    vectors = make_token_vectors()
    assert np.abs(vectors.astype(np.float64).mean(0)).max() < 1e-5
    found = vectors[ids.numpy()].astype(np.float32)
    np.testing.assert_allclose(found - found[0], states - states[0], atol=2e-3)


def test_a_text_is_the_mean_of_its_tokens_in_any_order(fast: StaticMiniLM) -> None:
    vectors = make_token_vectors().astype(np.float64)
    tokenizer = load_tokenizer(model_folder(), WINDOW_TOKENS)
    ids = tokenizer.encode("weather in the kitchen", add_special_tokens=False).ids
    mean = vectors[ids].mean(0)
    found = fast.encode(["weather in the kitchen", "the kitchen in weather"]).vectors
    np.testing.assert_allclose(found, np.tile(mean / np.linalg.norm(mean), (2, 1)), atol=1e-5)


def test_fresh_rows_of_the_example_tasks_are_told_apart(fast: StaticMiniLM) -> None:
    pool = PooledMoments(fast.dimension)
    rows = {name: example_texts(name) for name in EXAMPLES}
    pool.update(
        TaskStatistics(TaskKey(name, 1), to_fixed_point(vectors), np.zeros(len(vectors), np.int16))
        for name in EXAMPLES
        for vectors in [fast.encode(rows[name][:50]).vectors]
    )
    head = compile_head(
        pool,
        policy=Policy(),
        encoder=fast.fingerprint,
        dimension=fast.dimension,
        background=measure_background(fast),
    )
    fresh = [(name, text) for name in EXAMPLES for text in rows[name][50:]]
    decisions = Snapshot.build(1, head, {}).decide(
        fast.encode([text for _, text in fresh]), top_k=1
    )
    right = [
        decision.candidates[0].task.name == name
        for decision, (name, _) in zip(decisions, fresh, strict=True)
    ]
    assert np.mean(right) >= 0.9


# What is kept on disk


def test_token_vectors_are_read_back_and_the_fingerprint_names_their_digest(
    fast: StaticMiniLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("router.backends.static_encoder.make_token_vectors", fail)
    again = StaticMiniLM(cache)
    assert again.fingerprint == fast.fingerprint
    assert again.encode(TEXTS[:5]).vectors.tobytes() == fast.encode(TEXTS[:5]).vectors.tobytes()
    assert fast.fingerprint.startswith("fast-all-MiniLM-L6-v2:")
    assert f":window-{WINDOW_TOKENS}:" in fast.fingerprint


@pytest.mark.parametrize("damage", ["a byte", "half", "empty", "other"])
def test_a_damaged_cache_is_made_again(fast: StaticMiniLM, tmp_path: Path, damage: str) -> None:
    first = StaticMiniLM(tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "a byte":
        flip_byte(file, len(whole) // 2)
    else:
        content = {"half": whole[: len(whole) // 2], "empty": b"", "other": b"\x08" + b"\0" * 20}
        file.write_bytes(content[damage])
    assert StaticMiniLM(tmp_path).fingerprint == first.fingerprint == fast.fingerprint
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(fast: StaticMiniLM, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert StaticMiniLM(tmp_path / "file" / "cache").fingerprint == fast.fingerprint


def test_it_is_loaded_by_its_name_for_the_cpu_alone(
    fast: StaticMiniLM, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    assert load_encoder("fast").fingerprint == fast.fingerprint
    with pytest.raises(InvalidInputError, match="encoder device"):
        load_encoder("fast", device="cuda")
