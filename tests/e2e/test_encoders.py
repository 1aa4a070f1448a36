"""Encoders by the command line: measured, used, and switched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router.backends.static_encoder import CACHE_VARIABLE
from trainer.cli import app

EXAMPLES = Path(__file__).parents[2] / "trainer" / "examples"
TASKS = ("home-intent", "news-topic", "clause-kind")


def promptyard(*arguments: object, exit_code: int = 0) -> Any:
    """The one JSON document on stdout."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks, registered with the fast encoder."""
    folder = tmp_path_factory.mktemp("encoders") / "home"
    for name in TASKS:
        promptyard(
            *("register", name, "--data", EXAMPLES / f"{name}.jsonl", "--no-prompt"),
            *("--home", folder, "--encoder", "fast"),
        )
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of two tasks, twenty each, and one of the split `test` that is left out."""
    rows = [
        {"input": json.loads(line)["input"], "task": name}
        for name in TASKS[:2]
        for line in (EXAMPLES / f"{name}.jsonl").read_text().splitlines()[:20]
    ]
    rows += [{"input": "what is this", "task": "oos"}]
    rows += [{"input": "never read", "task": "elsewhere", "split": "test"}]
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    path.write_text("".join(f"{json.dumps({'split': 'train', **row})}\n" for row in rows))
    return path


def test_a_catalog_of_the_fast_encoder_routes_and_is_evaluated(home: Path, tmp_path: Path) -> None:
    [decision] = promptyard(
        *("route", "switch the kitchen light off", "--top-k", 1),
        *("--home", home, "--encoder", "fast"),
    )
    assert decision["candidates"][0]["task"] == "home-intent"
    data = tmp_path / "rows.jsonl"
    line = (EXAMPLES / "news-topic.jsonl").read_text().splitlines()[3]
    data.write_text(json.dumps({**json.loads(line), "task": "news-topic"}) + "\n")
    report = promptyard(
        *("evaluate", "routing", "--data", data, "--home", home, "--encoder", "fast")
    )
    assert report["routing"]["accuracy"] == 1.0


def test_a_catalog_of_the_fast_encoder_is_refused_with_another_one(home: Path) -> None:
    error = promptyard("retire", TASKS[0], "--home", home, exit_code=1)["error"]
    assert error["reason"] == "INCOMPATIBLE_MODEL"
    assert "made with fast-all-MiniLM-L6-v2:" in error["remedy"]


def test_encoders_are_listed_and_measured_and_the_homes_own_is_marked(
    home: Path, labelled: Path
) -> None:
    found = promptyard("encoders", "--home", home, "--data", labelled)
    by_name = {each["name"]: each for each in found["encoders"]}
    assert list(by_name) == ["all-MiniLM-L6-v2", "fast"]
    assert [each["of_home"] for each in by_name.values()] == [False, True]
    assert found["home_encoder"] == by_name["fast"]["fingerprint"]
    assert (by_name["fast"]["dimension"], by_name["fast"]["window"]) == (384, 1024)
    assert by_name["fast"]["texts_per_second"] > by_name["all-MiniLM-L6-v2"]["texts_per_second"]
    assert by_name["fast"]["short_text_ms"] < by_name["all-MiniLM-L6-v2"]["short_text_ms"]
    for each in by_name.values():
        assert (each["routing"]["rows"], each["routing"]["tasks"]) == (40, 2)
        assert each["routing"]["accuracy"] >= 0.9


def test_an_encoder_that_cannot_be_loaded_leaves_the_others(tmp_path: Path) -> None:
    found = promptyard("encoders", "--home", tmp_path, "--encoder", tmp_path, exit_code=1)
    assert [each["name"] for each in found["encoders"]] == ["all-MiniLM-L6-v2", "fast"]
    assert found["home_encoder"] is None
    assert found["failures"][str(tmp_path)]["field"] == "encoder"


@pytest.mark.parametrize(
    ("tasks", "problem"), [(["a", "a"], "1 tasks"), (["a", "a", "b"], "one row of b")]
)
def test_rows_that_nothing_can_be_held_out_of_are_refused(
    tmp_path: Path, tasks: list[str], problem: str
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"input": f"text {number}", "task": task} for number, task in enumerate(tasks)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    error = promptyard("encoders", "--data", data, "--home", tmp_path, exit_code=2)["error"]
    assert (error["field"], error["value"]) == (str(data), problem)


def test_a_catalog_that_keeps_its_texts_goes_over_to_another_encoder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in TASKS[:2]:
        promptyard(
            *("register", name, "--data", EXAMPLES / f"{name}.jsonl", "--no-prompt"),
            *("--keep-text", "--home", home, "--encoder", "fast"),
        )
    kept = promptyard("show", TASKS[0], "--row", 0, "--home", home)
    assert kept["input"] in (EXAMPLES / f"{TASKS[0]}.jsonl").read_text()
    published = promptyard("encoders", "use", "all-MiniLM-L6-v2", "--home", home)
    assert published["revision"] == 3
    assert published["report"]["held_out_accuracy"] > 0.95
    [decision] = promptyard("route", "switch the light off", "--top-k", 1, "--home", home)
    assert decision["candidates"][0]["task"] == "home-intent"
    data = tmp_path / "rows.jsonl"
    lines = (EXAMPLES / "home-intent.jsonl").read_text().splitlines()[:30]
    data.write_text(
        "".join(f"{json.dumps({**json.loads(line), 'task': 'home-intent'})}\n" for line in lines)
    )
    report = promptyard("evaluate", "routing", "--data", data, "--cascade", "--home", home)
    assert 0 < report["cascade"]["decided_fast"] <= 1
    assert report["cascade"]["accuracy"] > 0.9


def test_a_cascade_needs_the_texts_and_another_encoder_than_the_fast_one(
    home: Path, labelled: Path
) -> None:
    error = promptyard(
        *("evaluate", "routing", "--data", labelled, "--cascade", "--unknown-as-oos"),
        *("--home", home, "--encoder", "fast"),
        exit_code=2,
    )["error"]
    assert error["field"] == "--cascade"


def test_a_catalog_that_does_not_is_refused(home: Path) -> None:
    error = promptyard("encoders", "use", "all-MiniLM-L6-v2", "--home", home, exit_code=3)["error"]
    assert error["reason"] == "REGISTRATION_REFUSED"
    assert "home-intent" in error["value"]
    assert "--keep-text" in error["remedy"]


def test_a_task_that_keeps_no_embeddings_is_routed_to_and_says_what_is_lost(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    for name, flags in ((TASKS[0], ("--statistics-only",)), (TASKS[1], ())):
        promptyard(
            *("register", name, "--data", EXAMPLES / f"{name}.jsonl", "--no-prompt", *flags),
            *("--home", home, "--encoder", "fast"),
        )
    [decision] = promptyard(
        *("route", "switch the kitchen light off", "--home", home, "--encoder", "fast")
    )
    assert decision["task"] == "home-intent"
    shown = promptyard("show", TASKS[0], "--home", home)
    assert shown["statistics_only"]
    assert any("held out" in each for each in shown["lost"])
    assert "lost" not in promptyard("show", TASKS[1], "--home", home)
