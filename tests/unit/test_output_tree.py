"""Candidate outputs as a tree: what is read once, and that scores are those of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.bart import modeling_bart

from router.backends import output_tree
from router.backends.language_model import load_language_model
from router.backends.output_tree import tree_batches, tree_of
from router.backends.rows import Row
from router.backends.seq2seq import Seq2SeqLanguageModel
from router.backends.torch_model import TorchLanguageModel
from router.tasks import PromptMethod
from tests.unit.small_models import save_small_model

END = 9
outputs_of_tokens = st.lists(st.integers(1, 3), max_size=5).map(lambda ids: (*ids, END))


def test_what_outputs_begin_with_is_read_once() -> None:
    tree = tree_of(((1, 2, END), (1, 3, END), (1, 2, END)))
    assert tree.tokens.tolist() == [0, 1, 2, 3]
    assert tree.depths.tolist() == [0, 1, 2, 2]
    assert tree.ancestors.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, False, True],
    ]
    assert tree.nodes.tolist() == [0, 1, 2, 0, 1, 3, 0, 1, 2]


def test_trees_are_kept_but_for_those_without_a_bound() -> None:
    labels = ((1, 2, END), (3, END))
    assert tree_of(labels) is tree_of(labels)
    long = ((*[1] * 300, END),)
    assert tree_of(long) is not tree_of(long)
    assert tree_of(long).depths.tolist() == [*range(301)]


@given(
    candidates=st.lists(st.lists(outputs_of_tokens, max_size=6), min_size=1, max_size=5).filter(
        any
    ),
    max_nodes=st.integers(1, 30),
    max_padding=st.integers(0, 10),
)
def test_every_token_of_every_output_comes_after_what_is_before_it(
    candidates: list[list[tuple[int, ...]]], max_nodes: int, max_padding: int
) -> None:
    outputs = [ids for row in candidates for ids in row]
    owners = [row for row, texts in enumerate(candidates) for _ in texts]
    width = max(map(len, outputs))
    found = {}
    for batch in tree_batches(candidates, 7, max_nodes, max_padding):
        size = batch.ids.shape[1]
        for node, target, place in zip(
            batch.nodes.tolist(), batch.targets.tolist(), batch.places.tolist(), strict=True
        ):
            tree, column = divmod(int(batch.real[node]), size)
            output, step = divmod(place, width)
            seen = batch.ids[tree][batch.ancestors[tree, column]]
            order = batch.depths[tree][batch.ancestors[tree, column]]
            prefix = (7, *outputs[output][:step])
            assert sorted(zip(order.tolist(), seen.tolist(), strict=True)) == [*enumerate(prefix)]
            assert batch.rows[tree] == owners[output]
            found[output, step] = target
    assert found == {(i, k): token for i, ids in enumerate(outputs) for k, token in enumerate(ids)}


def test_batches_are_within_their_bounds() -> None:
    candidates = [[(1, 2, END)], [(1, END), (2, 3, 1, END)], [(END,)], [(3, END)] * 4] * 5
    padding = 0
    for batch in tree_batches(candidates, 0, 12, 3):
        assert batch.ids.numel() <= 12
        assert batch.ids.numel() - len(batch.real) <= 3
        padding += batch.ids.numel() - len(batch.real)
        # Padding sees itself alone, so that no row of the mask is empty.
        assert batch.ancestors.diagonal(dim1=1, dim2=2).all()
    assert padding > 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seq2SeqLanguageModel]:
    root = tmp_path_factory.mktemp("models")
    models = {}
    for kind in ("bart", "t5"):
        folder = save_small_model(kind, root / kind)
        model = load_language_model(folder, device="cpu", precision="float32", threads=1)
        assert isinstance(model, Seq2SeqLanguageModel)
        model.network.double()  # random weights make much of the order of sums
        models[kind] = model
    return models


def rows_of(model: Seq2SeqLanguageModel, kinds: Sequence[PromptMethod | None]) -> list[Row]:
    texts = ["a good film with a bad end", "bad", "the river 🙂", "the quick brown fox", ""]
    random = torch.Generator().manual_seed(1)
    rows = []
    for kind, text in zip(kinds, texts, strict=False):
        [tokens] = model.tokenize_inputs([text], [3], [8])
        prompt = None
        if kind is not None:
            prompt = torch.randn(3, model.prompt_width(kind), generator=random).requires_grad_()
        rows.append(Row(prompt, tokens.ids, kind or "prompt"))
    return rows


CANDIDATES = [
    ["positive", "negative", "neutral", "a good film"],
    ["a good film", "a good film with a bad end", "a bad book", "a good film"],
    [],
    ["sport"],
    [f"news {word}" for word in ("sport", "café", "urgent", "routine", "fox", "dog", "river")],
]


@pytest.mark.parametrize(
    "kinds",
    [
        ("prompt", None, "prompt", "prompt", None),
        ("prefix", "prompt", None, "prefix", "prefix"),
        ("prefix", "prefix", "prefix", "prefix", "prefix"),
    ],
)
@pytest.mark.parametrize("most_nodes", [256, 6])
def test_scores_and_gradients_are_those_of_outputs_read_one_by_one(
    models: dict[str, Seq2SeqLanguageModel],
    kinds: tuple[PromptMethod | None, ...],
    most_nodes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models["bart"]
    assert model.reads_trees
    monkeypatch.setattr(output_tree, "_MAX_NODES", most_nodes)
    rows = rows_of(model, kinds)
    candidates = [[model.tokenize_output(text) for text in texts] for texts in CANDIDATES]
    prompts = [row.prompt for row in rows if row.prompt is not None]

    def losses_and_gradients(losses: torch.Tensor) -> list[torch.Tensor]:
        return [
            losses,
            *torch.autograd.grad(losses.square().sum(), prompts, materialize_grads=True),
        ]

    found = losses_and_gradients(model.output_token_losses(rows, candidates))
    expected = losses_and_gradients(TorchLanguageModel.output_token_losses(model, rows, candidates))
    assert found[0].shape == (16, max(len(ids) for row in candidates for ids in row))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rows_of_one_length_need_no_mask(models: dict[str, Seq2SeqLanguageModel]) -> None:
    model = models["bart"]
    rows = rows_of(model, ("prompt",)) * 2
    candidates = [[model.tokenize_output(text) for text in CANDIDATES[0]]] * 2
    with torch.no_grad():
        torch.testing.assert_close(
            model.output_token_losses(rows, candidates),
            TorchLanguageModel.output_token_losses(model, rows, candidates),
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_decoder_that_counts_positions_by_itself_is_found_out(
    models: dict[str, Seq2SeqLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["t5"]
    assert not model.reads_trees
    # Nor if it said that it can be told.
    monkeypatch.setattr("router.backends.seq2seq.takes_positions", lambda _: True)
    monkeypatch.delitem(model.__dict__, "reads_trees")
    assert not model.reads_trees


def test_a_decoder_that_sees_whatever_stands_before_is_found_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_small_model("bart", tmp_path)
    model = load_language_model(folder, device="cpu", precision="float32", threads=1)
    assert isinstance(model, Seq2SeqLanguageModel)
    create = modeling_bart.create_causal_mask

    def causal(**given: Any) -> Any:
        return create(**{**given, "attention_mask": None})

    monkeypatch.setattr(modeling_bart, "create_causal_mask", causal)
    assert not model.reads_trees
