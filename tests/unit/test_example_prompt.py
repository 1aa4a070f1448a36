"""Prompts made from examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from router.backends.language_model import load_language_model
from router.backends.torch_model import TorchLanguageModel
from tests.unit.small_models import save_small_model
from trainer.example_prompt import (
    MARKER,
    Place,
    example_layout,
    example_prompt,
    example_vectors,
    mean_states,
)
from trainer.initialisation import initial_prompt
from trainer.tuning_settings import TuningJob

ROWS = [
    ("a good film", "positive"),
    ("a good book with a good end", "positive"),
    ("a bad film", "negative"),
    ("a bad book", "negative"),
]
LABELS = ("negative", "positive")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchLanguageModel:
    folder = save_small_model("bart", tmp_path_factory.mktemp("bart"))
    return load_language_model(str(folder), device="cpu", precision="float32")


def test_the_instruction_fills_what_labels_and_their_means_leave() -> None:
    layout = example_layout([[10, 11, 12], [20]], [1, 2, 3], 9)
    assert layout is not None
    assert [place.token for place in layout] == [1, 2, 3, 1, 10, 11, MARKER, 20, MARKER]
    assert [place.label for place in layout] == [None] * 6 + [0, None, 1]


def test_labels_are_cut_to_one_token_where_two_do_not_fit() -> None:
    layout = example_layout([[10, 11], [20, 21]], [], 5)
    assert layout == [Place(10), Place(MARKER, 0), Place(20), Place(MARKER, 1)]


def test_labels_that_do_not_fit_make_no_prompt() -> None:
    assert example_layout([[10], [20], [30]], [1], 5) is None


def test_example_vectors_are_as_long_as_token_embeddings_and_oppose_each_other() -> None:
    embedding = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    means = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    vectors = example_vectors(means, torch.tensor([True, True]), embedding)
    length = embedding.norm(dim=1).mean()
    torch.testing.assert_close(vectors.norm(dim=1), length.expand(2))
    torch.testing.assert_close(vectors[0], -vectors[1])


def test_a_label_without_examples_stands_for_nothing_and_moves_no_other() -> None:
    embedding = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    means = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    vectors = example_vectors(means, torch.tensor([True, True, False]), embedding)
    assert not vectors[2].any()
    torch.testing.assert_close(
        vectors[:2], example_vectors(means[:2], torch.tensor([True, True]), embedding)
    )


def test_mean_states_do_not_look_at_padding() -> None:
    states = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    changed = states.clone()
    changed[0, 2:] = 100.0
    torch.testing.assert_close(mean_states(states, mask), mean_states(changed, mask))


def test_the_states_of_a_text_do_not_depend_on_its_neighbours(model: TorchLanguageModel) -> None:
    texts = [text for text, _ in ROWS]
    together = model.text_states(texts)
    assert together is not None
    for text, state in zip(texts, together, strict=True):
        alone = model.text_states([text])
        assert alone is not None
        torch.testing.assert_close(alone[0], state, rtol=1e-4, atol=1e-5)


def test_a_prompt_from_examples_depends_on_the_examples_alone_at_the_means(
    model: TorchLanguageModel,
) -> None:
    prompt = example_prompt(model, 20, "good or bad", LABELS, ROWS)
    swapped = [(text, LABELS[1 - LABELS.index(label)]) for text, label in ROWS]
    other = example_prompt(model, 20, "good or bad", LABELS, swapped)
    assert prompt is not None
    assert other is not None
    instruction, *labels = model.plain_ids(["good or bad", *LABELS])
    layout = example_layout(labels, instruction, 20)
    assert layout is not None
    assert len(prompt) == len(layout) <= 20
    differs = (prompt != other).any(dim=1).tolist()
    assert differs == [place.label is not None for place in layout]


def test_an_architecture_without_an_encoder_starts_from_text_instead(tmp_path: Path) -> None:
    model = load_language_model(
        str(save_small_model("gpt2", tmp_path)), device="cpu", precision="float32"
    )
    assert example_prompt(model, 8, "good or bad", LABELS, ROWS) is None
    about = TuningJob("x", "good or bad", LABELS, ROWS, ROWS)
    torch.testing.assert_close(
        initial_prompt(model, "examples", about, 8, seed=0),
        initial_prompt(model, "text", about, 8, seed=0),
    )


def test_free_text_starts_from_text_instead(model: TorchLanguageModel) -> None:
    about = TuningJob("x", "which city", None, ROWS, ROWS)
    torch.testing.assert_close(
        initial_prompt(model, "examples", about, 8, seed=0),
        initial_prompt(model, "text", about, 8, seed=0),
    )
