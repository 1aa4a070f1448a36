"""Reports: every format, whatever the texts hold, and pictures of few and of many tasks."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from router.decision import Outcome
from router.errors import StorageError
from trainer import plots
from trainer.evaluate_routing import (
    RoutedText,
    RoutingEvaluation,
    coverage_risk,
    reject_figures,
    routing_figures,
)
from trainer.evaluation_rows import LabelledText
from trainer.metrics import Percentiles, reliability
from trainer.report import Picture, Report, Table, to_html, to_json, to_markdown, write_report
from trainer.routing_report import routing_report
from trainer.task_map import TaskMap

AWKWARD = 'a <script> & a "quote", a | pipe,\na *star* and [bold]'


def routed(number: int, text: str, task: str | None, best: str, **changes: object) -> RoutedText:
    values = {
        "outcome": Outcome.MATCHED,
        "score": 3.25,
        "margin": 1.5,
        "threshold": 2.0,
        "truncated": False,
        "probability": 0.9,
    } | changes
    return RoutedText(LabelledText(number, text, task), best, **values)  # type: ignore[arg-type]


DECISIONS = (
    routed(1, "it rains", "weather", "weather"),
    routed(2, AWKWARD, "sport", "weather", margin=math.inf),
    routed(4, "who knows", None, "sport", outcome=Outcome.UNKNOWN, score=1.0),
)


@pytest.fixture(scope="module")
def report() -> Report:
    tasks = ("sport", "weather")
    evaluation = RoutingEvaluation(
        catalog_revision=7,
        head="lda",
        encoder="an encoder",
        tasks=tasks,
        routing=routing_figures(DECISIONS, tasks),
        reject=reject_figures(DECISIONS),
        coverage_risk=coverage_risk(DECISIONS),
        places=TaskMap({"sport": (-1.0, 0.0), "weather": (1.0, 0.0)}, 1.0),
        milliseconds_per_decision=Percentiles(1.0, 2.0, 3.0, 4.0),
        decisions=DECISIONS,
    )
    return routing_report(evaluation, "rows <b>.jsonl")


def test_json_holds_the_figures_and_null_for_what_is_not_finite(report: Report) -> None:
    document = json.loads(to_json(report.document))
    routing = document["routing"]
    assert routing["accuracy"] == 0.5
    assert routing["macro_accuracy"] == 0.5
    assert routing["per_task"]["sport"]["accuracy"] == 0.0
    assert routing["per_task"]["sport"]["precision"] is None
    assert routing["worst_errors"][0]["margin"] is None
    assert routing["outcomes"] == {"matched": 2, "ambiguous": 0, "unknown": 0}
    assert document["reject"]["auroc"] == 1.0
    assert document["reject"]["out_of_scope_rejected"] == 1.0
    # One of the two in-scope rows is right; of the accepted rows they are all.
    assert routing["calibration"]["expected_calibration_error"] == pytest.approx(0.4)
    assert document["reject"]["accepted_calibration"]["rows"] == 2
    # The surest two rows are even; then the wrong one comes second of three.
    assert document["coverage_risk"]["coverage"] == pytest.approx([1 / 3, 2 / 3, 1])
    assert document["coverage_risk"]["risk"] == pytest.approx([0, 1 / 2, 2 / 3])
    assert document["coverage_risk"]["area"] == pytest.approx((0 + 1 / 2 + 2 / 3) / 3)
    low, high = (routing["macro_accuracy_interval"][end] for end in ("low", "high"))
    assert low < 0.5 < high
    assert document["timing"]["milliseconds_per_decision"]["p99"] == 3.0


def test_html_is_one_page_in_which_every_text_is_escaped(report: Report) -> None:
    page = to_html(report)
    assert "<script" not in page
    assert "rows &lt;b&gt;.jsonl" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []
    assert page.count("data:image/png;base64,") == len(report.pictures) == 5
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(page)
    assert opened == []


def test_markdown_keeps_its_tables_whatever_the_cells_hold() -> None:
    table = Table("T", ("input", "rows"), [[AWKWARD, "3"], ["x", "-"]])
    text = to_markdown(Report("title", ("a fact",), {}, (table,), (), ()))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in lines] == [3, 3, 3, 3]
    assert lines[1] == "| --- | ---: |"
    assert r"a \| pipe, a \*star\* and \[bold]" in lines[2]


def test_every_decision_is_in_the_csv_and_texts_only_on_request(
    report: Report, tmp_path: Path
) -> None:
    for with_text in (False, True):
        folder = tmp_path / str(with_text)
        write_report(folder, report, with_text=with_text)
        content = (folder / "decisions.csv").read_text(encoding="utf-8")
        assert ("a *star*" in content) is with_text
        rows = list(csv.DictReader(content.splitlines(keepends=True)))
        assert [row["row"] for row in rows] == ["1", "2", "4"]
        assert [row["true_task"] for row in rows] == ["weather", "sport", ""]
        assert [row["decision"] for row in rows] == ["weather", "weather", ""]
        assert [row["best_task"] for row in rows] == ["weather", "weather", "sport"]
        assert [row["outcome"] for row in rows] == ["matched", "matched", "unknown"]
        assert (rows[0]["score"], rows[0]["threshold"]) == ("3.25", "2")
    assert rows[1]["text"] == AWKWARD


def test_the_same_evaluation_gives_the_same_files(report: Report, tmp_path: Path) -> None:
    first = write_report(tmp_path / "a", report)
    second = write_report(tmp_path / "b", report)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_folder_that_cannot_be_written_is_a_clear_error(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="--report"):
        write_report(tmp_path / "file", report)


@pytest.mark.parametrize("tasks", [1, 2, 15, 40, 150])
def test_pictures_can_be_drawn_of_few_and_of_many_tasks(tasks: int) -> None:
    names = [f"task-{'x' * 30}-{n}" for n in range(tasks)]
    matrix = np.tril(np.full((tasks, tasks), 0.9)) + np.triu(np.full((tasks, tasks), np.nan), 1)
    confusion = np.diag(np.full(tasks, 30))
    for picture in (
        plots.matrix_picture(matrix, names),
        plots.confusion_picture(confusion, names),
        plots.arrivals_picture([1.0] * tasks, [0.95] * tasks),
        plots.map_picture(
            {name: (n % 7, n // 7) for n, name in enumerate(names)},
            {name: 1 - n / 200 for n, name in enumerate(names)},
            [(names[0], names[-1], 3), (names[0], "elsewhere", 1)],
        ),
    ):
        assert picture.startswith(b"\x89PNG")


def test_pictures_can_be_drawn_of_next_to_nothing() -> None:
    nothing = np.zeros(0)
    for picture in (
        plots.matrix_picture(np.array([[np.nan]]), ["a"]),
        plots.confusion_picture(np.zeros((2, 2), np.int64), ["a", "b"]),
        plots.score_picture(np.array([1.0]), nothing),
        plots.score_picture(np.array([1.0, 1.0]), np.array([1.0])),
        plots.risk_picture(np.array([1.0]), np.array([0.0])),
        plots.map_picture({"a": (0.0, 0.0)}, {"a": math.nan}, []),
        plots.reliability_picture(reliability([1.0], np.array([False])).bins),
    ):
        assert picture.startswith(b"\x89PNG")


def test_equal_figures_give_equal_pictures() -> None:
    draw = [plots.risk_picture(np.array([0.5, 1.0]), np.array([0.0, 0.2])) for _ in range(2)]
    assert draw[0] == draw[1]
    assert Picture("a", "b", draw[0]) == Picture("a", "b", draw[1])
