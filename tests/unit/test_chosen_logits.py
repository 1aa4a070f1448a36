"""Logits at some positions, of real networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from router.backends.chosen_logits import chosen, logits_only_at
from router.backends.language_model import load_language_model
from tests.unit.small_models import save_small_model

POSITIONS = torch.tensor([0, 2, 3, 7])
SHAPE = (2, 4)


@pytest.fixture(params=["bart", "t5", "gpt2", "llama"])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    folder = save_small_model(request.param, tmp_path)
    return load_language_model(folder, device="cpu", precision="float32").network


def logits_of(network: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(8).reshape(SHAPE) + 3
    given = {"decoder_input_ids": ids} if network.config.is_encoder_decoder else {}
    with torch.no_grad():
        return network(input_ids=ids, **given).logits


def test_they_are_those_of_the_whole_batch(network: PreTrainedModel) -> None:
    everywhere = logits_of(network)
    with logits_only_at(network, POSITIONS):
        found = logits_of(network)
    assert found.shape[:2] == (1, len(POSITIONS))
    expected = everywhere.flatten(0, 1)[POSITIONS]
    torch.testing.assert_close(chosen(found, POSITIONS, SHAPE), expected)
    # A network that makes them in a way of its own gives all of them.
    torch.testing.assert_close(chosen(everywhere, POSITIONS, SHAPE), expected)
    torch.testing.assert_close(logits_of(network), everywhere)


def test_a_network_without_a_module_for_them_gives_all(
    network: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "get_output_embeddings", lambda: None)
    everywhere = logits_of(network)
    with logits_only_at(network, POSITIONS):
        torch.testing.assert_close(logits_of(network), everywhere)


def test_one_row_of_which_all_is_wanted_stays_as_it_is(network: PreTrainedModel) -> None:
    logits, everything = logits_of(network)[:1], torch.arange(4)
    torch.testing.assert_close(chosen(logits, everything, (1, 4)), logits[0])
