"""Prefixes: keys and values of every layer, alone and beside prompts in the same batch."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from router.backends.language_model import load_language_model
from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError
from router.interfaces import FloatArray, PromptedInput
from router.tasks import PromptMethod
from tests.unit.small_models import KINDS, save_small_model

TEXTS = (
    "",
    "a good film",
    "bad book",
    "the lazy dog runs away from the river and the quick brown fox jumps over it",
)
LABELS = ("positive", "urgent", "news sport")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchLanguageModel]:
    root = tmp_path_factory.mktemp("models")
    models = {
        kind: load_language_model(
            save_small_model(kind, root / kind), device="cpu", precision="float32", threads=1
        )
        for kind in KINDS
    }
    # Padding changes the order of sums, which a random T5 makes much of in float32.
    for model in models.values():
        model.network.double()
    return models


@pytest.fixture(params=KINDS)
def model(
    request: pytest.FixtureRequest, models: dict[str, TorchLanguageModel]
) -> TorchLanguageModel:
    return models[request.param]


def learned(model: TorchLanguageModel, method: PromptMethod, length: int, seed: int) -> FloatArray:
    """A prompt of that method that is unlike those of other seeds."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocabulary_size, (length,), generator=random).tolist()
    prompt = model.token_embeddings(ids)
    values = prompt if method == "prompt" else model.keys_and_values(prompt)
    noise = torch.randn(values.shape, generator=random) * values.std() / 2
    return (values + noise).numpy().astype(np.float32)


def row_of(
    model: TorchLanguageModel, text: str, prompt: tuple[PromptMethod, int, int] | None
) -> PromptedInput:
    if prompt is None:
        return PromptedInput(text, None)
    return PromptedInput(text, learned(model, *prompt), prompt[0])


prompts = st.none() | st.tuples(
    st.sampled_from(("prompt", "prefix")), st.integers(1, 9), st.integers(0, 3)
)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(chosen=st.lists(st.tuples(st.sampled_from(TEXTS), prompts), min_size=2, max_size=5))
def test_a_batch_of_prompts_and_prefixes_answers_like_its_rows_alone(
    model: TorchLanguageModel,
    chosen: list[tuple[str, tuple[PromptMethod, int, int] | None]],
) -> None:
    rows = [row_of(model, text, prompt) for text, prompt in chosen]
    together = model.score(rows, [LABELS] * len(rows))
    for row, scores in zip(rows, together, strict=True):
        [alone] = model.score([row], [LABELS])
        np.testing.assert_allclose(
            scores.log_probabilities, alone.log_probabilities, rtol=1e-5, atol=2e-4
        )
        assert scores.input_tokens == alone.input_tokens
    assert model.generate(rows, 6) == [model.generate([row], 6)[0] for row in rows]


def test_a_prefix_of_a_texts_keys_and_values_acts_as_the_text_before_it(
    models: dict[str, TorchLanguageModel],
) -> None:
    # Only on causal models: what an encoder computes for the text depends on what follows it.
    for kind in ("gpt2", "llama"):
        model = models[kind]
        prompt = model.text_embeddings("quick brown fox", 5)
        as_prompt = PromptedInput("a good film", prompt.numpy())
        as_prefix = PromptedInput("a good film", model.keys_and_values(prompt).numpy(), "prefix")
        one, two = model.score([as_prompt, as_prefix], [LABELS] * 2)
        np.testing.assert_allclose(one.log_probabilities, two.log_probabilities, atol=1e-4)
        first, second = model.generate([as_prompt, as_prefix], 8)
        assert first == second


def test_an_encoders_text_attends_to_its_prefix_and_to_nothing_else_of_it(
    models: dict[str, TorchLanguageModel],
) -> None:
    """The definition, by hand: keys and values of the prefix stand before those of the text."""
    model = models["bart"]
    shape = model.prefix_shape
    values = torch.tensor(learned(model, "prefix", 3, 1))
    [tokens] = model.tokenize_inputs(["a good film"], [3], [1])
    encoder = model.network.get_encoder()
    positions = encoder.embed_positions.weight[2 + 3 : 2 + 3 + len(tokens.ids)]
    state = encoder.layernorm_embedding(model.token_embeddings(tokens.ids) + positions)
    for number, layer in enumerate(encoder.layers):
        keys, vectors = values.view(3, shape.layers, 2, shape.size)[:, number].unbind(1)
        attention = layer.self_attn
        split = (-1, shape.heads, shape.head_size)
        query = attention.q_proj(state).view(split).transpose(0, 1)
        keys = torch.cat([keys, attention.k_proj(state)]).view(split).transpose(0, 1)
        vectors = torch.cat([vectors, attention.v_proj(state)]).view(split).transpose(0, 1)
        shares = (query @ keys.transpose(1, 2) / shape.head_size**0.5).softmax(-1)
        attended = (shares @ vectors).transpose(0, 1).flatten(1)
        state = layer.self_attn_layer_norm(state + attention.out_proj(attended))
        inner = layer.fc2(layer.activation_fn(layer.fc1(state)))
        state = layer.final_layer_norm(state + inner)
    states, mask = model._encode([Row(values, tokens.ids, "prefix")])  # type: ignore[attr-defined]
    torch.testing.assert_close(states[0, 3:], state, rtol=1e-4, atol=1e-4)
    assert mask[0].tolist() == [0, 0, 0, *[1] * len(tokens.ids)]


def test_only_prefixes_of_the_batch_get_a_gradient(model: TorchLanguageModel) -> None:
    one, two = (
        torch.tensor(learned(model, "prefix", length, length), requires_grad=True)
        for length in (3, 5)
    )
    absent = torch.tensor(learned(model, "prefix", 3, 7), requires_grad=True)
    [tokens] = model.tokenize_inputs(["a good film"], [5], [4])
    output = model.tokenize_output("positive")
    rows = [Row(one, tokens.ids, "prefix"), Row(two, tokens.ids, "prefix")]
    losses = [
        model.negative_log_likelihood(rows, [output, output])[0],
        -model.log_likelihoods(rows, [[output], [output]])[0][0],
    ]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for loss in losses:
        one.grad = two.grad = None
        torch.autograd.backward(loss)
        assert one.grad is not None
        # Every layer's keys and values count.
        assert (one.grad.view(3, model.prefix_shape.layers * 2, -1).abs().sum((0, 2)) > 0).all()
        assert two.grad is None or two.grad.abs().sum() == 0
        assert absent.grad is None
    assert all(weights.grad is None for weights in model.network.parameters())


def test_reading_a_prefix_leaves_the_model_as_it_was(model: TorchLanguageModel) -> None:
    before = model.score([PromptedInput("bad book", None)], [LABELS])[0].log_probabilities
    row = PromptedInput("bad book", learned(model, "prefix", 4, 1), "prefix")
    with_prefix = model.score([row], [LABELS])[0].log_probabilities
    after = model.score([PromptedInput("bad book", None)], [LABELS])[0].log_probabilities
    np.testing.assert_array_equal(before, after)
    assert np.abs(with_prefix - before).max() > 1e-3
    assert not any(module._forward_hooks for module in model.network.modules())


def test_a_prefix_of_another_width_is_incompatible(model: TorchLanguageModel) -> None:
    prompt = np.zeros((4, model.hidden_size), np.float32)
    with pytest.raises(IncompatibleModelError, match=f"{model.prefix_shape.width} numbers"):
        model.score([PromptedInput("fox", prompt, "prefix")], [["positive"]])


def test_a_prefix_counts_in_the_window(model: TorchLanguageModel) -> None:
    row = PromptedInput("fox", learned(model, "prefix", model.window, 1), "prefix")
    with pytest.raises(IncompatibleModelError, match="shorter prompt"):
        model.score([row], [["positive"]])


def test_a_model_with_sliding_windows_takes_prompts_only(
    models: dict[str, TorchLanguageModel], tmp_path: Path
) -> None:
    config = MistralConfig(
        vocab_size=models["llama"].vocabulary_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = save_small_model("llama", tmp_path / "sliding")
    MistralForCausalLM(config).save_pretrained(folder)
    sliding = load_language_model(folder, device="cpu", precision="float32")
    prompt = PromptedInput("fox", learned(sliding, "prompt", 3, 1))
    assert len(sliding.score([prompt], [LABELS])[0].log_probabilities) == len(LABELS)
    with pytest.raises(IncompatibleModelError, match="sliding windows"):
        _ = sliding.prefix_shape
    with pytest.raises(IncompatibleModelError, match="--method prompt"):
        sliding.keys_and_values(sliding.text_embeddings("fox"))


def test_an_encoder_without_separate_keys_and_values_takes_prompts_only(
    models: dict[str, TorchLanguageModel],
) -> None:
    model = models["bart"]
    odd = copy.deepcopy(model.network)
    for module in odd.get_encoder().modules():
        if hasattr(module, "k_proj"):
            module.kv = module.k_proj
            del module.k_proj
    other = type(model)(odd, model.tokenizer, name="odd", fingerprint="odd")
    with pytest.raises(IncompatibleModelError, match="no self-attention that could take one"):
        _ = other.prefix_shape


@pytest.mark.parametrize(("kind", "method"), list(product(KINDS, ("prompt", "prefix"))))
def test_the_width_of_a_prompt_follows_its_method(
    models: dict[str, TorchLanguageModel], kind: str, method: PromptMethod
) -> None:
    model = models[kind]
    width = model.hidden_size if method == "prompt" else 2 * 2 * (16 if kind == "llama" else 32)
    assert model.prompt_width(method) == width
    assert learned(model, method, 3, 1).shape == (3, width)
