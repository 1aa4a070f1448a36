"""What is said of a base model is so, and what does not work is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MistralConfig,
    MistralForCausalLM,
)
from typer.testing import CliRunner

from router.backends.language_model import load_language_model
from router.backends.rows import Row
from router.backends.seq2seq import Seq2SeqLanguageModel
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError
from tests.fakes import FakeLanguageModel
from tests.unit.small_models import KINDS, save_small_model
from trainer.base_facts import check, describe
from trainer.cli import app


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_small_model(kind, root / kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TorchLanguageModel:
    return load_language_model(folders[request.param], device="cpu", precision="float32", threads=1)


def promptyard(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_facts_are_those_of_the_model(model: TorchLanguageModel) -> None:
    facts = describe(model)
    assert facts.fingerprint == model.fingerprint
    assert facts.architecture == type(model.network).__name__
    assert facts.parameters == model.network.num_parameters()
    assert (facts.window, facts.hidden_size, facts.number_type) == (64, 32, "float32")
    assert facts.methods == {
        "prompt": 4 * 32,
        "prefix": 4 * model.prefix_shape.width,
    }
    assert ("seq2seq" in facts.reads) != model.shares_window


def test_everything_works_with_every_architecture(model: TorchLanguageModel) -> None:
    found = check(model)
    assert [each for each in found if not each.works] == []
    assert {each.what for each in found} >= {"reads a prefix", "tunes a prompt", "writes an answer"}


def test_a_method_that_is_not_allowed_is_named_and_not_tried(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_small_model("llama", tmp_path / "sliding")
    vocabulary = load_language_model(
        folders["llama"], device="cpu", precision="float32"
    ).vocabulary_size
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=48, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    result = promptyard("base", "check", folder, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "sliding windows" in found["methods"]["prefix"]
    assert not [each for each in found["checks"] if "prefix" in each["what"]]
    assert all(each["works"] for each in found["checks"])


def test_an_encoder_and_a_decoder_put_together_work_too(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_small_model("bart", tmp_path / "pair")
    part = BertConfig(
        vocab_size=load_language_model(folder, device="cpu").vocabulary_size, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(part, copy.deepcopy(part))
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    torch.manual_seed(7)
    EncoderDecoderModel(config).save_pretrained(folder)
    model = load_language_model(folder, device="cpu", precision="float32", threads=1)
    assert describe(model).methods["prefix"] == 4 * 2 * 2 * 32
    assert [each for each in check(model) if not each.works] == []


def test_a_model_that_computes_nothing_finite_is_caught(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_small_model("gpt2", tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    result = promptyard("base", "check", folder, "--device", "cpu")
    assert result.exit_code == 1
    assert "not finite" in result.stdout
    assert "NO" in result.stdout


def test_a_batch_that_changes_answers_is_caught(folders: dict[str, Path]) -> None:
    class Leaking(Seq2SeqLanguageModel):
        def _encode(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
            states, mask = super()._encode(rows)
            return states + len(rows), mask

    model = load_language_model(folders["bart"], device="cpu", precision="float32")
    leaking = Leaking(model.network, model.tokenizer, name="leaking", fingerprint="leaking")
    [failed] = [each for each in check(leaking) if not each.works]
    assert failed.what == "mixes them in a batch"
    assert "moves by" in failed.seen


def test_only_hugging_face_models_are_looked_at() -> None:
    for work in (describe, check):
        with pytest.raises(IncompatibleModelError, match="Hugging Face"):
            work(FakeLanguageModel())


def test_people_see_the_facts(folders: dict[str, Path]) -> None:
    result = promptyard("base", "show", folders["t5"], "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "T5ForConditionalGeneration" in result.stdout
    assert "method prefix   512 bytes a virtual token" in result.stdout
    facts = json.loads(promptyard("base", "show", folders["t5"], "--json").stdout)
    assert facts["fingerprint"] in result.stdout


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    result = promptyard("base", "show", tmp_path, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["reason"] == "INVALID_INPUT"
