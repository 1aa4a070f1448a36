"""The running batch of the base models: what a row's answer is depends on no other row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from router.backends import running_batch
from router.backends.language_model import load_language_model
from router.backends.running_batch import AnswerRow
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError
from router.interfaces import Generation, PromptedInput
from router.tasks import PromptMethod
from tests.unit.small_models import KINDS, save_small_model

TEXTS = (
    "",
    "bad book",
    "a good film 🙂 日本語",
    "the lazy dog runs away from the river and the quick brown fox jumps over it",
)
SLIDING = "mistral"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TorchLanguageModel]:
    root = tmp_path_factory.mktemp("models")
    folders = {kind: save_small_model(kind, root / kind) for kind in KINDS}
    folders[SLIDING] = save_small_model("llama", root / SLIDING)
    torch.manual_seed(7)
    MistralForCausalLM(
        MistralConfig(
            vocab_size=load_language_model(
                folders["llama"], device="cpu", precision="float32"
            ).vocabulary_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            sliding_window=8,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folders[SLIDING])
    models = {
        kind: load_language_model(folder, device="cpu", precision="float32", threads=1)
        for kind, folder in folders.items()
    }
    # Padding changes the order of sums, which random weights make much of in float32.
    for model in models.values():
        model.network.double()
    return models


@pytest.fixture(params=(*KINDS, SLIDING))
def model(
    request: pytest.FixtureRequest, models: dict[str, TorchLanguageModel]
) -> TorchLanguageModel:
    return models[request.param]


_Asked = tuple[str, tuple[PromptMethod, int, int] | None, int]


def row_of(model: TorchLanguageModel, asked: _Asked) -> PromptedInput:
    """A row with a prompt of that method, length and seed; a sliding window takes no prefix.

    Prompts of odd seeds are those of served tasks, which causal models read once.
    """
    text, chosen, _ = asked
    if chosen is None:
        return PromptedInput(text, None)
    method, length, seed = chosen
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocabulary_size, (length,), generator=random).tolist()
    prompt = model.token_embeddings(ids)
    if not model.mixes_lengths:
        method = "prompt"
    values = (prompt if method == "prompt" else model.keys_and_values(prompt)).numpy().copy()
    values.setflags(write=not seed % 2)
    return PromptedInput(text, values, method)


class Writing:
    """A running batch, and what came of its rows."""

    def __init__(self, model: TorchLanguageModel) -> None:
        self.batch = model.start_batch()
        self.pieces: dict[AnswerRow, str] = {}
        self.answers: dict[AnswerRow, Generation] = {}

    def join(self, item: PromptedInput, limit: int) -> AnswerRow:
        row = self.batch.prepare(item, limit)
        assert self.batch.join([row]) == 1
        self.pieces[row] = ""
        return row

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            for written in self.batch.step():
                assert written.row not in self.answers
                assert written.piece or written.generation is not None
                self.pieces[written.row] += written.piece
                if written.generation is not None:
                    self.answers[written.row] = written.generation

    def finish(self) -> None:
        while len(self.batch):
            self.step()


asked_rows = st.tuples(
    st.sampled_from(TEXTS),
    st.none()
    | st.tuples(st.sampled_from(("prompt", "prefix")), st.integers(1, 9), st.integers(0, 3)),
    st.integers(1, 12),
)
# Per row: what is asked, the steps before it joins, and after how many it is dropped.
joiners = st.tuples(asked_rows, st.integers(0, 4), st.none() | st.integers(0, 5))


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(joining=st.lists(joiners, min_size=2, max_size=6))
def test_an_answer_does_not_depend_on_who_joins_and_leaves(
    model: TorchLanguageModel, joining: list[tuple[_Asked, int, int | None]]
) -> None:
    writing = Writing(model)
    rows: dict[AnswerRow, _Asked] = {}
    dropped_after: dict[AnswerRow, int] = {}
    age: dict[AnswerRow, int] = {}

    def step() -> None:
        for row, after in dropped_after.items():
            if age[row] == after:
                writing.batch.drop(row)
        writing.step()
        for row in age:
            age[row] += 1

    for asked, steps_before, dropped in joining:
        for _ in range(steps_before):
            step()
        row = writing.join(row_of(model, asked), asked[2])
        rows[row], age[row] = asked, 0
        if dropped is not None:
            dropped_after[row] = dropped
    while len(writing.batch):
        step()
    for row, asked in rows.items():
        [alone] = model.generate([row_of(model, asked)], asked[2])
        if row in writing.answers:
            assert writing.answers[row] == alone
            assert writing.pieces[row] == alone.text
        else:
            assert dropped_after[row] < alone.output_tokens + 1
            assert alone.text.startswith(writing.pieces[row])


def test_rows_of_all_models_but_those_that_forget_share_their_steps(
    models: dict[str, TorchLanguageModel],
) -> None:
    assert {kind: model.mixes_lengths for kind, model in models.items()} == {
        **dict.fromkeys(KINDS, True),
        SLIDING: False,
    }


def test_rows_that_joined_at_different_steps_take_one_forward_pass(
    models: dict[str, TorchLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        model = models[kind]
        assert model.mixes_lengths
        widths = []
        advance = model.advance_batch

        def count(started, ids, advance=advance, widths=widths):  # type: ignore[no-untyped-def]
            widths.append(len(ids))
            return advance(started, ids)

        monkeypatch.setattr(model, "advance_batch", count)
        monkeypatch.setattr(model, "end_ids", ())  # all of them take all their steps
        writing = Writing(model)
        writing.join(PromptedInput("bad book", None), 8)
        writing.step(3)
        writing.join(PromptedInput("a good film", None), 8)
        writing.finish()
        assert widths == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1], kind


def test_a_decoder_that_takes_padding_for_tokens_is_found_out(
    models: dict[str, TorchLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["bart"]
    assert running_batch.mixes_lengths(model)
    monkeypatch.setattr(type(model), "_position_embedding", None)
    assert not running_batch.mixes_lengths(model)


def test_what_is_padding_in_every_row_is_cut_off(models: dict[str, TorchLanguageModel]) -> None:
    for kind in KINDS:
        writing = Writing(models[kind])
        long = writing.join(PromptedInput(TEXTS[-1], None), 12)
        writing.step(4)
        short = writing.join(PromptedInput("fox", None), 12)
        writing.step(2)
        [group] = writing.batch._groups
        width = group.started.mask.shape[1]
        writing.batch.drop(long)
        writing.step()
        [group] = writing.batch._groups
        assert group.rows == [short]
        assert group.started.decoder_mask.all()
        assert group.started.mask.all()
        assert group.started.mask.shape[1] < width


def test_pieces_concatenate_to_the_answer_and_come_as_they_are_written(
    model: TorchLanguageModel,
) -> None:
    writing = Writing(model)
    rows = [writing.join(PromptedInput(text, None), 12) for text in TEXTS]
    early = 0
    while len(writing.batch):
        writing.step()
        early += sum(bool(writing.pieces[row]) for row in set(rows) - set(writing.answers))
    assert early
    assert all(writing.pieces[row] == writing.answers[row].text for row in rows)


def test_a_row_that_is_dropped_frees_its_place_at_once(model: TorchLanguageModel) -> None:
    writing = Writing(model)
    rows = [writing.join(PromptedInput(text, None), 12) for text in TEXTS]
    writing.step(2)
    before = len(writing.batch)
    running = next(row for row in rows if row not in writing.answers)
    writing.batch.drop(running)
    assert len(writing.batch) == before - 1
    writing.finish()
    assert running not in writing.answers
    assert set(writing.answers) == set(rows) - {running}


def test_only_as_many_rows_join_as_there_is_room_for(
    model: TorchLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_batch, "_MAX_POSITIONS", 60)
    batch = model.start_batch()
    rows = [batch.prepare(PromptedInput("fox", None), 20) for _ in range(4)]
    assert batch.join(rows) == 60 // rows[0].positions == len(batch) == 2
    assert batch.join(rows[2:]) == 0
    batch.step()
    batch.drop(rows[0])
    assert batch.join(rows[2:]) == 1
    # A row that is larger than all there is must be answered all the same, alone.
    monkeypatch.setattr(running_batch, "_MAX_POSITIONS", 5)
    assert model.start_batch().join(rows[3:]) == 1
    assert len(model.generate([PromptedInput(text, None) for text in TEXTS], 3)) == len(TEXTS)


def test_a_row_that_cannot_be_answered_is_refused_before_it_joins(
    model: TorchLanguageModel,
) -> None:
    writing = Writing(model)
    good = writing.join(PromptedInput("fox", None), 4)
    too_long = model.token_embeddings([1] * model.window).numpy()
    with pytest.raises(IncompatibleModelError, match="shorter prompt"):
        writing.batch.prepare(PromptedInput("fox", too_long), 4)
    with pytest.raises(InvalidInputError, match="max_new_tokens"):
        writing.batch.prepare(PromptedInput("fox", None), 0)
    writing.finish()
    assert set(writing.answers) == {good}


def test_a_read_that_fails_leaves_the_batch_as_it_was(
    model: TorchLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    [alone] = model.generate([PromptedInput("bad book", None)], 8)
    writing = Writing(model)
    staying = writing.join(PromptedInput("bad book", None), 8)
    writing.step(2)

    def broken(rows: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(model, "read_batch", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            writing.join(PromptedInput("fox", None), 8)
    writing.finish()
    assert writing.answers == {staying: alone}
