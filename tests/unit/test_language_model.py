"""Base models: every architecture gives the same answers batched as one row at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from router.backends import language_model
from router.backends.language_model import load_language_model
from router.backends.rows import Row, batches
from router.backends.text_pieces import Detokenizer
from router.backends.torch_model import _MAX_BATCH_POSITIONS, _MAX_LOGITS, TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError
from router.interfaces import FloatArray, PromptedInput, Scores
from tests.unit.small_models import KINDS, save_small_model


def assert_close(found: FloatArray, expected: FloatArray | list[float]) -> None:
    """Float32 sums in another order: how far a log-probability may move with its batch."""
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5, atol=1e-4)


def assert_scored_alike(found: Scores, expected: Scores) -> None:
    """The same tokens, and log-probabilities up to rounding."""
    assert_close(found.log_probabilities, expected.log_probabilities)
    assert (found.input_tokens, found.output_tokens) == (
        expected.input_tokens,
        expected.output_tokens,
    )


TEXTS = [
    "a good film",
    "the lazy dog runs away from the river and the quick brown fox jumps over it",
    "bad book",
    "isn't it urgent? the river",
]
LABELS = [["positive", "negative"], ["urgent", "routine", "news sport"], ["sport"], ["positive"]]
EMBEDDED_BASE = Path(__file__).parents[2] / "router" / "models" / "base"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_small_model(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TorchLanguageModel:
    return load_language_model(folders[request.param], device="cpu", precision="float32", threads=1)


def prompt(model: TorchLanguageModel, length: int, seed: int) -> FloatArray:
    random = np.random.default_rng(seed)
    scale = float(model.token_embeddings(range(50)).std())
    return random.normal(0, scale, (length, model.hidden_size)).astype(np.float32)


def mixed_batch(model: TorchLanguageModel) -> list[PromptedInput]:
    prompts = [prompt(model, 5, 1), None, prompt(model, 9, 2), prompt(model, 5, 1)]
    return [PromptedInput(text, values) for text, values in zip(TEXTS, prompts, strict=True)]


def naive_log_likelihood(model: TorchLanguageModel, row: PromptedInput, output: str) -> float:
    """One row, no padding, no cache, the whole output fed at once: the definition."""
    reserved = len(model.tokenize_output(output))
    length = 0 if row.prompt is None else len(row.prompt)
    ids = list(model.tokenize_inputs([row.text], [length], [reserved])[0].ids)
    embeddings = model.network.get_input_embeddings()(torch.tensor([ids]))
    if row.prompt is not None:
        embeddings = torch.cat([torch.tensor(row.prompt)[None], embeddings], dim=1)
    target = torch.tensor(model.tokenize_output(output))
    with torch.no_grad():
        if not model.shares_window:
            start = model.network.config.decoder_start_token_id
            fed = torch.tensor([[start, *target[:-1].tolist()]])
            logits = model.network(inputs_embeds=embeddings, decoder_input_ids=fed).logits[0]
        else:
            answer = model.network.get_input_embeddings()(target[None, :-1])
            whole = torch.cat([embeddings, answer], dim=1)
            logits = model.network(inputs_embeds=whole).logits[0, -len(target) :]
    return float(logits.log_softmax(-1).gather(1, target[:, None]).sum())


def test_scores_equal_the_one_row_at_a_time_definition(model: TorchLanguageModel) -> None:
    rows = mixed_batch(model)
    for row, labels, scores in zip(rows, LABELS, model.score(rows, LABELS), strict=True):
        expected = [naive_log_likelihood(model, row, label) for label in labels]
        assert_close(scores.log_probabilities, expected)
        assert scores.best == int(np.argmax(expected))


def test_scores_count_tokens_as_answers_do(model: TorchLanguageModel) -> None:
    rows = mixed_batch(model)
    for row, labels, scores in zip(rows, LABELS, model.score(rows, LABELS), strict=True):
        outputs = [model.tokenize_output(label) for label in labels]
        length = 0 if row.prompt is None else len(row.prompt)
        longest = max(len(ids) for ids in outputs)
        [tokens] = model.tokenize_inputs([row.text], [length], [longest])
        assert scores.input_tokens == len(tokens.ids)
        assert scores.truncated == tokens.truncated
        # The end token does not count, as in `generate`.
        assert all(ids[-1] in model.end_ids for ids in outputs)
        assert list(scores.output_tokens) == [len(ids) - 1 for ids in outputs]


def test_a_long_input_of_a_label_answer_is_cut_and_reported(model: TorchLanguageModel) -> None:
    long = "the quick brown fox " * 50
    inputs = [PromptedInput(long, prompt(model, 5, 1)), PromptedInput("fox", None)]
    cut, whole = model.score(inputs, [["sport"], ["sport"]])
    assert (cut.truncated, whole.truncated) == (True, False)
    room_of_output = len(model.tokenize_output("sport")) if model.shares_window else 0
    assert cut.input_tokens == model.window - 5 - room_of_output


def test_a_mixed_batch_scores_like_its_rows_alone(model: TorchLanguageModel) -> None:
    rows = mixed_batch(model)
    together = model.score(rows, LABELS)
    for row, labels, scores in zip(rows, LABELS, together, strict=True):
        assert_scored_alike(model.score([row], [labels])[0], scores)


def test_scoring_in_chunks_changes_nothing(
    model: TorchLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed_batch(model)
    whole = model.score(rows, LABELS)
    monkeypatch.setitem(_MAX_LOGITS, "cpu", 1)
    monkeypatch.setitem(_MAX_BATCH_POSITIONS, "cpu", 30)
    for expected, found in zip(whole, model.score(rows, LABELS), strict=True):
        assert_scored_alike(found, expected)


def test_the_trainers_loss_is_the_negative_score(model: TorchLanguageModel) -> None:
    rows = mixed_batch(model)
    outputs = [model.tokenize_output(labels[-1]) for labels in LABELS]
    tokens = model.tokenize_inputs(
        [row.text for row in rows],
        [0 if row.prompt is None else len(row.prompt) for row in rows],
        [len(ids) for ids in outputs],
    )
    laid_out = [
        Row(None if row.prompt is None else torch.tensor(row.prompt), text.ids)
        for row, text in zip(rows, tokens, strict=True)
    ]
    losses = model.negative_log_likelihood(laid_out, outputs)
    expected = [float(scores.log_probabilities[-1]) for scores in model.score(rows, LABELS)]
    assert_close(-losses.numpy(), expected)


def test_only_prompts_of_the_batch_get_a_gradient(model: TorchLanguageModel) -> None:
    prompts = [torch.tensor(prompt(model, 4, seed), requires_grad=True) for seed in range(3)]
    ids = model.tokenize_inputs(["a good film"], [4], [8])[0].ids
    output = model.tokenize_output("positive")
    loss = model.negative_log_likelihood(
        [Row(prompts[0], ids), Row(prompts[1], ids)], [output, output]
    )
    torch.autograd.backward(loss[0])
    used, unused_in_this_row, absent = (values.grad for values in prompts)
    assert used is not None
    assert used.abs().sum() > 0
    assert unused_in_this_row is not None
    assert unused_in_this_row.abs().sum() == 0
    assert absent is None
    assert all(weights.grad is None for weights in model.network.parameters())


def test_greedy_answers_equal_those_of_transformers_alone(model: TorchLanguageModel) -> None:
    rows = mixed_batch(model)
    for row, answer in zip(rows, model.generate(rows, 8), strict=True):
        length = 0 if row.prompt is None else len(row.prompt)
        tokens = model.tokenize_inputs([row.text], [length], [8])[0]
        embeddings = model.network.get_input_embeddings()(torch.tensor([tokens.ids]))
        if row.prompt is not None:
            embeddings = torch.cat([torch.tensor(row.prompt)[None], embeddings], dim=1)
        written = model.network.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=8,
        )
        assert answer.text == Detokenizer(model.tokenizer).text(written[0].tolist())
        assert answer.input_tokens == len(tokens.ids)


def test_answers_do_not_depend_on_the_batch(model: TorchLanguageModel) -> None:
    rows = mixed_batch(model)
    assert [model.generate([row], 8)[0] for row in rows] == model.generate(rows, 8)


def test_an_end_token_finishes_with_stop(
    model: TorchLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [PromptedInput(text, None) for text in TEXTS]
    answers = zip(rows, model.generate(rows, 6), strict=True)
    row, long = next(pair for pair in answers if pair[1].finish_reason == "length")
    assert long.output_tokens == 6
    tokens = model.tokenize_inputs([row.text], [0], [6])[0]
    embeddings = model.network.get_input_embeddings()(torch.tensor([tokens.ids]))
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
    sequence = model.network.generate(
        inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=6
    )
    written = sequence[0, -6:].tolist()
    end = written[-1]  # pretend that one of its tokens ends the answer
    monkeypatch.setattr(model, "end_ids", (end,))
    monkeypatch.setattr(model.network.generation_config, "eos_token_id", [end])
    short = model.generate([row], 6)[0]
    assert (short.finish_reason, short.output_tokens) == ("stop", written.index(end))
    assert long.text.startswith(short.text)


def test_a_long_input_is_cut_on_the_right_and_reported(model: TorchLanguageModel) -> None:
    long = "the quick brown fox " * 50
    values = prompt(model, 5, 1)
    answers = model.generate([PromptedInput(long, values), PromptedInput("fox", values)], 4)
    assert [answer.truncated for answer in answers] == [True, False]
    taken = model.window - 5 - (4 if model.shares_window else 0)
    assert answers[0].input_tokens == taken
    whole, cut = model.tokenize_inputs(["the quick brown fox", long], [5, 5], [4, 4])
    assert cut.ids[:4] == whole.ids[:4]
    assert cut.ids[-1] == whole.ids[-1]  # the layout's last token is kept


def test_a_prompt_that_leaves_no_room_is_incompatible(model: TorchLanguageModel) -> None:
    values = prompt(model, model.window, 1)
    with pytest.raises(IncompatibleModelError, match="shorter prompt"):
        model.score([PromptedInput("fox", values)], [["positive"]])
    with pytest.raises(IncompatibleModelError, match="shorter prompt"):
        model.generate([PromptedInput("fox", values)], 4)


def test_a_prompt_of_another_width_is_incompatible(model: TorchLanguageModel) -> None:
    with pytest.raises(IncompatibleModelError, match="32 numbers"):
        model.score([PromptedInput("fox", np.zeros((4, 31), np.float32))], [["positive"]])


def test_empty_batches_and_empty_candidates_are_fine(model: TorchLanguageModel) -> None:
    assert model.score([], []) == []
    assert model.generate([], 4) == []
    scores = model.score([PromptedInput("", None), PromptedInput("fox", None)], [[], ["sport"]])
    assert [len(row.log_probabilities) for row in scores] == [0, 1]


def test_asking_for_no_tokens_is_an_error(model: TorchLanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        model.generate([PromptedInput("fox", None)], 0)


def test_text_embeddings_repeat_the_text_to_the_length(model: TorchLanguageModel) -> None:
    once = model.text_embeddings("quick fox")
    repeated = model.text_embeddings("quick fox", 2 * len(once) + 1)
    assert torch.equal(repeated, torch.cat([once, once, once[:1]]))
    with pytest.raises(InvalidInputError, match="prompt text"):
        model.text_embeddings("")


def test_using_a_model_leaves_its_weights_alone(model: TorchLanguageModel) -> None:
    def digest() -> str:
        state = model.network.state_dict()
        return hashlib.sha256(
            b"".join(state[k].numpy().tobytes() for k in sorted(state))
        ).hexdigest()

    before = digest()
    model.score(mixed_batch(model), LABELS)
    model.generate(mixed_batch(model), 4)
    assert digest() == before
    assert not any(weights.requires_grad for weights in model.network.parameters())
    assert not model.network.training


def test_a_piece_never_splits_a_character(folders: dict[str, Path]) -> None:
    model = load_language_model(folders["gpt2"], device="cpu", precision="float32")
    text = "🙂 žluťoučký 文字 naïve 日本"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)  # some characters take several tokens
    detokenizer = Detokenizer(model.tokenizer)
    settled = [detokenizer.settled(ids[:n]) for n in range(len(ids) + 1)]
    assert all(text.startswith(beginning) for beginning in settled)
    assert all(later.startswith(sooner) for sooner, later in pairwise(settled))
    assert settled[-1] == detokenizer.text(ids) == text


def test_a_word_is_held_back_while_it_can_still_be_rejoined(folders: dict[str, Path]) -> None:
    model = load_language_model(folders["bart"], device="cpu", precision="float32")
    ids = model.tokenizer("isn't it a good start?", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(model.tokenizer)
    settled = [detokenizer.settled(ids[:n]) for n in range(len(ids) + 1)]
    whole = detokenizer.text(ids)
    assert whole == "isn't it a good start?"
    assert all(whole.startswith(beginning) for beginning in settled)


def test_batches_hold_every_row_once_within_the_limit() -> None:
    lengths = [5, 90, 7, 30, 30, 1, 200]
    found = list(batches(lengths, 100))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 100


def test_the_fingerprint_follows_weights_and_tokenizer_only(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    original = load_language_model(folders["bart"], device="cpu", precision="float32")
    copied = tmp_path / "copied"
    shutil.copytree(folders["bart"], copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9"}))
    assert (
        load_language_model(copied, device="cpu", precision="float32").fingerprint
        == original.fingerprint
    )

    weights = load_file(copied / "model.safetensors")
    name = min(weights)
    save_file(
        weights | {name: weights[name] + 1e-3}, copied / "model.safetensors", {"format": "pt"}
    )
    changed = load_language_model(copied, device="cpu", precision="float32").fingerprint
    assert changed != original.fingerprint

    settings = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 32}))
    assert load_language_model(copied, device="cpu", precision="float32").fingerprint != changed


@pytest.mark.parametrize(("multiplies", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_processor_decides_what_a_half_precision_file_is_computed_in(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    multiplies: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(language_model, "cpu_multiplies_bfloat16", lambda: multiplies)
    halved = tmp_path / "halved"
    shutil.copytree(folders["bart"], halved)
    weights = {k: v.half() for k, v in load_file(halved / "model.safetensors").items()}
    save_file(weights, halved / "model.safetensors", {"format": "pt"})
    model = load_language_model(halved, device="cpu")
    assert {weights.dtype for weights in model.network.parameters()} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_in_bfloat16_are_close_to_those_in_float32(
    folders: dict[str, Path], kind: str
) -> None:
    exact, rounded = (
        load_language_model(folders[kind], device="cpu", precision=precision, threads=1)
        for precision in ("float32", "bfloat16")
    )
    rows = mixed_batch(exact)
    for expected, found in zip(exact.score(rows, LABELS), rounded.score(rows, LABELS), strict=True):
        np.testing.assert_allclose(
            found.log_probabilities, expected.log_probabilities, rtol=0.15, atol=0.2
        )


def test_a_folder_without_weights_or_a_head_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        load_language_model(tmp_path, device="cpu", precision="float32")
    headless = tmp_path / "headless"
    shutil.copytree(folders["gpt2"], headless)
    weights = load_file(headless / "model.safetensors")
    weights.pop(next(name for name in weights if "mlp" in name))
    save_file(weights, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleModelError, match="lacks the weights"):
        load_language_model(headless, device="cpu", precision="float32")


def test_an_unknown_device_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidInputError, match="device"):
        load_language_model(folders["gpt2"], device="abacus")


@pytest.fixture(scope="module")
def embedded() -> TorchLanguageModel:
    return load_language_model(EMBEDDED_BASE, device="cpu", precision="float32", threads=1)


def test_the_embedded_base_model_loads_whole_and_tied(embedded: TorchLanguageModel) -> None:
    assert (embedded.name, embedded.hidden_size, embedded.window) == ("base", 384, 512)
    assert embedded.network.get_output_embeddings().weight is (
        embedded.network.get_input_embeddings().weight
    )
    assert {weights.dtype for weights in embedded.network.parameters()} == {torch.float32}


def test_the_embedded_base_model_answers_alike_alone_and_in_a_batch(
    embedded: TorchLanguageModel,
) -> None:
    rows = mixed_batch(embedded)
    together = embedded.score(rows, LABELS)
    for row, labels, scores in zip(rows, LABELS, together, strict=True):
        assert_scored_alike(embedded.score([row], [labels])[0], scores)
    assert [embedded.generate([row], 6)[0] for row in rows] == embedded.generate(rows, 6)


def test_the_embedded_base_model_frames_text_and_output_as_it_was_trained(
    embedded: TorchLanguageModel,
) -> None:
    start, end = 101, 102  # [CLS] and [SEP]
    (text,) = embedded.tokenize_inputs(["good film"], [20], [4])
    assert (text.ids[0], text.ids[-1], len(text.ids)) == (start, end, 4)
    output = embedded.tokenize_output("positive")
    assert start not in output
    assert output[-1] == end
