"""`promptyard evaluate` on small files, with the real encoder and small real base models."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from router.bootstrap import load_encoder
from router.catalog import CatalogReader
from router.interfaces import Encoder
from router.tasks import TaskKey
from tests.unit.small_models import save_small_model
from trainer.cli import app
from trainer.data import Fields, read_labelled
from trainer.evaluate_stream import StreamEvaluation, StreamFiles, evaluate_stream, read_stream
from trainer.evaluation_rows import EvaluationFields
from trainer.tuning_settings import TuningSettings

TRAIN = {
    "weather": [
        "will it rain in oslo tomorrow",
        "how hot does it get in cairo in july",
        "is there a storm warning for the coast",
        "do I need an umbrella this afternoon",
        "what is the temperature outside",
        "when does the sun set today",
        "how much snow fell in the alps",
        "is it windy on the beach right now",
        "will the fog clear before noon",
        "what is the forecast for the weekend",
    ],
    "banking": [
        "my card was swallowed by the cash machine",
        "please transfer fifty euros to my savings",
        "why was I charged a fee on my account",
        "how do I raise my overdraft limit",
        "block my credit card, I lost it",
        "what is the balance of my checking account",
        "a payment that I did not make was booked",
        "when is my mortgage rate due",
        "open a joint account for my wife and me",
        "the direct debit was returned, why",
    ],
    "cooking": [
        "how long do I boil a soft egg",
        "what can replace butter in a cake",
        "give me a recipe for lentil soup",
        "at which heat do I roast a chicken",
        "how do I keep rice from sticking",
        "which spices go into a curry",
        "can I freeze cooked pasta",
        "how thin should I slice the onions",
        "my bread does not rise, what is wrong",
        "how do I make mayonnaise at home",
    ],
}
TEST = {
    "weather": ["will it be sunny in rome on friday", "how cold is it in the mountains tonight"],
    "banking": ["I want to cancel a transfer from my account", "my debit card does not work"],
    "cooking": ["how do I bake a potato in the oven", "what goes into a tomato soup"],
}
OUT_OF_SCOPE = ["who wrote the novel moby dick", "translate good morning into finnish"]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder()


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model("bart", tmp_path_factory.mktemp("models") / "small-bart")


def rows(texts: dict[str, list[str]], **fields: str) -> list[dict[str, str]]:
    return [
        # The output is a matter of form: long or short.
        {"text": text, "label": label, "output": "long" if len(text) > 32 else "short", **fields}
        for label, of_label in texts.items()
        for text in of_label
    ]


def write(path: Path, content: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def promptyard(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["routing", "--data", "none.jsonl"],
        ["answers", "--data", "none.jsonl"],
        ["compare", "1", "2", "--data", "none.jsonl"],
        ["stream", "--train", "none.jsonl", "--test", "none.jsonl"],
    ],
    ids=lambda command: command[0],
)
def test_a_report_that_cannot_be_written_is_told_before_the_work_is_done(
    command: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "report", Path("/proc/report")):
        result = CliRunner().invoke(app, ["evaluate", *command, "--report", str(folder)])
        assert result.exit_code == 1
        assert "STORAGE_FAILED" in result.stderr
        assert f"report folder {folder}" in result.stderr.replace("\n", "")


def document(*arguments: object, exit_code: int = 0) -> Any:
    """What a program gets: one JSON document on stdout; progress goes to stderr."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training and test rows in one file, told apart by `split`, as benchmarks come."""
    return write(
        tmp_path_factory.mktemp("data") / "rows.jsonl",
        [
            *rows(TRAIN, split="train"),
            *rows({"weather": [TRAIN["weather"][0]]}, split="val"),
            *rows({"oos": ["what is the meaning of life"]}, split="train"),
            *rows({**TEST, "oos": OUT_OF_SCOPE}, split="test"),
        ],
    )


def test_a_stream_of_tasks_is_registered_and_scored(one_file: Path, tmp_path: Path) -> None:
    order = tmp_path / "order.txt"
    order.write_text("cooking\nweather\nbanking\n")
    folder = tmp_path / "report"
    output = promptyard(
        *("evaluate", "stream", "--train", one_file, "--test", one_file, "--no-prompt"),
        *("--order", order, "--report", folder),
    )
    assert "routing accuracy" in output

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    routing, reject = report["routing"], report["reject"]
    assert report["order"] == ["cooking", "weather", "banking"]
    assert report["rows"] == {
        "train": 30,
        "train_out_of_scope_dropped": 1,
        "train_duplicates_dropped": 1,
        "test_in_scope": 6,
        "test_out_of_scope": 2,
        "test_texts_in_train": 0,
    }
    assert routing["accuracy"] == routing["macro_accuracy"] == 1.0
    assert {task: figures["rows"] for task, figures in routing["per_task"].items()} == {
        "banking": 2,
        "cooking": 2,
        "weather": 2,
    }
    assert routing["matrix"] == [[1.0, None, None], [1.0, 1.0, None], [1.0, 1.0, 1.0]]
    assert routing["accuracy_after_each"] == [1.0, 1.0, 1.0]
    assert routing["forgetting"] == routing["backward_transfer"] == 0.0
    assert routing["forward_transfer"] == 0.0
    # The first task arrives in an empty catalog.
    first, *others = routing["unknown_before_arrival"]
    assert first is None
    assert all(0 <= share <= 1 for share in others)
    assert 0 <= routing["accuracy_with_rejection"] <= 1
    assert 0 <= reject["in_scope_rejected"] <= 1
    assert 0 <= reject["out_of_scope_rejected"] <= 1
    assert 0.5 <= reject["auroc"] <= 1
    assert 0 <= reject["fpr_at_95_tpr"] <= 1
    assert routing["calibration"]["rows"] == sum(b["rows"] for b in routing["calibration"]["bins"])
    assert routing["calibration"]["rows"] == 6
    assert 0 <= routing["calibration"]["expected_calibration_error"] <= 1
    assert "answers" not in report
    for arrival in report["registrations"]:
        assert arrival["seconds"] > 0
        # A row is 1152 numbers of two bytes.
        assert arrival["bytes"] > 10 * 1152 * 2
        assert arrival["head_bytes"] > 0

    with (folder / "decisions.csv").open(encoding="utf-8", newline="") as file:
        decisions = list(csv.DictReader(file))
    assert [row["row"] for row in decisions] == [str(number) for number in range(33, 41)]
    assert [row["true_task"] for row in decisions[-3:]] == ["cooking", "", ""]
    assert "text" not in decisions[0]
    assert (folder / "report.html").read_text(encoding="utf-8").count("data:image/png") == 7
    assert (folder / "report.md").is_file()


def test_a_stream_in_random_orders_ends_with_the_same_head(one_file: Path, tmp_path: Path) -> None:
    arguments = (
        *("evaluate", "stream", "--train", one_file, "--test", one_file, "--no-prompt"),
        *("--orders", 3),
    )
    report = document(*arguments, "--report", tmp_path / "report")
    orders, over = report["orders"], report["over_orders"]
    assert len({tuple(each["order"]) for each in orders}) == 3
    assert all(sorted(each["order"]) == sorted(TRAIN) for each in orders)
    assert report["order"] == orders[0]["order"]
    assert over["ends_alike"] is True
    assert len({each["head_sha256"] for each in orders}) == 1
    assert {each["accuracy"] for each in orders} == {report["routing"]["accuracy"]}
    means = [each["mean_accuracy"] for each in orders]
    assert over["mean_accuracy"]["mean"] == pytest.approx(sum(means) / 3)
    assert over["mean_accuracy"]["least"] == min(means)
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Accuracy over arrivals, all orders" in page


def test_orders_are_refused_with_prompts_or_with_an_order(one_file: Path, tmp_path: Path) -> None:
    order = tmp_path / "order.txt"
    order.write_text("cooking\nweather\nbanking\n")
    arguments = ("evaluate", "stream", "--train", one_file, "--test", one_file, "--orders", 2)
    for more in ((), ("--no-prompt", "--order", order), ("--no-prompt", "--orders", 7)):
        assert document(*arguments, *more, exit_code=2)["error"]["field"] == "--orders"


def run_stream(tmp_path: Path, name: str, encoder: Encoder, test: list[str]) -> StreamEvaluation:
    folder = tmp_path / name
    folder.mkdir()
    train = write(folder / "train.jsonl", rows(TRAIN))
    files = StreamFiles(
        train,
        write(folder / "test.jsonl", rows({**TEST, "weather": test})),
        EvaluationFields("text", "label"),
    )
    stream = read_stream(files, with_prompt=False)
    return evaluate_stream(stream, folder, encoder, None, TuningSettings())


def test_test_rows_are_never_part_of_a_registration(encoder: Encoder, tmp_path: Path) -> None:
    """What is registered is what the training rows alone give, to the bit."""
    other_texts = [f"a test text of the weather, number {k}" for k in range(8)]
    first = run_stream(tmp_path, "a", encoder, TEST["weather"])
    second = run_stream(tmp_path, "b", encoder, other_texts)
    assert (first.routing.rows, second.routing.rows) == (6, 12)
    heads = set()
    for folder in (tmp_path / "a", tmp_path / "b"):
        with CatalogReader(folder / "home") as catalog:
            assert catalog.newest_revision() == len(TRAIN)
            heads.add(catalog.revision(len(TRAIN)).head_sha256)
            for task, texts in TRAIN.items():
                alone = write(tmp_path / "alone.jsonl", rows({task: texts}))
                expected = read_labelled(alone, Fields("text", "output"), with_output=False)
                # What was registered holds no outputs; neither does what it is compared with.
                assert catalog.record(TaskKey(task, 1)).data.sha256 == expected.sha256
    assert len(heads) == 1


def test_a_stream_with_prompts_measures_answers(
    one_file: Path, base_model: Path, tmp_path: Path
) -> None:
    report = document(
        *("evaluate", "stream", "--train", one_file, "--test", one_file, "--steps", 2),
        *("--base-model", base_model, "--report", tmp_path),
    )
    answers = report["answers"]
    assert set(answers["per_task"]) == set(TRAIN)
    assert answers["mean"]["rows"] == 6
    for share in ("routed", "routed_with_rejection", "oracle", "no_prompt"):
        assert 0 <= answers["mean"][share] <= 1
    # Every row was routed to its own task, so that its own prompt answered it.
    assert answers["mean"]["routed"] == answers["mean"]["oracle"]
    assert answers["routing_loss"] == 0.0
    over_time = report["answers_over_time"]
    assert set(over_time["on_arrival"]) == set(TRAIN)
    for task, then in over_time["on_arrival"].items():
        assert then["oracle"] == answers["per_task"][task]["oracle"]
        assert then["rows"] == len(TEST[task])
    assert over_time["routed_transfer"] == over_time["oracle_transfer"] == 0.0
    assert set(report["registrations"][0]["prompt_scores"]) >= {"prompt", "majority"}
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, base_model: Path) -> Path:
    """A catalog with two tasks that have prompts."""
    folder = tmp_path_factory.mktemp("home")
    for task in ("weather", "banking"):
        data = write(folder / f"{task}.jsonl", rows({task: TRAIN[task]}))
        promptyard(
            *("register", task, "--data", data, "--input-field", "text", "--home", folder),
            *("--base-model", base_model, "--steps", 2, "--force", "a test"),
        )
    return folder


def test_routing_is_measured_against_the_live_catalog(home: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "held-out.jsonl", rows({**TEST, "oos": OUT_OF_SCOPE}))
    arguments = (
        *("evaluate", "routing", "--data", data, "--home", home),
        *("--input-field", "text", "--task-field", "label"),
    )
    refused = document(*arguments, exit_code=2)["error"]
    assert refused["field"].endswith("held-out.jsonl: row 5")
    assert "--unknown-as-oos" in refused["remedy"]

    report = document(*arguments, "--unknown-as-oos", "--report", tmp_path / "r", "--with-text")
    assert report["catalog_revision"] == 2
    assert report["tasks"] == ["banking", "weather"]
    assert report["routing"]["accuracy"] == 1.0
    assert report["routing"]["rows"] == 4
    assert report["reject"]["rows"] == 4
    assert report["timing"]["milliseconds_per_decision"]["p50"] > 0
    assert report["coverage_risk"]["coverage"][-1] == 1.0
    assert set(report["task_map"]["places"]) == {"banking", "weather"}
    # The revision before knew the weather only.
    before = document(*arguments, "--unknown-as-oos", "--revision", 1)
    assert (before["catalog_revision"], before["tasks"]) == (1, ["weather"])
    assert before["routing"]["calibration"] is None
    error = document(*arguments, "--revision", 3, exit_code=2)["error"]
    assert (error["field"], error["remedy"]) == ("--revision", "give 1 to 2")
    again = document(*arguments, "--unknown-as-oos")
    assert again["routing"] == report["routing"]
    assert again["reject"] == report["reject"]
    assert TEST["cooking"][0] in (tmp_path / "r" / "decisions.csv").read_text(encoding="utf-8")


def test_answers_are_measured_against_the_live_catalog(
    home: Path, base_model: Path, tmp_path: Path
) -> None:
    test = {task: TEST[task] for task in ("weather", "banking")}
    data = write(tmp_path / "held-out.jsonl", rows({**test, "oos": OUT_OF_SCOPE}))
    report = document(
        *("evaluate", "answers", "--data", data, "--home", home, "--base-model", base_model),
        *("--input-field", "text", "--task-field", "label"),
    )
    answers = report["answers"]
    assert answers["over_rows"]["rows"] == 4
    assert answers["mean"]["routed"] == answers["mean"]["oracle"]
    assert set(answers["per_task"]) == {"weather", "banking"}


def test_two_revisions_are_compared_on_the_same_rows(home: Path, tmp_path: Path) -> None:
    content = rows({**TEST, "oos": OUT_OF_SCOPE})
    # Revision 1 knows the weather only; cooking is a task of neither; the last row has no label.
    data = write(tmp_path / "traffic.jsonl", [*content, {"text": TEST["banking"][0]}])
    flags = ("--data", data, "--home", home, "--input-field", "text", "--task-field", "label")
    folder = tmp_path / "report"
    report = document("evaluate", "compare", 1, 2, *flags, "--report", folder)
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report
    assert report["rows"] == 9
    assert report["unknown_labels"] == {"cooking": 2}
    assert report["out_of_scope"]["rows"] == 2
    labelled = report["labelled"]
    assert labelled["rows"] == 4
    assert labelled["accuracy_a"] < labelled["accuracy_b"]
    assert labelled["mcnemar"]["right_only_at_b"] >= 1
    assert sum(report["kinds"].values()) == len(report["changed"]) >= 1
    with (folder / "changed.csv").open(encoding="utf-8", newline="") as file:
        changed = list(csv.DictReader(file))
    assert [int(row["row"]) for row in changed] == [row["number"] for row in report["changed"]]
    banking = next(row for row in changed if row["label"] == "banking")
    assert banking["task_b"] == "banking" != banking["task_a"]

    interval = labelled["difference_interval"]
    assert interval["low"] <= labelled["difference"] <= interval["high"]

    # No text is written or shown unless that was asked for.
    texts = [row["text"] for row in content]
    quiet = promptyard("evaluate", "compare", 1, 2, *flags, "--report", folder)
    assert "accuracy with rejection" in quiet
    written = "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    assert not any(text in written or text[:9] in quiet for text in texts)
    arguments = ("evaluate", "compare", 1, 2, *flags, "--with-text", "--report", folder)
    changed_texts = {change["text"] for change in document(*arguments)["changed"]}
    assert changed_texts <= {*texts, TEST["banking"][0]}
    assert all(text in (folder / "changed.csv").read_text("utf-8") for text in changed_texts)
    assert "Nothing changed" in promptyard("evaluate", "compare", 2, 2, *flags)
    refused = document("evaluate", "compare", 1, 99, *flags, exit_code=2)["error"]
    assert (refused["field"], refused["value"]) == ("REV_B", "99")
    assert refused["remedy"] == "give a catalog revision from 1 to 2"


def test_a_home_without_a_catalog_is_a_clear_error(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [{"input": "a", "task": "b"}])
    error = document("evaluate", "routing", "--data", data, "--home", tmp_path, exit_code=1)[
        "error"
    ]
    assert error["reason"] == "CATALOG_UNAVAILABLE"
