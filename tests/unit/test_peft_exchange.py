"""Exchange with PEFT: what we write it loads, what it writes we load, and both answer alike."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

from router.backends.language_model import load_language_model
from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.catalog import CatalogReader
from router.errors import IncompatibleModelError, InvalidInputError, PromptyardError
from router.loading import read_prompt
from router.tasks import PromptMethod, PromptSummary, TaskKey, TaskRecord
from tests.catalogs import file_digests, new_record, new_workshop, texts_of, write_rows
from tests.fakes import FakeLanguageModel
from tests.unit.small_models import KINDS, save_small_model
from trainer.cli import app
from trainer.commands import RegisterTask
from trainer.manifest import read_manifest
from trainer.peft_exchange import OWN_FILE, PEFT_CONFIG, PEFT_WEIGHTS, read_peft, write_peft
from trainer.register import register
from trainer.tuning_settings import TuningSettings

# PEFT's own way with transformers, not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

TOKENS = 4
EXCHANGED: list[tuple[str, PromptMethod]] = [
    *((kind, "prompt") for kind in KINDS),
    ("gpt2", "prefix"),
    ("llama", "prefix"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_small_model(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, TorchLanguageModel]:
    return {
        kind: load_language_model(folder, device="cpu", precision="float32", threads=1)
        for kind, folder in folders.items()
    }


def values_of(model: TorchLanguageModel, method: PromptMethod) -> np.ndarray:
    prompt = model.text_embeddings("quick brown fox jumps", TOKENS)
    values = prompt if method == "prompt" else model.keys_and_values(prompt)
    return values.numpy() * 1.1


def record_of(model: TorchLanguageModel, method: PromptMethod) -> TaskRecord:
    shape = model.prefix_shape
    summary = PromptSummary(
        "f" * 64, TOKENS, model.hidden_size if method == "prompt" else shape.size,
        model.fingerprint, model.name, "accuracy", {"prompt": 0.5}, {}, 1, 1.0, method,
        0 if method == "prompt" else shape.layers,
    )  # fmt: skip
    return replace(FAKE_RECORD, prompt=summary)


FAKE_RECORD = TaskRecord(
    "weather",
    1,
    "2026-11-24T01:02:03+00:00",
    "",
    "",
    ("no", "yes"),
    None,
    "e",
    "a" * 64,  # type: ignore[arg-type]
)


def exported(model: TorchLanguageModel, method: PromptMethod, folder: Path) -> Path:
    write_peft(folder, record_of(model, method), values_of(model, method), model, model.name)
    return folder


def network_of(kind: str, folder: Path) -> Any:
    loader = AutoModelForSeq2SeqLM if kind in ("bart", "t5") else AutoModelForCausalLM
    return loader.from_pretrained(folder).eval()


def peft_log_likelihood(peft: Any, model: TorchLanguageModel, text: str, output: str) -> float:
    """-log p of an output, by PEFT's own forward pass."""
    [tokens] = model.tokenize_inputs([text], [TOKENS], [8])
    target = model.tokenize_output(output)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of its own ways with position ids
        if model.shares_window:
            ids = torch.tensor([[*tokens.ids, *target[:-1]]])
            logits = peft(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            logits = logits[0, -len(target) :]
        else:
            ids = torch.tensor([tokens.ids])
            start = model.network.config.decoder_start_token_id
            fed = torch.tensor([[start, *target[:-1]]])
            mask = torch.ones_like(ids)
            logits = peft(input_ids=ids, attention_mask=mask, decoder_input_ids=fed).logits[0]
    return -float(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())


def our_log_likelihood(
    model: TorchLanguageModel, values: np.ndarray, method: PromptMethod, text: str, output: str
) -> float:
    [tokens] = model.tokenize_inputs([text], [TOKENS], [8])
    row = Row(torch.tensor(values), tokens.ids, method)
    with torch.no_grad():
        return float(model.negative_log_likelihood([row], [model.tokenize_output(output)])[0])


@pytest.mark.parametrize(("kind", "method"), EXCHANGED)
def test_peft_loads_what_is_exported_and_gives_the_same_logits(
    folders: dict[str, Path],
    models: dict[str, TorchLanguageModel],
    tmp_path: Path,
    kind: str,
    method: PromptMethod,
) -> None:
    model = models[kind]
    folder = exported(model, method, tmp_path / "peft")
    peft = PeftModel.from_pretrained(network_of(kind, folders[kind]), folder).eval()
    for text, output in (("a good film", "positive"), ("the river", "news sport")):
        theirs = peft_log_likelihood(peft, model, text, output)
        ours = our_log_likelihood(model, values_of(model, method), method, text, output)
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize(("kind", "method"), EXCHANGED)
def test_what_is_exported_comes_back_bit_for_bit(
    models: dict[str, TorchLanguageModel], tmp_path: Path, kind: str, method: PromptMethod
) -> None:
    found = read_peft(exported(models[kind], method, tmp_path / "peft"), models[kind])
    assert found.method == method
    assert found.values.tobytes() == values_of(models[kind], method).tobytes()


@pytest.mark.parametrize(("kind", "method"), EXCHANGED)
def test_what_peft_saved_is_imported_and_gives_the_same_logits(
    folders: dict[str, Path],
    models: dict[str, TorchLanguageModel],
    tmp_path: Path,
    kind: str,
    method: PromptMethod,
) -> None:
    model = models[kind]
    task_type = "SEQ_2_SEQ_LM" if kind in ("bart", "t5") else "CAUSAL_LM"
    make = PromptTuningConfig if method == "prompt" else PrefixTuningConfig
    torch.manual_seed(5)
    network = network_of(kind, folders[kind])
    peft = get_peft_model(network, make(task_type=task_type, num_virtual_tokens=TOKENS)).eval()
    peft.save_pretrained(tmp_path / "peft")
    found = read_peft(tmp_path / "peft", model)
    assert found.values.shape == (TOKENS, model.prompt_width(method))
    theirs = peft_log_likelihood(peft, model, "a good film", "positive")
    ours = our_log_likelihood(model, found.values, method, "a good film", "positive")
    assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-4)


def test_peft_prompts_of_another_kind_are_refused(
    folders: dict[str, Path], models: dict[str, TorchLanguageModel], tmp_path: Path
) -> None:
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=8
    )
    get_peft_model(network_of("gpt2", folders["gpt2"]), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(InvalidInputError, match="peft_type: P_TUNING; give one of PROMPT_TUNING"):
        read_peft(tmp_path / "peft", models["gpt2"])


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / OWN_FILE).unlink()
        path = folder / PEFT_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_own(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / OWN_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_tensor(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / PEFT_WEIGHTS)
        save_file({k: change(v) for k, v in tensors.items()}, folder / PEFT_WEIGHTS)

    return edit


def pickled(folder: Path) -> None:
    (folder / PEFT_WEIGHTS).rename(folder / "adapter_model.bin")


def with_another_tensor(folder: Path) -> None:
    tensors = load_file(folder / PEFT_WEIGHTS)
    save_file({**tensors, "lm_head.weight": np.zeros(3, np.float32)}, folder / PEFT_WEIGHTS)


def not_finite(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[1, 2] = np.nan
    return values


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (edit_own(base_model="0" * 64), "base_model: 0000"),
        (edit_config(base_model_name_or_path=None), "name the base model"),
        (edit_config(base_model_name_or_path="org/other"), "the base model is gpt2"),
        (edit_config(peft_type="LORA"), "peft_type: LORA"),
        (edit_config(peft_type=["PROMPT_TUNING"]), "peft_type"),
        (edit_config(peft_type="PREFIX_TUNING"), "takes vectors of 128 numbers"),
        (edit_config(num_virtual_tokens=5), "for 5 virtual tokens"),
        (edit_config(num_virtual_tokens="4"), "for 4 virtual tokens"),
        (edit_tensor(lambda values: values[:, :-1]), "takes vectors of 32 numbers"),
        (edit_tensor(lambda values: values.ravel()), "takes vectors of 32 numbers"),
        (edit_tensor(lambda values: values.astype(np.float64)), "F64; save it as one of F32, F16"),
        (edit_tensor(lambda values: values.astype(np.int32)), "I32; save it as one of"),
        (edit_tensor(not_finite), "not finite"),
        (with_another_tensor, "lm_head.weight, prompt_embeddings; give a file with"),
        (pickled, "a pickle, which can run code"),
        (lambda folder: (folder / PEFT_WEIGHTS).write_bytes(b"\x80\x04x"), "give a safetensors"),
        (lambda folder: (folder / PEFT_WEIGHTS).unlink(), "missing"),
        (lambda folder: (folder / PEFT_CONFIG).unlink(), "give a folder that PEFT"),
        (lambda folder: (folder / PEFT_CONFIG).write_text("[" * 99999), "give a folder that PEFT"),
        (lambda folder: (folder / PEFT_CONFIG).write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / PEFT_CONFIG).write_text(" " * 2**20 + "{}"), "larger than 1 MiB"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_with_the_field(
    models: dict[str, TorchLanguageModel],
    tmp_path: Path,
    edit: Callable[[Path], None],
    problem: str,
) -> None:
    folder = exported(models["gpt2"], "prompt", tmp_path / "peft")
    edit(folder)
    with pytest.raises(PromptyardError, match=problem) as caught:
        read_peft(folder, models["gpt2"])
    assert isinstance(caught.value, InvalidInputError | IncompatibleModelError)
    assert str(folder) in caught.value.field


def test_half_precision_is_taken_without_loss(
    models: dict[str, TorchLanguageModel], tmp_path: Path
) -> None:
    folder = exported(models["gpt2"], "prompt", tmp_path / "peft")
    edit_tensor(lambda values: values.astype(np.float16))(folder)
    found = read_peft(folder, models["gpt2"]).values
    assert found.dtype == np.float32
    assert np.array_equal(found, values_of(models["gpt2"], "prompt").astype(np.float16))


def test_a_prefix_of_an_encoder_decoder_is_not_exchanged(
    models: dict[str, TorchLanguageModel], tmp_path: Path
) -> None:
    with pytest.raises(IncompatibleModelError, match="exchange prompts of the method prompt"):
        exported(models["bart"], "prefix", tmp_path / "peft")
    folder = exported(models["gpt2"], "prefix", tmp_path / "causal")
    edit_config(base_model_name_or_path="bart")(folder)
    with pytest.raises(IncompatibleModelError, match="exchange prompts of the method prompt"):
        read_peft(folder, models["bart"])


def test_a_prompt_of_another_base_model_and_a_folder_in_use_are_refused(
    models: dict[str, TorchLanguageModel], tmp_path: Path
) -> None:
    record, values = record_of(models["gpt2"], "prompt"), values_of(models["gpt2"], "prompt")
    with pytest.raises(IncompatibleModelError, match="give gpt2 that the prompt belongs to"):
        write_peft(tmp_path / "peft", record, values, models["llama"], "llama")
    assert not (tmp_path / "peft").exists()
    assert record.prompt is not None
    fake = replace(record, prompt=replace(record.prompt, base_model=FakeLanguageModel.fingerprint))
    with pytest.raises(IncompatibleModelError, match="Hugging Face"):
        write_peft(tmp_path / "peft", fake, values, FakeLanguageModel(), "fake")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(InvalidInputError, match="an empty one"):
        write_peft(tmp_path / "used", record, values, models["gpt2"], "gpt2")
    with pytest.raises(InvalidInputError, match="not a file"):
        write_peft(tmp_path / "used" / "file", record, values, models["gpt2"], "gpt2")


# ---- through the catalog


def promptyard(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_an_exported_prompt_is_registered_elsewhere_with_the_same_bytes(
    folders: dict[str, Path], models: dict[str, TorchLanguageModel], tmp_path: Path
) -> None:
    model = models["bart"]
    values = values_of(model, "prompt")
    source = exported(model, "prompt", tmp_path / "peft")
    data = write_rows(tmp_path / "rows.jsonl", texts_of("weather", 20))
    with new_workshop(tmp_path / "home") as workshop:
        request = RegisterTask("weather", data, prompt_from=source, force="a test")
        [record] = register(workshop, [request], model, TuningSettings()).records
        assert record.prompt is not None
        assert read_prompt(workshop.artifacts, record).tobytes() == values.tobytes()
        assert set(record.prompt.scores) == {"prompt", "majority", "no_prompt", "instruction"}
        assert (record.prompt.steps, record.prompt.method) == (0, "prompt")
        assert record.prompt.settings["initialisation"] == "imported from a PEFT folder"

    again = tmp_path / "again"
    options = ("--home", tmp_path / "home", "--base-model", folders["bart"])
    result = promptyard("export", "weather", again, "--format", "peft", *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["base_model"] == "bart"
    first, second = file_digests(source), file_digests(again)
    assert first[PEFT_WEIGHTS] == second[PEFT_WEIGHTS]
    assert first[PEFT_CONFIG] == second[PEFT_CONFIG]


def test_a_folder_that_does_not_fit_fails_its_own_task_only(
    models: dict[str, TorchLanguageModel], tmp_path: Path
) -> None:
    good = exported(models["gpt2"], "prefix", tmp_path / "good")
    bad = exported(models["gpt2"], "prefix", tmp_path / "bad")
    edit_tensor(not_finite)(bad)
    for name in ("weather", "sport"):
        write_rows(tmp_path / f"{name}.jsonl", texts_of(name, 20))
    (tmp_path / "tasks.yaml").write_text(
        "tasks:\n"
        "- {name: weather, data: weather.jsonl, prompt_from: bad, force: a test}\n"
        "- {name: sport, data: sport.jsonl, prompt_from: good, force: a test}\n"
    )
    requests = read_manifest(tmp_path / "tasks.yaml")
    assert [request.prompt_from for request in requests] == [bad, good]
    with new_workshop(tmp_path / "home") as workshop:
        result = register(workshop, requests, models["gpt2"], TuningSettings())
        assert [record.name for record in result.records] == ["sport"]
        assert "not finite" in str(result.failures["weather"])
    with CatalogReader(tmp_path / "home") as catalog:
        prompt = catalog.record(TaskKey("sport", 1)).prompt
    assert prompt is not None
    assert (prompt.method, prompt.layers) == ("prefix", 2)


def test_exporting_with_the_wrong_base_model_says_which_is_right(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        record = new_record(workshop, "weather", with_prompt=True)
        workshop.publish("register", records=(record,), live={"weather": 1})
    options = ("--home", tmp_path / "home", "--base-model", folders["bart"], "--json")
    result = promptyard("export", "weather", tmp_path / "peft", *options)
    assert result.exit_code == 1
    assert "give small-base" in json.loads(result.stdout)["error"]["remedy"]
