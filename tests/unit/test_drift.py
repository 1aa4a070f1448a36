"""Drift: what a server notes of its decisions, and what can be told from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from router.bootstrap import Models, open_routers
from router.decision import Decision, Outcome
from router.decision_log import DecisionLog, older
from router.errors import InvalidInputError
from router.head import CALIBRATION_LEVELS
from router.tasks import TaskKey
from tests.catalogs import PlaceEncoder, new_workshop, publish, served_models, texts_of
from tests.fakes import make_settings
from trainer.cli import app
from trainer.drift import Drift, Noted, _kolmogorov_smirnov, measure_drift, read_log
from trainer.workshop import Published

WEATHER, SPORT = "weather@1", "sport@1"


def decision(score: float = 1.5, task: str | None = "weather") -> Decision:
    key = None if task is None else TaskKey(task, 1)
    outcome = Outcome.UNKNOWN if task is None else Outcome.MATCHED
    return Decision(outcome, key, score, 0.5, 0.2, 1, truncated=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def published(home: Path) -> Published:
    with new_workshop(home) as workshop:
        publish(workshop, "weather", texts=texts_of("weather", 80))
        publish(workshop, "sport", texts=texts_of("sport", 80))
        return publish(workshop, "small")


# ---- the log


def test_a_decision_is_noted_without_its_text(path: Path) -> None:
    log = DecisionLog(path)
    for text, tenant in (("secret words", ""), ("secret words", ""), ("secret words", "red")):
        log.note([(text, decision())], tenant)
    log.note([("other", decision(-float("inf"), None))])
    assert "secret" not in path.read_text()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first, again, red, unknown = lines
    assert first["text"] == again["text"]
    assert first["text"] != red["text"]
    assert (first["task"], first["best"], first["score"]) == ("weather", WEATHER, 1.5)
    assert (first["outcome"], first["revision"], first["tenant"]) == ("matched", 1, "")
    assert (unknown["outcome"], unknown["task"], unknown["score"]) == ("unknown", None, None)
    noted = list(read_log(path))
    assert [(each.tenant, each.task, each.score) for each in noted] == [
        ("", "weather", 1.5),
        ("", "weather", 1.5),
        ("red", "weather", 1.5),
        ("", "", None),
    ]


def test_the_salt_is_another_in_every_process_and_in_no_file(path: Path) -> None:
    for _ in range(2):
        DecisionLog(path).note([("the same text", decision())])
    first, second = read_log(path)
    assert first.text != second.text


def test_the_files_stay_under_their_bound_together_and_the_newest_lines_stay(path: Path) -> None:
    log = DecisionLog(path, max_bytes=4000)
    for number in range(100):
        log.note([(f"text {number}", decision(float(number)))])
        assert path.stat().st_size + (older(path).stat().st_size if number > 30 else 0) <= 4000
    scores = [each.score for each in read_log(path)]
    assert scores == [float(number) for number in range(100 - len(scores), 100)]
    assert len(scores) >= 10
    # A server that starts again goes on with the file, within the bound.
    log = DecisionLog(path, max_bytes=4000)
    for number in range(100):
        log.note([(f"text {number}", decision())])
    assert path.stat().st_size + older(path).stat().st_size <= 4000


def test_several_processes_write_to_one_file_within_the_bound_and_know_a_text_again(
    path: Path,
) -> None:
    logs = [DecisionLog(path, max_bytes=4000, salt=b"of both") for _ in range(2)]
    for number in range(100):
        logs[number % 3 % 2].note([("the same text", decision(float(number)))])
        assert path.stat().st_size + (older(path).stat().st_size if number > 30 else 0) <= 4000
    noted = list(read_log(path))
    assert [each.score for each in noted] == [float(n) for n in range(100 - len(noted), 100)]
    assert len(noted) >= 10
    assert len({each.text for each in noted}) == 1


def test_the_share_is_the_share(path: Path) -> None:
    log = DecisionLog(path, share=0.25)
    for number in range(800):
        log.note([(f"text {number}", decision())])
    assert 130 < len(list(read_log(path))) < 270
    DecisionLog(path.with_name("none"), share=0.0).note([("text", decision())])
    assert path.with_name("none").read_text() == ""


def test_a_log_that_cannot_be_written_is_refused_at_the_start_and_costs_no_call_later(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=r"decision-log: \. \(Is a directory\)"):
        DecisionLog(Path())
    folder = tmp_path / "folder"
    folder.mkdir()
    log = DecisionLog(folder / "log")
    (folder / "log").unlink()
    folder.rmdir()
    with capture_logs() as logs:
        log.note([("one", decision())])
        log.note([("two", decision())])
    assert [line["event"] for line in logs] == ["decisions are not noted"]


@pytest.mark.parametrize("line", ["no JSON", "[]", "{}", '{"tenant": "", "revision": "x"}'])
def test_a_file_that_is_no_decision_log_is_refused_with_the_place(path: Path, line: str) -> None:
    DecisionLog(path).note([("text", decision())])
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InvalidInputError, match="line 2: "):
        list(read_log(path))


async def test_a_server_notes_what_it_decides(home: Path, published: Published, path: Path) -> None:
    settings = make_settings(home=home, decision_log=path)
    models = Models(PlaceEncoder(), None, served_models(None))
    with open_routers(settings, models) as routers:
        decisions = await routers.own.route_batch(["sport 9", "nowhere 1"])
    assert [each.task for each in read_log(path)] == [
        "" if each.task is None else each.task.name for each in decisions
    ]
    sport, unknown = read_log(path)
    assert (sport.task, sport.best) == ("sport", SPORT)
    assert (unknown.task, bool(unknown.best), unknown.score is None) == ("", True, False)


# ---- drift


def noted(task: str, scores: Sequence[float], tenant: str = "", revision: int = 3) -> list[Noted]:
    return [
        Noted(tenant, revision, f"{task}-{n}", task, task, float(score))
        for n, score in enumerate(scores)
    ]


def calibrated(published: Published, number: int, count: int, seed: int = 0) -> np.ndarray:
    """Scores as calibration saw them: between the stored quantiles."""
    assert published.head.calibration is not None
    levels = np.random.default_rng(seed).uniform(0.05, 0.95, count)
    return np.interp(levels, CALIBRATION_LEVELS, published.head.calibration[number, 1:])


def place_of(published: Published, task: str) -> int:
    return [str(key) for key in published.head.tasks].index(task)


def moved(drift: Drift) -> set[str]:
    return {each.task for each in drift.scores if each.moved}


def test_a_head_keeps_quantiles_of_the_scores_that_it_was_calibrated_on(
    published: Published,
) -> None:
    head = published.head
    assert head.calibration is not None
    rows, quantiles = head.calibration[:, 0], head.calibration[:, 1:]
    assert quantiles.shape == (3, len(CALIBRATION_LEVELS))
    assert np.isfinite(quantiles).all()
    assert (np.diff(quantiles, axis=1) >= 0).all()
    # Every row has one best task; few of a task's own fall under its threshold, where it has rows
    # enough for one of its own.
    assert rows.sum() == len(head.held_out) == 180
    large = rows >= 50
    assert large.sum() == 2
    assert (quantiles[large, 3] >= np.array(head.thresholds)[large]).all()


def test_the_task_whose_scores_moved_is_named_and_no_other(
    home: Path, published: Published
) -> None:
    weather, sport = (
        calibrated(published, place_of(published, task), 200, seed)
        for seed, task in enumerate((WEATHER, SPORT))
    )
    still = measure_drift(noted(WEATHER, weather) + noted(SPORT, sport), home)
    assert moved(still) == set()
    assert (still.revision, still.decisions, still.unknown) == (3, 400, 0.0)
    shift = 2 * float(np.std(weather))
    drift = measure_drift(noted(WEATHER, weather - shift) + noted(SPORT, sport), home)
    assert moved(drift) == {WEATHER}
    [found] = [each for each in drift.scores if each.task == WEATHER]
    assert found.median is not None
    assert found.calibrated_median is not None
    assert found.median < found.calibrated_median


def test_a_text_that_comes_again_and_again_moves_nothing(home: Path, published: Published) -> None:
    number = place_of(published, WEATHER)
    scores = calibrated(published, number, 100)
    many = [Noted("", 3, "the same", WEATHER, WEATHER, float(scores.min()))] * 500
    assert moved(measure_drift(noted(WEATHER, scores) + many, home)) == set()


def test_too_few_texts_or_rows_are_not_tested(home: Path, published: Published) -> None:
    drift = measure_drift(noted("small@1", [-9.0] * 50) + noted(WEATHER, [-9.0] * 29), home)
    assert moved(drift) == set()
    assert {each.task: each.p for each in drift.scores} == {
        "small@1": None,
        SPORT: None,
        WEATHER: None,
    }


def test_what_did_not_move_is_rarely_said_to_have() -> None:
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(400):
        rows, scores = rng.normal(size=64), np.sort(rng.normal(size=150))
        known = np.quantile(rows, CALIBRATION_LEVELS, method="inverted_cdf")
        alarms += _kolmogorov_smirnov(scores, known, 64)[1] < 0.05
    assert alarms <= 0.05 * 400


def test_a_moved_volume_is_told_from_one_that_did_not(home: Path, published: Published) -> None:
    before = (noted(WEATHER, [1.0]) * 3 + noted(SPORT, [1.0])) * 50
    after = (noted(WEATHER, [1.0]) + noted(SPORT, [1.0]) * 3) * 50
    told = {each.task: each for each in measure_drift(before + after, home).volumes}
    assert (told[SPORT].moved, told[WEATHER].moved) == (True, True)
    assert (told[SPORT].older, told[SPORT].newer) == (0.25, 0.75)
    assert not any(each.moved for each in measure_drift(before + before, home).volumes)


def test_only_decisions_of_the_tenant_and_the_revision_count(
    home: Path, published: Published
) -> None:
    lines = noted(WEATHER, [1.0] * 3) + noted(WEATHER, [1.0] * 5, revision=2)
    lines += noted(WEATHER, [1.0] * 7, tenant="red", revision=9)
    newest = measure_drift(lines, home)
    assert (newest.revision, newest.decisions, newest.other_revisions) == (3, 3, 5)
    assert measure_drift(lines, home, revision=2).decisions == 5
    with pytest.raises(InvalidInputError, match="no decision to compare"):
        measure_drift(lines, home, tenant="blue")


def test_the_command_names_what_moved(home: Path, published: Published, path: Path) -> None:
    log = DecisionLog(path)
    scores = calibrated(published, place_of(published, WEATHER), 100)
    for number, score in enumerate(scores - 2 * np.std(scores)):
        low = replace(decision(float(score)), revision=3)
        log.note([(f"text {number}", low)])
    arguments = ["drift", str(path), "--home", str(home)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = {each["task"]: each["moved"] for each in json.loads(result.stdout)["scores"]}
    assert found == {WEATHER: True, SPORT: False, "small@1": False}
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert "100 decisions at catalog revision 3" in shown.output
    missing = CliRunner().invoke(app, ["drift", str(path) + "x", "--home", str(home)])
    assert missing.exit_code == 2
