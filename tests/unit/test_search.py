"""The search of tuning settings: what is tried, what is stopped early, what is kept and told."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from router.backends.language_model import load_language_model
from router.backends.torch_model import TorchLanguageModel
from router.catalog import CatalogReader
from router.errors import InvalidInputError
from router.tasks import TaskKey, TaskRecord
from tests.catalogs import texts_of, write_rows
from tests.unit.small_models import save_small_model
from trainer.checkpoint import Checkpoints
from trainer.cli import app
from trainer.prompt_quality import Quality
from trainer.search import MOST_CONFIGURATIONS, configurations
from trainer.successive_halving import rungs, survivors
from trainer.tuned_prompt import TunedPrompt, TuningFailure
from trainer.tuning import tune
from trainer.tuning_options import tuning_settings
from trainer.tuning_settings import TuningJob, TuningSettings


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model("bart", tmp_path_factory.mktemp("base") / "bart")


@pytest.fixture(scope="module")
def model(base_folder: Path) -> TorchLanguageModel:
    return load_language_model(base_folder, device="cpu", precision="float32", threads=1)


def job(name: str) -> TuningJob:
    rows = tuple((f"{name} {n}", "yes" if n % 2 else "no") for n in range(20))
    return TuningJob(name, "good or bad", ("no", "yes"), rows[:14], rows[14:])


JOBS = [job("weather"), job("sport")]
SETTINGS = TuningSettings(
    length=4, learning_rate=0.03, steps=12, rows_per_step=4, validations=6, patience=99
)
OTHERS = [
    replace(SETTINGS, learning_rate=0.1),
    replace(SETTINGS, length=6, steps=18),
    replace(SETTINGS, initialisation="vocabulary"),
]


# What is tried


def test_what_the_user_did_not_name_is_searched_around_the_defaults() -> None:
    found = configurations({"length": 16}, True)
    assert found[0] == tuning_settings({"length": 16})
    assert len(found) == len(set(map(str, found))) == 8
    assert {each.length for each in found} == {16}
    assert {each.learning_rate for each in found} <= {0.003, 0.01, 0.03}
    assert {each.steps for each in found} <= {60, 120}
    assert {each.initialisation for each in found} <= {"examples", "nearest"}
    assert configurations({"length": 16}, True) == found
    assert configurations({"length": 16, "seed": 1}, True)[1:] != found[1:]


def test_a_prefix_is_searched_around_its_own_rate() -> None:
    rates = {each.learning_rate for each in configurations({"method": "prefix"}, True)}
    assert rates <= {0.03, 0.1, 0.3}
    assert len(rates) > 1


def test_listed_values_are_what_is_tried() -> None:
    listed = {"learning_rate": [0.5, 0.01], "length": [5, 7], "configurations": 4}
    found = configurations({"steps": 9}, listed)
    assert (found[0].learning_rate, found[0].length) == (0.01, 5)
    assert {(each.learning_rate, each.length) for each in found} == {
        (rate, length) for rate in (0.5, 0.01) for length in (5, 7)
    }
    assert {each.steps for each in found} == {9}


def test_without_a_search_there_is_one_configuration() -> None:
    for none in (None, False):
        assert configurations({"length": 3}, none) == (tuning_settings({"length": 3}),)


@pytest.mark.parametrize(
    ("given", "search", "problem"),
    [
        ({}, "yes", "search: yes; give true"),
        ({}, {"seed": [1, 2]}, "search: seed; what can be searched is learning_rate, length"),
        ({}, {"length": 3}, "search: length: 3; give a list"),
        ({}, {"length": [3, 3]}, "different values"),
        ({}, {"length": []}, "different values"),
        ({}, {"length": [3, 0]}, "length: 0; give at least 1"),
        ({}, {"length": [3, "many"]}, "whole number"),
        ({}, {"configurations": 1}, "configurations: 1; give 2 to"),
        ({}, {"configurations": MOST_CONFIGURATIONS + 1}, "give 2 to 64"),
        (
            {"learning_rate": 0.1, "length": 3, "initialisation": "text", "steps": 5},
            True,
            "all given; leave one of them out",
        ),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    given: dict[str, object], search: object, problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        configurations(given, search)


# What is stopped early


@dataclass(eq=False)
class Runner:
    """A configuration whose score after each try is known; `losses` come first before any step."""

    scores: list[float]
    tries: int = 0
    is_running: bool = True
    asked: list[int] = field(default_factory=list)

    def quality_after(self, tries: int) -> Quality:
        self.asked.append(tries)
        return Quality(max(self.scores[: tries + 1]), 0.0)


def test_the_better_half_goes_on_at_each_rung_until_one_is_left() -> None:
    runners = [Runner([0.1, 0.1 * k, 0.2 * k, 0.3 * k, 0.9]) for k in range(8)]
    alive = runners
    for tries, left in ((0, 8), (1, 4), (2, 2), (3, 1), (5, 1)):
        for runner in alive:
            runner.tries = tries
        alive = survivors(runners, 6)
        assert len(alive) == left
    assert alive == [runners[7]]


def test_nobody_is_stopped_before_all_are_equally_far() -> None:
    slow, fast, best = Runner([0.1, 0.0]), Runner([0.1, 0.2, 0.9]), Runner([0.1, 0.3])
    slow.tries, fast.tries, best.tries = 0, 2, 1
    assert survivors([slow, fast, best], 4) == [slow, fast, best]
    slow.tries = 1
    # Compared is what they were after one try each: that `fast` was better later does not count.
    assert survivors([slow, fast, best], 4) == [fast, best]
    assert fast.asked == [1]
    slow.tries, slow.is_running = 0, False  # without progress, it stopped by itself
    assert survivors([slow, fast, best], 4) == [fast, best]


def test_of_equal_ones_the_first_goes_on() -> None:
    runners = [Runner([0.5, 0.5], tries=1) for _ in range(4)]
    assert survivors(runners, 9)[0] is runners[0]


@pytest.mark.parametrize(
    ("count", "validations", "expected"),
    [(1, 6, []), (2, 6, [3]), (8, 6, [1, 2, 3]), (5, 16, [2, 4, 8]), (8, 2, [1]), (4, 1, [])],
)
def test_the_last_halving_is_in_the_middle(
    count: int, validations: int, expected: list[int]
) -> None:
    assert rungs(count, validations) == expected


# What is kept


def searched(model: TorchLanguageModel, **more: object) -> dict[str, TunedPrompt]:
    results = tune(model, JOBS, SETTINGS, others=OTHERS, **more)  # type: ignore[arg-type]
    return {name: found for name, found in results.items() if isinstance(found, TunedPrompt)}


def test_a_search_keeps_what_its_settings_come_to_alone(model: TorchLanguageModel) -> None:
    found = searched(model)
    assert set(found) == {"weather", "sport"}
    for name, prompt in found.items():
        tried = prompt.search
        assert len(tried) == 4
        assert set(tried[0].settings) == {"learning_rate", "length", "initialisation", "steps"}
        [chosen] = [each for each in tried if each.chosen]
        assert all(prompt.settings[key] == value for key, value in chosen.settings.items())
        assert (chosen.score, chosen.steps) == (
            pytest.approx(prompt.scores["prompt"], abs=1e-4),
            prompt.steps,
        )
        assert sorted(each.steps for each in tried)[0] < 12  # somebody was stopped early
        assert max(each.score or 0 for each in tried) == chosen.score
        settings = replace(SETTINGS, **chosen.settings)  # type: ignore[arg-type]
        [alone] = tune(model, [job(name)], settings).values()
        assert isinstance(alone, TunedPrompt)
        np.testing.assert_allclose(alone.values, prompt.values, atol=0.02)
        assert alone.scores == prompt.scores
        assert alone.search == ()


def test_a_search_costs_less_than_to_tune_every_configuration(model: TorchLanguageModel) -> None:
    for prompt in searched(model).values():
        assert sum(each.steps for each in prompt.search) < 0.8 * (3 * 12 + 18)


def test_a_search_that_was_cut_short_goes_on_and_chooses_the_same(
    model: TorchLanguageModel, tmp_path: Path
) -> None:
    class KilledError(Exception):
        """Stands for a kill."""

    def progress(_: str, stage: str, done: int, __: int) -> None:
        if (stage, done) == ("tune", 5):
            raise KilledError

    whole = searched(model)
    with pytest.raises(KilledError):
        searched(model, progress=progress, checkpoints=Checkpoints(tmp_path, 0))
    said: list[str] = []
    resumed = searched(
        model,
        progress=lambda _, stage, *__: said.append(stage),
        checkpoints=Checkpoints(tmp_path, 99),
    )
    assert said[0] == "going on after step 5, where it was cut short"
    for name, prompt in whole.items():
        assert resumed[name].values.tobytes() == prompt.values.tobytes()
        assert resumed[name].search == prompt.search


def test_a_configuration_that_fails_is_told_and_leaves_the_others(
    model: TorchLanguageModel,
) -> None:
    others = [replace(SETTINGS, length=500), replace(SETTINGS, learning_rate=1e30)]
    [found] = tune(model, JOBS[:1], SETTINGS, others=others).values()
    assert isinstance(found, TunedPrompt)
    fine, long, wild = found.search
    assert fine.chosen
    assert "length" in long.settings
    assert long.problem
    assert (long.score, long.steps) == (None, 0)
    assert "not finite" in wild.problem
    [failed] = tune(
        model, JOBS[:1], replace(SETTINGS, length=500), others=[replace(SETTINGS, length=501)]
    ).values()
    assert isinstance(failed, TuningFailure)
    assert "shorter prompt" in failed.remedy


# The command, the record and what is shown of it


def test_the_search_of_a_manifest_is_in_the_record_and_shown(
    tmp_path: Path, base_folder: Path
) -> None:
    write_rows(tmp_path / "weather.jsonl", texts_of("weather", 20))
    (tmp_path / "tasks.yaml").write_text(
        "tasks: [{name: weather, data: weather.jsonl, instruction: good or bad, force: a test}]\n"
        "tuning: {steps: 6, validations: 3, refit: never,"
        " search: {length: [3, 5], learning_rate: [0.01, 0.1]}}\n"
    )
    options = ["--home", str(tmp_path / "home"), "--base-model", str(base_folder)]
    command = ["register", "--manifest", str(tmp_path / "tasks.yaml"), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "configurations stopped" in result.stderr
    with CatalogReader(tmp_path / "home") as catalog:
        record = catalog.record(TaskKey("weather", 1))
    assert record.prompt is not None
    [chosen] = [each for each in record.prompt.search if each.chosen]
    assert len(record.prompt.search) == 4
    assert record.prompt.tokens == chosen.settings["length"]
    assert TaskRecord.from_json(record.to_json()) == record
    shown = CliRunner().invoke(app, ["inspect", "weather", *options])
    assert "search on the validation rows" in shown.output
    assert shown.output.count("learning_rate=") == 4
    assert "chosen" in shown.output
    told = json.loads(CliRunner().invoke(app, ["inspect", "weather", *options, "--json"]).stdout)
    assert [each["chosen"] for each in told["prompt"]["search"]].count(True) == 1


def test_a_flag_turns_the_search_of_a_manifest_on_and_off(
    tmp_path: Path, base_folder: Path
) -> None:
    write_rows(tmp_path / "weather.jsonl", texts_of("weather", 12))
    (tmp_path / "tasks.yaml").write_text(
        "tasks: [{name: weather, data: weather.jsonl, instruction: good or bad, force: a test}]\n"
        "tuning: {steps: 2, length: 3, initialisation: text, refit: never, search: true}\n"
    )
    for flag, tried in (("--search", 3), ("--no-search", 0)):
        home = tmp_path / flag
        command = ["register", "--manifest", str(tmp_path / "tasks.yaml"), flag]
        command += ["--home", str(home), "--base-model", str(base_folder)]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        with CatalogReader(home) as catalog:
            prompt = catalog.record(TaskKey("weather", 1)).prompt
        assert prompt is not None
        assert len(prompt.search) == tried
