"""Evaluation of decisions and answers with fake models, and the reading of labelled rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.decision import Outcome
from router.errors import InvalidInputError, NoPromptError
from router.interfaces import FloatArray
from router.label_classifier import LabelClassifier
from tests.fakes import FakeEncoder, FakeLanguageModel, make_snapshot, make_task, without_prompt
from trainer.commands import PolicyChange
from trainer.evaluate_answers import AnswerFigures, evaluate_answers
from trainer.evaluate_orders import random_orders
from trainer.evaluate_routing import RoutedText, evaluate_routing
from trainer.evaluate_stream import (
    StreamFiles,
    changes_since_arrival,
    evaluate_stream,
    read_stream,
)
from trainer.evaluation_rows import (
    EvaluationFields,
    LabelledText,
    first_of_each_task,
    match_tasks,
    read_texts,
    task_names,
)
from trainer.tuning_settings import TuningSettings

ROWS = [
    LabelledText(1, "weather today", "weather", "sun"),
    LabelledText(2, "sport news", "sport", "goal"),
    LabelledText(3, "a sport of rain", "weather", "rain"),
    LabelledText(4, "nothing of the kind at all", None),
    LabelledText(5, "weather sport", "sport", "team"),
    LabelledText(6, "Tell a story", "story", "tell A  story"),
]
FIELDS = EvaluationFields("text", "label")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stream_rows(split: str, *labels: str, count: int = 2) -> list[dict[str, object]]:
    return [
        {"text": f"{split} {label} {k}", "label": label, "split": split}
        for label in labels
        for k in range(count)
    ]


# ---- routing


def test_routing_is_measured_before_and_with_rejection() -> None:
    evaluation = evaluate_routing(make_snapshot(), FakeEncoder(), ROWS)
    figures, reject = evaluation.routing, evaluation.reject
    assert figures.rows == 5
    # Row 3 goes to sport. Row 5 fits weather and sport alike, of which weather comes first.
    assert figures.accuracy == pytest.approx(3 / 5)
    assert figures.accuracy_with_rejection == pytest.approx(3 / 5)
    assert figures.macro_accuracy == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert figures.outcomes == {"matched": 4, "ambiguous": 1, "unknown": 0}
    assert figures.per_task["sport"].routed == 2
    assert [(pair.task, pair.taken_for) for pair in figures.confused_pairs] == [
        ("weather", "sport"),
        ("sport", "weather"),
    ]
    # The surest error comes first: "weather sport" scores higher than "a sport of rain".
    assert [error.number for error in figures.worst_errors] == [5, 3]
    assert reject is not None
    assert reject.rows == 1
    assert reject.outcomes == {"matched": 0, "ambiguous": 0, "unknown": 1}
    assert (reject.auroc, reject.fpr_at_95_tpr) == (1.0, 0.0)
    assert (reject.in_scope_rejected, reject.out_of_scope_rejected) == (0.0, 1.0)
    assert evaluation.milliseconds_per_decision.p50 > 0


def test_a_rejected_row_counts_as_wrong_even_where_its_task_scored_best() -> None:
    far = LabelledText(1, " ".join(["weather", *(f"w{k}" for k in range(20))]), "weather")
    figures = evaluate_routing(make_snapshot(), FakeEncoder(), [far]).routing
    assert (figures.accuracy, figures.accuracy_with_rejection) == (1.0, 0.0)


def test_without_out_of_scope_rows_there_are_no_figures_of_rejection() -> None:
    assert evaluate_routing(make_snapshot(), FakeEncoder(), ROWS[:2]).reject is None


def test_cut_texts_are_counted() -> None:
    long = LabelledText(1, "weather " * 300, "weather")
    assert evaluate_routing(make_snapshot(), FakeEncoder(), [long]).routing.truncated == 1


# ---- answers


def as_routed(row: LabelledText, best: str, outcome: Outcome = Outcome.MATCHED) -> RoutedText:
    return RoutedText(row, best, outcome, 1.0, 1.0, 0.5, truncated=False)


def test_answers_are_measured_routed_with_the_right_task_and_without_prompt() -> None:
    # The fake model answers the output that stands in the text, or the first one.
    decisions = [
        as_routed(LabelledText(1, "snow", "weather", "Snow"), "weather"),
        as_routed(LabelledText(2, "snow", "weather", "snow"), "sport"),
        as_routed(LabelledText(3, "rain", "weather", "rain"), "weather", Outcome.UNKNOWN),
        as_routed(LabelledText(4, "hm", "sport", "goal"), "sport"),
        as_routed(LabelledText(5, "tell a tale", "story", "tell A  tale"), "story"),
        as_routed(LabelledText(6, "no task at all", None), "story"),
    ]
    answers = evaluate_answers(
        make_snapshot(), FakeLanguageModel(), decisions, no_vectors(decisions)
    )
    weather = answers.per_task["weather"]
    assert weather.rows == 3
    assert weather.routed == pytest.approx(2 / 3)
    assert weather.routed_with_rejection == pytest.approx(1 / 3)
    assert (weather.oracle, weather.no_prompt) == (1.0, 1.0)
    assert answers.per_task["story"].routed == 1.0
    assert answers.mean.routed == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert answers.over_rows.routed == pytest.approx(4 / 5)
    assert answers.routing_loss == pytest.approx(1 / 9)
    assert answers.mean.rows == answers.over_rows.rows == 5


def no_vectors(decisions: Sequence[RoutedText]) -> FloatArray:
    """Embeddings for tasks without a label classifier, which look at none."""
    return np.zeros((len(decisions), 4), np.float32)


def test_a_label_classifier_decides_with_the_prompt_and_the_prompt_alone_is_scored_too() -> None:
    task = make_task("weather", ("sun", "rain", "snow"))
    rows = np.zeros((3, 5), np.float32)
    rows[1, 0] = 100.0  # an input on the first axis is rain, whatever the base model says
    classified = replace(task, classifier=LabelClassifier(rows, 0.3))
    decisions = [
        as_routed(LabelledText(1, "snow", "weather", "rain"), "weather"),
        as_routed(LabelledText(2, "snow", "weather", "snow"), "weather"),
        as_routed(LabelledText(3, "no task", None), "weather"),
    ]
    vectors = np.eye(4, dtype=np.float32)[:3]
    found = evaluate_answers(
        make_snapshot(tasks=[classified]), FakeLanguageModel(), decisions, vectors
    )
    assert (found.mean.oracle, found.mean.routed, found.mean.prompt_alone) == (1.0, 1.0, 0.5)
    without = evaluate_answers(make_snapshot(tasks=[task]), FakeLanguageModel(), decisions, vectors)
    assert without.mean.oracle == without.mean.prompt_alone == 0.5


def test_the_prompts_are_those_of_the_tasks_and_no_prompt_is_none() -> None:
    model = FakeLanguageModel()
    decisions = [as_routed(LabelledText(1, "snow", "weather", "snow"), "sport")]
    evaluate_answers(make_snapshot(), model, decisions, no_vectors(decisions))
    prompts = [row.prompt for batch in model.batches for row in batch]
    # make_snapshot fills a task's prompt with its number; weather is 0 and sport 1.
    assert sorted(-1.0 if p is None else float(p[0, 0]) for p in prompts) == [-1.0, 0.0, 1.0]


def test_free_text_is_cut_at_the_limit() -> None:
    decisions = [as_routed(LabelledText(1, "one two three", "story", "one two three"), "story")]
    short = evaluate_answers(
        make_snapshot(), FakeLanguageModel(), decisions, no_vectors(decisions), 2
    )
    assert short.mean.oracle == 0.0
    whole = evaluate_answers(
        make_snapshot(), FakeLanguageModel(), decisions, no_vectors(decisions), 3
    )
    assert whole.mean.oracle == 1.0


def test_a_row_that_is_routed_to_a_task_without_prompt_has_no_answer() -> None:
    tasks = [make_task("weather", ("sun", "rain")), without_prompt(make_task("sport", ("sun",)))]
    decisions = [as_routed(LabelledText(1, "sun", "weather", "sun"), "sport")]
    answers = evaluate_answers(
        make_snapshot(tasks=tasks), FakeLanguageModel(), decisions, no_vectors(decisions)
    )
    assert (answers.mean.routed, answers.mean.oracle) == (0.0, 1.0)


def test_a_row_whose_own_task_has_no_prompt_is_an_error() -> None:
    tasks = [without_prompt(make_task("sport", ("sun",)))]
    decisions = [as_routed(LabelledText(1, "sun", "sport", "sun"), "sport")]
    with pytest.raises(NoPromptError, match="sport"):
        evaluate_answers(
            make_snapshot(tasks=tasks), FakeLanguageModel(), decisions, no_vectors(decisions)
        )


# ---- rows


def test_rows_are_read_with_their_numbers_and_scope(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        [
            {"text": "a", "label": 3, "output": "yes"},
            {"text": "b", "label": "oos"},
            {"text": "c", "label": "two words", "output": True},
        ],
    )
    rows = read_texts(path, EvaluationFields("text", "label", "output"))
    assert [(row.number, row.task, row.output) for row in rows] == [
        (1, "3", "yes"),
        (2, None, ""),
        (3, "two words", "true"),
    ]


def test_a_missing_field_names_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "b"}])
    with pytest.raises(InvalidInputError, match="row 2, field 'label'"):
        read_texts(path, FIELDS)


def test_a_task_that_is_not_there_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    rows = [LabelledText(1, "a", "x"), LabelledText(8, "b", "y")]
    with pytest.raises(InvalidInputError, match=r"rows: row 8: task 'y'.*--unknown-as-oos"):
        match_tasks(Path("rows"), rows, ["x"], unknown_as_oos=False)
    matched = match_tasks(Path("rows"), rows, ["x"], unknown_as_oos=True)
    assert [row.task for row in matched] == ["x", None]


def test_the_first_rows_of_each_task_are_kept() -> None:
    kept = first_of_each_task(ROWS, 1)
    assert [row.number for row in kept] == [1, 2, 4, 6]
    assert first_of_each_task(ROWS, None) == ROWS


def test_labels_become_names() -> None:
    assert task_names(["Card lost?", "a_b", "日本 x", "3"]) == {
        "Card lost?": "Card-lost",
        "a_b": "a_b",
        "日本 x": "x",
        "3": "3",
    }


@pytest.mark.parametrize("labels", [["a b", "a-b"], ["?!"], ["x" * 101]])
def test_labels_that_cannot_become_different_names_are_an_error(labels: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="task name"):
        task_names(labels)


# ---- streams


def test_one_file_is_split_by_its_field(tmp_path: Path) -> None:
    rows = [
        *stream_rows("train", "b", "a", "oos"),
        *stream_rows("val", "a"),
        *stream_rows("test", "a", "b", "oos", count=1),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    stream = read_stream(StreamFiles(path, path, FIELDS), with_prompt=False)
    assert stream.order == ("a", "b")
    assert [row.split for row in stream.train["a"]] == ["train", "train", "val", "val"]
    assert {row.split for row in stream.test} == {"test"}
    assert [row.task for row in stream.test] == ["a", "b", None]
    assert stream.out_of_scope_dropped == 2
    assert stream.test_texts_in_train == 0


def test_one_file_without_test_rows_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", stream_rows("train", "a", "b"))
    with pytest.raises(InvalidInputError, match="no row says 'test'"):
        read_stream(StreamFiles(path, path, FIELDS), with_prompt=False)


def test_test_rows_of_a_training_file_are_never_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*stream_rows("train", "a"), *stream_rows("test", "a")])
    test = write(tmp_path / "test.jsonl", [{"text": "train a 0", "label": "a"}])
    stream = read_stream(StreamFiles(train, test, FIELDS), with_prompt=False)
    assert {row.split for row in stream.train["a"]} == {"train"}
    assert stream.test_texts_in_train == 1


def test_every_text_of_a_stream_is_embedded_once(tmp_path: Path) -> None:
    rows = [
        *stream_rows("train", "a", "b", "c", count=300),  # more than are embedded at a time
        *stream_rows("test", "a", "b", "c", count=3),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    stream = read_stream(StreamFiles(path, path, FIELDS), with_prompt=False)
    encoder = FakeEncoder()
    change = PolicyChange(head="nearest-mean")

    evaluate_stream(stream, tmp_path, encoder, None, TuningSettings(), change)

    embedded = Counter(text for batch in encoder.batches for text in batch)
    assert {row["text"]: embedded[str(row["text"])] for row in rows} == dict.fromkeys(
        (row["text"] for row in rows), 1
    )


@pytest.mark.parametrize("content", ['["b", "a b", "c"]', "b\r\na b\n\nc\n"])
def test_tasks_arrive_in_the_order_of_the_file(tmp_path: Path, content: str) -> None:
    rows = [*stream_rows("train", "a b", "b", "c"), *stream_rows("test", "c")]
    path = write(tmp_path / "rows.jsonl", rows)
    order = tmp_path / "order"
    order.write_text(content, encoding="utf-8", newline="")
    stream = read_stream(StreamFiles(path, path, FIELDS, order=order), with_prompt=False)
    assert stream.order == ("b", "a-b", "c")
    assert stream.labels["a-b"] == "a b"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a\na\nb", "a named twice"),
        ("a\nb\nz", "z not in the training rows"),
        ("a", "b left out"),
        ("[1,", "JSON"),
    ],
)
def test_an_order_that_is_not_one_of_the_tasks_is_an_error(
    tmp_path: Path, content: str, problem: str
) -> None:
    rows = [*stream_rows("train", "a", "b"), *stream_rows("test", "a")]
    path = write(tmp_path / "rows.jsonl", rows)
    order = tmp_path / "order"
    order.write_text(content)
    with pytest.raises(InvalidInputError, match=problem):
        read_stream(StreamFiles(path, path, FIELDS, order=order), with_prompt=False)


def test_a_task_with_too_few_rows_is_named(tmp_path: Path) -> None:
    rows = [*stream_rows("train", "a"), *stream_rows("train", "b", count=1)]
    path = write(tmp_path / "rows.jsonl", [*rows, *stream_rows("test", "a")])
    with pytest.raises(InvalidInputError, match="task 'b': 1 different"):
        read_stream(StreamFiles(path, path, FIELDS), with_prompt=False)
    fields = EvaluationFields("text", "label", "split")
    with pytest.raises(InvalidInputError, match=r"task 'a': 2 different.*at least 8"):
        read_stream(StreamFiles(path, path, fields), with_prompt=True)


def test_test_rows_of_other_tasks_are_an_error_unless_they_count_as_out_of_scope(
    tmp_path: Path,
) -> None:
    rows = [*stream_rows("train", "a"), *stream_rows("test", "a", "z", count=1)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InvalidInputError, match="row 4"):
        read_stream(StreamFiles(path, path, FIELDS), with_prompt=False)
    files = StreamFiles(path, path, FIELDS, unknown_as_oos=True)
    assert [row.task for row in read_stream(files, with_prompt=False).test] == ["a", None]


def test_random_orders_differ_and_are_the_same_on_every_run() -> None:
    orders = random_orders("abcd", 24)
    assert len(set(orders)) == 24
    assert {tuple(sorted(order)) for order in orders} == {tuple("abcd")}
    assert random_orders("dcba", 5) == orders[:5]
    assert len(random_orders([f"task-{n}" for n in range(150)], 100)) == 100


def test_more_orders_than_there_are_are_refused() -> None:
    assert random_orders("a", 1) == [("a",)]
    with pytest.raises(InvalidInputError, match="--orders: 7; 3 tasks have 6 orders"):
        random_orders("abc", 7)


def test_a_task_s_answers_are_scored_by_its_metric_and_rows_by_being_right() -> None:
    # The fake model writes the text's words: half of them are in the output.
    decisions = [as_routed(LabelledText(1, "one two", "story", "one three"), "story")]
    answers = evaluate_answers(
        make_snapshot(), FakeLanguageModel(), decisions, no_vectors(decisions), metric="rouge-l"
    )
    assert answers.per_task["story"].metric == "rouge-l"
    assert answers.per_task["story"].oracle == answers.mean.oracle == pytest.approx(0.5)
    assert answers.over_rows.oracle == 0.0


def test_answers_change_from_their_arrival_to_the_end_and_the_last_task_has_no_time_to() -> None:
    def figures(routed: float, oracle: float) -> AnswerFigures:
        return AnswerFigures(10, routed, routed, oracle, oracle, 0.0)

    then = {"a": figures(0.9, 0.9), "b": figures(0.8, 0.85), "last": figures(0.1, 0.1)}
    end = {"a": figures(0.7, 0.9), "b": figures(0.9, 0.85), "last": figures(0.0, 0.5)}
    found = changes_since_arrival(("a", "untested", "b", "last"), then, end)
    assert found.routed_transfer == pytest.approx((-0.2 + 0.1) / 2)
    assert found.oracle_transfer == 0.0
    assert found.on_arrival == then
    alone = changes_since_arrival(("last",), {"last": then["last"]}, {"last": end["last"]})
    assert (alone.routed_transfer, alone.oracle_transfer) == (0.0, 0.0)
