"""How answers are scored, and which metric a task gets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from sklearn.metrics import f1_score

from router.errors import InvalidInputError
from trainer.answer_metrics import (
    METRICS,
    check_metric,
    default_metric,
    join_labels,
    recorded_metric,
    score,
    score_rows,
)
from trainer.data import read_labelled


def test_accuracy_and_exact_match_ignore_case_and_white_space() -> None:
    answers, expected = ["Yes", "n o", "maybe"], ["yes", "No", "no"]
    assert score("accuracy", answers, expected) == pytest.approx(2 / 3)
    assert score("exact-match", answers, expected) == pytest.approx(2 / 3)


def test_macro_f1_is_that_of_scikit_learn_over_the_labels_that_occur() -> None:
    expected = ["a", "a", "a", "b", "b", "c, d"]
    answers = ["a", "b", "a", "b", "x", "c, d"]
    wanted = f1_score(expected, answers, average="macro", labels=["a", "b", "c, d"])
    assert score("macro-f1", answers, expected) == pytest.approx(wanted)


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # Lin 2004, section 3: "police killed the gunman" against two candidates, with equal weights.
    reference = "police killed the gunman"
    assert score("rouge-l", ["police kill the gunman"], [reference]) == pytest.approx(3 / 4)
    assert score("rouge-l", ["the gunman kill police"], [reference]) == pytest.approx(2 / 4)
    assert score("rouge-l", ["Police, killed the gunman!"], [reference]) == 1.0
    assert score("rouge-l", [""], [reference]) == 0.0


def test_label_f1_compares_sets() -> None:
    scores = score_rows("label-f1", ["b, A", "a, c, d", "", "x"], ["a, b", "a", "a", "a"])
    assert scores == pytest.approx([1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_1_for_the_right_answers_and_nan_for_none(metric: str) -> None:
    known = recorded_metric(metric)
    assert known == metric
    assert score(known, ["a", "b"], ["a", "b"]) == 1.0
    assert math.isnan(score(known, [], []))


def test_the_default_metric_suits_the_outputs() -> None:
    short, long = (
        ["in Paris", "no"],
        ["a story of more than five words", "and then one more such story"],
    )
    assert default_metric(("no", "yes"), ["no", "yes"], multi_label=False) == "accuracy"
    assert default_metric(None, short, multi_label=False) == "exact-match"
    assert default_metric(None, long, multi_label=False) == "rouge-l"
    assert default_metric(("a", "a, b"), ["a", "a, b"], multi_label=True) == "label-f1"


@pytest.mark.parametrize(
    ("metric", "labels", "multi_label"),
    [
        ("bleu", None, False),
        ("label-f1", ("a", "b"), False),
        ("macro-f1", None, False),
        ("macro-f1", ("a", "b"), True),
    ],
)
def test_a_metric_that_does_not_suit_is_refused(
    metric: str, labels: tuple[str, ...] | None, multi_label: bool
) -> None:
    with pytest.raises(InvalidInputError, match=f"metric.*{metric}"):
        check_metric("weather", metric, labels, multi_label=multi_label)


def test_a_record_of_an_older_version_still_names_its_metric() -> None:
    assert recorded_metric("exact match") == "exact-match"


def write(path: Path, *outputs: object) -> Path:
    rows = [{"input": f"text {n}", "output": output} for n, output in enumerate(outputs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lists_of_labels_become_one_text_in_any_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl", ["late", "damaged"], ["damaged", "late", "late"], ["late"]
    )
    file = read_labelled(path)
    assert file.multi_label
    outputs = {example.input: example.output for example in file.examples}
    assert outputs == {"text 0": "damaged, late", "text 1": "damaged, late", "text 2": "late"}
    assert join_labels(["late", "damaged"]) == "damaged, late"


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ((["a"], "a"), "a list in row 1, a text in row 2; give lists in all rows"),
        ((["a"], []), "row 2.*an empty list; give a label"),
        ((["a"], ["a, b"]), "row 2.*rename labels with ','"),
        ((["a"], [["b"]]), "row 2.*list; give a text"),
        ((["a"], [" "]), "row 2.*empty"),
    ],
)
def test_bad_lists_are_refused_with_their_row(
    tmp_path: Path, outputs: tuple[object, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_labelled(write(tmp_path / "rows.jsonl", *outputs))
