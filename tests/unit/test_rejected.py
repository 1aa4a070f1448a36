"""Rejected outputs: read, made less probable by tuning, and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from router.backends.language_model import load_language_model
from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.errors import InvalidInputError
from router.tasks import TaskRecord
from tests.catalogs import new_workshop, texts_of
from tests.unit.small_models import KINDS, save_small_model
from trainer.cli import app
from trainer.commands import RegisterTask
from trainer.data import read_labelled
from trainer.gradients import TrainingRow, row_losses
from trainer.initialisation import Start
from trainer.register import register
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning import tune
from trainer.tuning_settings import TuningJob, TuningSettings

WORDS = ("fox", "dog", "river", "book", "film", "end", "start")
ROWS = tuple((f"the {word} {k}", "good") for k, word in enumerate(WORDS * 2))
JOB = TuningJob(
    "reply",
    "say what it is",
    None,
    ROWS[:10],
    ROWS[10:],
    rejected=(("bad",),) * 10,
    validation_rejected=(("bad",),) * 4,
)
SETTINGS = TuningSettings(
    length=6, learning_rate=0.1, steps=30, validations=3, patience=99, refit="never"
)


@pytest.fixture(scope="module", params=KINDS)
def any_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TorchLanguageModel:
    folder = tmp_path_factory.mktemp("models") / request.param
    return load_language_model(
        save_small_model(request.param, folder), device="cpu", precision="float32", threads=1
    )


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loss_of(model: TorchLanguageModel, right: str, *rejected: str, weight: float = 1.0) -> float:
    [tokens] = model.tokenize_inputs(["the fox"], [0], [8])
    ids = [model.tokenize_output(text) for text in (right, *rejected)]
    row = TrainingRow(Row(None, tokens.ids), ids[:1], 1.0, ids[1:], weight)
    with torch.no_grad():
        return float(row_losses(model, [row])[0])


# The loss


def test_the_loss_is_the_unlikelihood_of_the_tokens_that_differ(
    any_model: TorchLanguageModel,
) -> None:
    right, rejected = "a good film", "a bad film"
    ids, bad = any_model.tokenize_output(right), any_model.tokenize_output(rejected)
    [tokens] = any_model.tokenize_inputs(["the fox"], [0], [8])
    with torch.no_grad():
        losses = any_model.output_token_losses([Row(None, tokens.ids)], [[bad]])[0]
    shared = next(k for k in range(len(bad)) if bad[k] != ids[k])
    wanted = -torch.log(1 - torch.exp(-losses[shared : len(bad) - 1]) + 1e-6).sum()
    plain = loss_of(any_model, right)
    assert loss_of(any_model, right, rejected) - plain == pytest.approx(float(wanted), abs=1e-4)
    twice = loss_of(any_model, right, rejected, weight=2.0)
    assert twice - plain == pytest.approx(2 * float(wanted), abs=1e-4)
    # The mean of several.
    assert loss_of(any_model, right, rejected, rejected) == pytest.approx(
        plain + float(wanted), abs=1e-4
    )


def test_token_losses_add_up_to_what_outputs_are_scored_by(any_model: TorchLanguageModel) -> None:
    [tokens] = any_model.tokenize_inputs(["the fox"], [0], [8])
    row = Row(None, tokens.ids)
    candidates = [[any_model.tokenize_output(text) for text in ("film", "a very bad film")]]
    with torch.no_grad():
        losses = any_model.output_token_losses([row], candidates)
        [scores] = any_model.log_likelihoods([row], candidates)
    torch.testing.assert_close(-losses.sum(1), scores)
    assert (losses[0, len(candidates[0][0]) :] == 0).all()


# Tuning


def test_tuning_makes_probable_rejected_outputs_less_probable_and_desired_ones_more(
    tmp_path: Path,
) -> None:
    folder = save_small_model("bart", tmp_path / "bart")
    model = load_language_model(folder, device="cpu", precision="float32", threads=1)
    bad_rows = tuple((text, "bad") for text, _ in ROWS)
    habit = replace(JOB, train=bad_rows, validation=bad_rows[10:], rejected=())
    bad = tune(model, [replace(habit, validation_rejected=())], replace(SETTINGS, steps=120))
    learnt = bad["reply"]
    assert isinstance(learnt, TunedPrompt)
    job = replace(JOB, starts=(Start("habit", learnt.values),))
    result = tune(model, [job], replace(SETTINGS, initialisation="nearest"))["reply"]
    assert isinstance(result, TunedPrompt)
    found = result.probabilities
    assert set(found) == {"desired_before", "desired_after", "rejected_before", "rejected_after"}
    assert found["rejected_before"] > 0.01
    assert found["rejected_after"] < found["rejected_before"] / 2
    assert found["desired_after"] > found["desired_before"]

    # Of that, the part that unlikelihood has: a step down its gradient alone.
    prompt = torch.from_numpy(learnt.values).requires_grad_()
    right, bad_ids = (model.tokenize_output(text) for text in ("good", "bad"))
    [tokens] = model.tokenize_inputs(["the fox 0"], [len(prompt)], [8])
    rows = [
        TrainingRow(Row(prompt, tokens.ids), [right], 1.0, [bad_ids], weight)
        for weight in (1.0, 0.0)
    ]
    with_it, without = row_losses(model, rows)
    [gradient] = torch.autograd.grad(with_it - without, prompt)
    with torch.no_grad():
        moved = Row(prompt - 0.1 * gradient / gradient.norm(), tokens.ids)
        before, after = model.log_likelihoods(
            [Row(prompt, tokens.ids), moved], [[bad_ids], [bad_ids]]
        )
    assert float(after) < float(before) - 1e-3


def test_a_task_without_rejected_outputs_reports_none(any_model: TorchLanguageModel) -> None:
    plain = replace(JOB, rejected=(), validation_rejected=())
    result = tune(any_model, [plain], replace(SETTINGS, steps=2, validations=1))["reply"]
    assert isinstance(result, TunedPrompt)
    assert result.probabilities == {}


# Rows and records


def test_rejected_outputs_are_a_text_or_a_list_and_part_of_the_digest(tmp_path: Path) -> None:
    rows = [{"input": str(n), "output": "x"} for n in range(2)]
    plain = read_labelled(write(tmp_path / "plain.jsonl", *rows))
    rich = read_labelled(
        write(
            tmp_path / "rich.jsonl",
            {**rows[0], "rejected": "no"},
            {**rows[1], "rejected": ["no", "never"]},
        )
    )
    found = {example.input: example.rejected for example in rich.examples}
    assert found == {"0": ("no",), "1": ("no", "never")}
    assert plain.sha256 != rich.sha256


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        (["n"] * 9, "9 outputs; give at most 8"),
        ("X ", "it is the row's output"),
        (["n", ""], "empty"),
        ({"a": 1}, "dict; give a text"),
    ],
)
def test_bad_rejected_outputs_are_refused_with_their_row(
    tmp_path: Path, rejected: object, message: str
) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"input": "a", "output": "x"},
        {"input": "b", "output": "x", "rejected": rejected},
    )
    with pytest.raises(InvalidInputError, match=f"row 2, field 'rejected'.*{message}"):
        read_labelled(path)


def test_register_records_and_prints_the_change_of_both_probabilities(tmp_path: Path) -> None:
    folder = save_small_model("bart", tmp_path / "bart")
    data = write(
        tmp_path / "rows.jsonl",
        *(
            {"input": text, "output": ("good", "fine")[n % 2], "rejected": "bad"}
            for n, text in enumerate(texts_of("weather", 16))
        ),
    )
    base = load_language_model(folder, device="cpu", precision="float32", threads=1)
    settings = TuningSettings(length=4, steps=2, validations=1)
    request = RegisterTask("weather", data, instruction="good", force="a test")
    with new_workshop(tmp_path / "home") as workshop:
        [record] = register(workshop, [request], base, settings).records
        assert workshop.catalog.record(record.key) == record
    assert record.prompt is not None
    assert 0 < record.prompt.probabilities["rejected_after"] < 1
    assert TaskRecord.from_json(record.to_json()) == record
    told = CliRunner().invoke(
        app,
        [
            *("register", "weather", "--data", str(data), "--steps", "2", "--length", "4"),
            *("--force", "a test", "--home", str(tmp_path / "other"), "--base-model", str(folder)),
        ],
    )
    assert told.exit_code == 0, told.output
    assert "weather, mean probability of held-out outputs: rejected" in told.output
