"""Passages that come with an input: placed by the template, tuned with, evaluated, served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.backends.language_model import load_language_model
from router.decision import Outcome
from router.errors import InvalidInputError
from router.interfaces import PromptedInput
from router.tasks import TaskRecord
from router.templates import FilledTemplate, check_template, fill
from tests.catalogs import new_workshop, texts_of
from tests.fakes import (
    FakeEncoder,
    FakeLanguageModel,
    FixedLive,
    make_router,
    make_snapshot,
    make_task,
)
from tests.unit.small_models import KINDS, save_small_model
from trainer.commands import RegisterTask
from trainer.data import Fields, read_labelled
from trainer.evaluate_answers import evaluate_answers
from trainer.evaluate_routing import RoutedText
from trainer.evaluation_rows import EvaluationFields, LabelledText, read_texts
from trainer.register import register
from trainer.tuning_settings import TuningSettings

TEMPLATE = "context: {context} question: {input}"


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Filling


def test_the_default_template_puts_the_passages_after_the_text() -> None:
    assert fill("", "text", ["best", "second"]) == "text\nbest\nsecond"
    assert fill("", " text ", []) == " text "


def test_a_template_places_text_and_passages() -> None:
    assert fill(TEMPLATE, "why?", ["a", "b"]) == "context: a\nb question: why?"
    assert fill(TEMPLATE, "why?") == "context:  question: why?"
    assert fill("ask: {input}", "why?", ["never shown"]) == "ask: why?"


def test_braces_of_texts_and_passages_are_no_fields() -> None:
    filled = fill(TEMPLATE, "what is {context}?", ["{input} {0} {x!r}"])
    assert filled == "context: {input} {0} {x!r} question: what is {context}?"
    assert fill("{input}!", "{input}") == "{input}!"


@pytest.mark.parametrize(
    "template",
    ["{context}", "{input} {input}", "{input} {context} {context}", "{input}\x00", "{input}" * 999],
)
def test_a_template_that_cannot_be_filled_is_refused(template: str) -> None:
    with pytest.raises(InvalidInputError, match="template"):
        check_template(template)


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_window_costs_passages_and_never_the_text(kind: str, tmp_path: Path) -> None:
    model = load_language_model(
        save_small_model(kind, tmp_path / kind), device="cpu", precision="float32", threads=1
    )
    passages = ["the quick brown fox jumps over the lazy dog " * 9]
    question = "is it a good film"
    for template in (TEMPLATE, ""):
        filled = fill(template, question, passages)
        assert isinstance(filled, FilledTemplate)
        [cut] = model.tokenize_inputs([filled], [5], [4])
        text = model.tokenizer.decode(cut.ids, skip_special_tokens=True)
        assert cut.truncated
        assert question in text
        assert "the quick brown fox" in text
        [whole] = model.tokenize_inputs([str(filled)], [5], [4])
        assert len(cut.ids) == len(whole.ids)
    # A text that fits is not taken apart.
    short = fill(TEMPLATE, question, ["a dog"])
    assert model.tokenize_inputs([short], [5], [4]) == model.tokenize_inputs(
        ["context: a dog question: is it a good film"], [5], [4]
    )


# Rows


def test_context_is_a_text_or_a_list_and_part_of_the_digest(tmp_path: Path) -> None:
    rows = [{"input": str(n), "output": "x"} for n in range(3)]
    plain = read_labelled(write(tmp_path / "plain.jsonl", *rows))
    rich = read_labelled(
        write(
            tmp_path / "rich.jsonl",
            {**rows[0], "context": "one"},
            {**rows[1], "context": ["first", "second"]},
            {**rows[2], "context": None},
        )
    )
    assert {e.input: e.context for e in rich.examples} == {
        "0": ("one",),
        "1": ("first", "second"),
        "2": (),
    }
    assert plain.sha256 != rich.sha256
    named = write(tmp_path / "named.jsonl", *({**row, "docs": "d"} for row in rows))
    read = read_labelled(named, Fields(context="docs"))
    assert {example.context for example in read.examples} == {("d",)}
    assert read_labelled(named).sha256 == plain.sha256


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (["x"] * 33, "33 passages; give at most 32"),
        (["x" * 20_000, "y" * 20_000], "bytes with the input"),
        (["x", ""], "empty"),
        ({"a": 1}, "dict; give a text"),
        ("a\x00b", "NUL"),
    ],
)
def test_bad_context_is_refused_with_its_row(tmp_path: Path, context: object, message: str) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"input": "a", "output": "x"},
        {"input": "b", "output": "x", "context": context},
    )
    with pytest.raises(InvalidInputError, match=f"row 2, field 'context'.*{message}"):
        read_labelled(path)


# Registering


def test_a_task_is_tuned_and_stored_with_its_template(tmp_path: Path) -> None:
    base = load_language_model(
        save_small_model("bart", tmp_path / "bart"), device="cpu", precision="float32", threads=1
    )
    data = write(
        tmp_path / "rows.jsonl",
        *(
            {"input": text, "output": ("yes", "no")[n % 2], "context": f"passage {n}"}
            for n, text in enumerate(texts_of("weather", 12))
        ),
    )
    request = RegisterTask("weather", data, instruction="good", force="a test", template=TEMPLATE)
    settings = TuningSettings(length=4, steps=2, validations=1)
    seen: list[str] = []
    tokenize = base.tokenize_inputs

    def watched(texts, *others):
        seen.extend(texts)
        return tokenize(texts, *others)

    base.tokenize_inputs = watched  # type: ignore[method-assign]
    with new_workshop(tmp_path / "home") as workshop:
        result = register(workshop, [request], base, settings)
        assert result.failures == {}
        [record] = result.records
        assert workshop.catalog.record(record.key).template == TEMPLATE
        wrong = replace(request, name="sport", template="{context}")
        failures = register(workshop, [wrong], base, settings).failures
    assert "template of sport" in str(failures["sport"])
    rows = [text for text in seen if text.startswith("context: passage")]
    assert len(rows) >= 12
    assert all(" question: " in text for text in rows)


def test_a_record_without_a_template_keeps_the_digest_it_had() -> None:
    record = make_task("weather", None).record
    assert "template" not in record.to_json()
    templated = replace(record, template=TEMPLATE)
    assert TaskRecord.from_json(templated.to_json()) == templated
    assert TaskRecord.from_json(record.to_json()) == record


# Evaluating


def test_answers_are_evaluated_with_the_rows_passages(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"input": "hm", "task": "weather", "output": "snow", "context": "it will snow"},
    )
    [row] = read_texts(path, EvaluationFields(output="output"))
    assert row.context == ("it will snow",)
    task = make_task("weather", ("sun", "rain", "snow"))
    task = replace(task, record=replace(task.record, template=TEMPLATE))
    snapshot = make_snapshot(tasks=[task])

    def oracle(text: LabelledText) -> float:
        model = FakeLanguageModel()
        routed = RoutedText(text, "weather", Outcome.MATCHED, 1, 1, 0.5, truncated=False)
        found = evaluate_answers(
            snapshot, model, [routed], np.zeros((1, 4), np.float32)
        ).mean.oracle
        inputs: list[PromptedInput] = [item for batch in model.batches for item in batch]
        assert all(item.text.startswith("context:") for item in inputs)
        return found

    # The fake model answers the output that stands in what it reads, or the first one.
    assert oracle(row) == 1.0
    assert oracle(replace(row, context=())) == 0.0


# Serving


async def test_a_request_s_own_passages_are_placed_by_the_template_and_not_routed() -> None:
    task = make_task("weather", ("sun", "rain", "snow"))
    task = replace(task, record=replace(task.record, template=TEMPLATE))
    encoder, model = FakeEncoder(), FakeLanguageModel()
    router = make_router(encoder, model, FixedLive(make_snapshot(tasks=[task])))
    try:
        events = [e async for e in router.generate("weather please", context=["it will snow"])]
    finally:
        router.close()
        if router.answerer is not None:
            router.answerer.close()
    assert "snow" in events
    assert encoder.batches == [["weather please"]]
    [[asked]] = model.batches
    assert asked.text == "context: it will snow question: weather please"
