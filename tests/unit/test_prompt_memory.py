"""Prompts that are read once and shared by the rows of their task."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from router.backends.language_model import load_language_model
from router.backends.prompt_memory import PromptMemory, ReadPrompt
from router.backends.torch_model import TorchLanguageModel
from router.interfaces import FloatArray, PromptedInput
from tests.unit.small_models import KINDS, save_small_model

TEXTS = ("", "bad book", "the lazy dog runs away from the river and the quick brown fox jumps")
LABELS = ["positive", "urgent", "news sport"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchLanguageModel]:
    root: Path = tmp_path_factory.mktemp("models")
    return {
        kind: load_language_model(
            save_small_model(kind, root / kind), device="cpu", precision="float32", threads=1
        )
        for kind in KINDS
    }


@pytest.fixture(params=KINDS)
def model(
    request: pytest.FixtureRequest, models: dict[str, TorchLanguageModel]
) -> TorchLanguageModel:
    return models[request.param]


def served(values: FloatArray) -> FloatArray:
    """A copy as a snapshot has it."""
    values = values.copy()
    values.setflags(write=False)
    return values


def prompt_of(model: TorchLanguageModel, length: int) -> FloatArray:
    return model.token_embeddings(range(length, 2 * length)).numpy()


def test_a_shared_prompt_answers_and_scores_as_one_that_is_read_with_each_text(
    model: TorchLanguageModel,
) -> None:
    plain = [prompt_of(model, length) for length in (3, 7)]
    shared = [served(values) for values in plain]
    inputs = [
        [PromptedInput(text, values) for values in prompts for text in TEXTS]
        for prompts in (plain, shared)
    ]
    assert model.generate(inputs[1], 8) == model.generate(inputs[0], 8)
    scores = [model.score(rows, [LABELS] * len(rows)) for rows in inputs]
    for one, other in zip(*scores, strict=True):
        np.testing.assert_allclose(
            one.log_probabilities, other.log_probabilities, rtol=1e-5, atol=2e-4
        )


def test_a_causal_model_reads_the_prompt_of_a_task_once(
    models: dict[str, TorchLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, reads in (("gpt2", 1), ("llama", 1), ("bart", 0), ("t5", 0)):
        model = models[kind]
        calls: list[int] = []
        compute = model.keys_and_values

        def counted(prompt, calls=calls, compute=compute):  # type: ignore[no-untyped-def]
            calls.append(len(prompt))
            return compute(prompt)

        monkeypatch.setattr(model, "keys_and_values", counted)
        values = served(prompt_of(model, 5))
        batch = model.start_batch()
        for text in TEXTS:
            assert batch.join([batch.prepare(PromptedInput(text, values), 4)])
            batch.step()
        model.score([PromptedInput("fox", values)], [LABELS])
        assert calls == [5] * reads, kind


def test_a_prompt_that_may_change_is_read_every_time(
    models: dict[str, TorchLanguageModel],
) -> None:
    model = models["llama"]
    values = prompt_of(model, 5).copy()
    [before] = model.score([PromptedInput("fox", values)], [LABELS])
    values += prompt_of(model, 5)[::-1]
    [after] = model.score([PromptedInput("fox", values)], [LABELS])
    assert not np.allclose(before.log_probabilities, after.log_probabilities)
    [fresh] = model.score([PromptedInput("fox", values.copy())], [LABELS])
    np.testing.assert_array_equal(after.log_probabilities, fresh.log_probabilities)


def test_what_was_computed_goes_with_the_task(model: TorchLanguageModel) -> None:
    gc.collect()
    before = len(model._prompts)
    values = served(prompt_of(model, 5))
    model.score([PromptedInput("fox", values)], [LABELS])
    assert len(model._prompts) == before + 1
    del values
    gc.collect()
    assert len(model._prompts) == before


def reading(calls: list[str], name: str, numbers: int) -> Callable[[], ReadPrompt]:
    def read() -> ReadPrompt:
        calls.append(name)
        return ReadPrompt(torch.zeros(1, numbers), "prompt")

    return read


def test_the_memory_is_bounded_in_bytes_and_keeps_what_was_used_last() -> None:
    memory = PromptMemory(max_bytes=400)  # 100 numbers
    arrays = {name: served(np.zeros((1, 1), np.float32)) for name in "abcd"}
    calls: list[str] = []

    def get(name: str, numbers: int = 40) -> None:
        memory.get(arrays[name], reading(calls, name, numbers))
        assert memory.size <= 400

    for name in "abac":  # c takes the place of b
        get(name)
    assert calls == ["a", "b", "c"]
    get("a")
    get("c")
    assert calls == ["a", "b", "c"]
    get("b")
    assert calls == ["a", "b", "c", "b"]
    get("d", 101)  # larger than all there is: used, and not kept
    get("c")
    get("b")
    get("d", 101)
    assert calls == ["a", "b", "c", "b", "d", "d"]
    assert len(memory) == 2
