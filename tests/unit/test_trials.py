"""Trials: variants of a task are tuned on the same rows and compared; the best is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from router.backends.language_model import load_language_model
from router.backends.torch_model import TorchLanguageModel
from router.errors import InvalidInputError
from tests.catalogs import texts_of, write_rows
from tests.unit.small_models import save_small_model
from trainer.cli import app
from trainer.commands import RegisterTask
from trainer.metrics import wilson_interval
from trainer.trials import (
    check_variants,
    difference_interval,
    parse_variant,
    read_variants,
    score_interval,
    try_variants,
    with_variant,
)
from trainer.workshop import Workshop

QUICK = {"steps": 3, "validations": 1, "length": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TorchLanguageModel:
    folder = save_small_model("bart", tmp_path_factory.mktemp("base") / "bart")
    return load_language_model(folder, device="cpu", precision="float32", threads=1)


@pytest.fixture
def request_of_task(tmp_path: Path) -> RegisterTask:
    data = write_rows(tmp_path / "rows.jsonl", texts_of("weather", 30))
    return RegisterTask("weather", data, instruction="good or bad")


# What the figures are


def test_the_interval_of_a_difference_holds_0_where_both_answer_alike() -> None:
    expected = ["a", "b"] * 10
    same = difference_interval("accuracy", expected, expected, expected)
    assert (same.low, same.high) == (0, 0)
    better = difference_interval("accuracy", ["a"] * 20, expected, expected)
    assert 0.2 < better.low < 0.5 < better.high < 0.8
    worse = difference_interval("accuracy", expected, ["a"] * 20, expected)
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low))


def test_the_interval_of_a_score_is_wilson_s_and_a_bootstrap_s_for_macro_f1() -> None:
    expected, answers = ["a", "b"] * 10, ["a"] * 20
    assert score_interval("accuracy", answers, expected) == wilson_interval(10, 20)
    macro = score_interval("macro-f1", answers, expected)
    assert 0.1 < macro.low < 1 / 3 < macro.high < 0.6


# What a variant may say


def test_a_variant_is_read_from_key_value_pairs() -> None:
    assert parse_variant("length=40,learning-rate=0.01,method=prefix,template={input}!") == {
        "length": 40,
        "learning_rate": 0.01,
        "method": "prefix",
        "template": "{input}!",
    }
    assert parse_variant("instruction=12") == {"instruction": "12"}


@pytest.mark.parametrize("text", ["", "length", "=3", "length=3,length=4", "template={input}, yes"])
def test_a_variant_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"--variant: .*key=value"):
        parse_variant(text)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"lenght": 3}, "lenght; the settings are"),
        ({"length": "many"}, "whole number"),
        ({"instruction": 3}, "instruction: 3; give a text"),
        ({"template": "{context}"}, "write {input} once"),
    ],
)
def test_a_variant_of_unknown_or_wrong_settings_is_refused(
    variant: dict[str, object], message: str, request_of_task: RegisterTask
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        with_variant(request_of_task, variant, {})


def test_variants_are_different_and_2_to_32() -> None:
    check_variants([{"length": 1}, {"length": 2}])
    for variants in ([{"length": 1}], [{"length": n} for n in range(33)], [{}, {}]):
        with pytest.raises(InvalidInputError, match="variants"):
            check_variants(variants)


def test_variants_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text("variants:\n- {length: 4}\n- {template: '{context}, then {input}'}\n")
    assert read_variants(path) == [{"length": 4}, {"template": "{context}, then {input}"}]
    for wrong in ("variants: 3", "[]", "variants: [3]"):
        path.write_text(wrong)
        with pytest.raises(InvalidInputError, match="variants"):
            read_variants(path)


# Trying


def test_variants_are_compared_on_the_same_rows_and_nothing_is_published(
    workshop: Workshop, request_of_task: RegisterTask, base: TorchLanguageModel
) -> None:
    variants = [{"length": 4}, {"method": "prefix"}, {"template": "so: {input}"}]
    trials = try_variants(workshop, request_of_task, variants, base, QUICK)
    assert trials.metric == "accuracy"
    assert trials.rows == 6
    assert [each.variant for each in trials.tried] == variants
    first, *others = trials.tried
    assert first.difference is None
    for each in others:
        assert each.score is not None
        assert first.score is not None
        assert each.interval == wilson_interval(each.score * 6, 6)
        assert each.difference == pytest.approx(each.score - first.score)
        assert each.difference_interval is not None
        assert each.difference_interval.low <= each.difference <= each.difference_interval.high
    assert trials.best is not None
    assert trials.tried[trials.best].score == max(each.score or 0 for each in trials.tried)
    assert workshop.catalog.newest_revision() == 0


def test_a_variant_that_fails_leaves_the_others(
    workshop: Workshop, request_of_task: RegisterTask, base: TorchLanguageModel
) -> None:
    variants = [{"learning_rate": 1e30}, {"length": 3}]
    failed, fine = try_variants(workshop, request_of_task, variants, base, QUICK).tried
    assert "not finite" in failed.problem
    assert failed.score is None
    assert fine.score is not None
    assert fine.difference is None


# The command


def test_the_command_compares_and_publishes_the_best_as_the_next_revision(
    tmp_path: Path, base: TorchLanguageModel
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", texts_of("weather", 16))
    command = [
        *("try", "weather", "--data", str(data), "--steps", "2", "--force", "a test", "--json"),
        *("--home", str(tmp_path / "home"), "--base-model", base.name),
        *("--variant", "length=3", "--variant", "length=4,template=so: {input}"),
    ]
    command[command.index("--base-model") + 1] = str(save_small_model("bart", tmp_path / "bart"))
    told = json.loads(CliRunner().invoke(app, command).stdout)
    assert len(told["tried"]) == 2
    assert told["published"] is None
    for revision in (1, 2):
        result = CliRunner().invoke(app, [*command, "--publish", "best"])
        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        [record] = told["published"]["registered"]
        winner = told["tried"][told["best"]]["variant"]
        assert record["revision"] == revision
        assert record["prompt"]["tokens"] == winner["length"]
        assert record["template"] == winner.get("template", "")


def test_the_command_refuses_a_single_variant_before_anything_is_loaded(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["try", "weather", "--data", "none.jsonl", "--variant", "length=3", "--json"]
    )
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["field"] == "variants"
