"""Looking at prompts: what is shown is what is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from router.artifacts import ArtifactReader
from router.catalog import ARTIFACTS_FOLDER, CatalogReader
from router.errors import CorruptArtifactError
from router.tasks import TaskKey
from tests.catalogs import artifact_file, flip_byte, new_workshop, publish
from tests.unit.prompted_home import TOKENS, PromptedHome, make_prompted_home
from trainer.cli import app
from trainer.cli.inspecting import sparkline
from trainer.inspection import inspect_prompt, nearest_tokens, prompt_similarity
from trainer.tuned_prompt import TunedPrompt, Validation, training_curve


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> PromptedHome:
    return make_prompted_home(tmp_path_factory.mktemp("inspected"))


def inspected(made: PromptedHome, *arguments: object) -> Result:
    options = ("--home", made.folder, "--base-model", made.base_folder)
    return CliRunner().invoke(app, ["inspect", *map(str, (*arguments, *options))])


def test_the_nearest_tokens_of_embeddings_are_their_tokens(
    made: PromptedHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [7, 40, 61]
    values = made.base.token_embeddings(ids).numpy()
    whole, length = nearest_tokens(made.base, values * 3, 4)
    assert [tokens[0].token for tokens in whole] == made.base.tokenizer.convert_ids_to_tokens(ids)
    assert [tokens[0].cosine for tokens in whole] == [1.0] * 3
    every = made.base.token_embeddings(range(made.base.vocabulary_size)).numpy()
    assert length == pytest.approx(np.linalg.norm(every, axis=1).mean(), rel=1e-5)
    # The padding's embedding has no direction.
    units = every / np.maximum(np.linalg.norm(every, axis=1, keepdims=True), 1e-12)
    cosines = values / np.linalg.norm(values, axis=1, keepdims=True) @ units.T
    expected = np.sort(cosines, axis=1)[:, ::-1][:, :4]
    found = [[token.cosine for token in tokens] for tokens in whole]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    monkeypatch.setattr("trainer.inspection._TOKENS_AT_A_TIME", 30)
    assert nearest_tokens(made.base, values * 3, 4)[0] == whole


def test_prompts_are_as_similar_as_their_mean_tokens() -> None:
    one = np.array([[2.0, 0.0], [0.0, 0.0]], np.float32)
    other = np.array([[1.0, 1.0]], np.float32)
    assert prompt_similarity(one, one) == pytest.approx(1)
    assert prompt_similarity(one, other) == pytest.approx(0.5**0.5)
    assert prompt_similarity(one, np.zeros((1, 2), np.float32)) == 0


def test_only_prompts_of_the_same_method_and_base_model_are_compared(made: PromptedHome) -> None:
    artifacts = ArtifactReader(made.folder / ARTIFACTS_FOLDER)
    weather, sport = made.records["weather"], made.records["sport"]
    assert sport.prompt is not None
    strange = replace(
        sport, name="strange", prompt=replace(sport.prompt, base_model="another model")
    )
    found = inspect_prompt(artifacts, weather, [*made.records.values(), strange], made.base)
    assert [similar.task for similar in found.similar] == [TaskKey("sport", 1)]
    assert -1 <= found.similar[0].cosine <= 1


def test_a_damaged_prompt_of_another_task_does_not_stop_the_look_at_this_one(
    tmp_path: Path,
) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, "weather", "sport", with_prompt=True)
        weather, sport = (workshop.catalog.record(TaskKey(n, 1)) for n in ("weather", "sport"))
        assert sport.prompt is not None
        flip_byte(artifact_file(workshop.home, sport.prompt.sha256))
        assert inspect_prompt(workshop.artifacts, weather, [sport], None).similar == ()
        with pytest.raises(CorruptArtifactError):
            inspect_prompt(workshop.artifacts, sport, [weather], None)


def test_a_record_keeps_the_training_curve_and_the_versions(made: PromptedHome) -> None:
    for name, record in made.records.items():
        with CatalogReader(made.folder) as catalog:
            assert catalog.record(TaskKey(name, 1)) == record
        assert record.prompt is not None
        curve = record.prompt.curve
        assert curve is not None
        assert (curve.steps_per_loss, len(curve.losses)) == (1, 4)
        assert curve.validated_at == (0, 2, 4)
        assert max(curve.validation_scores) == pytest.approx(
            record.prompt.scores["prompt"], abs=1e-4
        )
        assert set(record.prompt.versions) == {"promptyard", "torch", "transformers"}


def test_a_long_training_curve_is_kept_short() -> None:
    losses = tuple(float(step) for step in range(1001))
    tuned = TunedPrompt(
        "x", np.zeros((1, 1), np.float32), {}, 0.1, 0.2, losses, 1001, 1.0,
        validations=(Validation(0, 0.5, 1.0), Validation(1001, 0.75, 0.123456)),
    )  # fmt: skip
    curve = training_curve(tuned)
    assert curve.steps_per_loss == 6
    assert len(curve.losses) == 167
    assert (curve.losses[0], curve.losses[-1]) == (2.5, 998.0)
    assert curve.validation_losses == (1.0, 0.1235)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([0.0, 0.5, 1.0], "▁▅█"),
        ([1.0, 1.0], "▁▁"),
        ([8.0, 6.0, 2.0, 0.0], "█▁"),
    ],
)
def test_a_sparkline_goes_from_the_least_to_the_greatest(values: list[float], line: str) -> None:
    assert sparkline(values, width=2 if len(values) == 4 else 60) == line


def test_programs_get_everything_that_is_known_of_a_prompt(made: PromptedHome) -> None:
    result = inspected(made, "weather", "--near", 3, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["name"], found["revision"], found["prompt"]["method"]) == ("weather", 1, "prompt")
    assert [len(tokens) for tokens in found["near_tokens"]] == [3] * TOKENS
    assert len(found["norms"]) == TOKENS
    assert [similar["task"] for similar in found["similar"]] == ["sport"]
    assert found["prompt"]["curve"]["validated_at"] == [0, 2, 4]
    assert found["prompt"]["settings"]["initialisation"]
    assert found["data"]["sha256"] == made.records["weather"].data.sha256


def test_people_see_tokens_curve_and_lineage(made: PromptedHome) -> None:
    result = inspected(made, "weather")
    assert result.exit_code == 0, result.output
    for part in ("weather@1: prompt of 5 virtual tokens, 0.6 KB", "training loss", "sport@1"):
        assert part in result.output
    assert "nearest in the vocabulary" in result.output
    assert "transformers" in result.output


def test_a_prefix_is_shown_layer_by_layer(made: PromptedHome) -> None:
    found = json.loads(inspected(made, "story", "--json").stdout)
    assert found["near_tokens"] is None
    assert np.shape(found["layer_norms"]) == (2, 2)
    assert "mean lengths" in inspected(made, "story").output


def test_a_prompt_of_another_base_model_is_shown_without_nearest_tokens(
    made: PromptedHome, tmp_path: Path
) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, "weather", with_prompt=True)
        publish(workshop, "bare")
    options = ["--home", str(tmp_path / "home"), "--base-model", str(made.base_folder)]
    result = CliRunner().invoke(app, ["inspect", "weather", *options])
    assert result.exit_code == 0, result.output
    assert "the prompt belongs to small-base" in result.stderr
    assert "not recorded" in result.stdout
    for name, reason in (("bare", "TASK_HAS_NO_PROMPT"), ("none", "TASK_NOT_FOUND")):
        result = CliRunner().invoke(app, ["inspect", name, *options, "--json"])
        assert result.exit_code == 1
        assert json.loads(result.stdout)["error"]["reason"] == reason
