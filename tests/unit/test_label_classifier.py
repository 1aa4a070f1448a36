"""The label classifier: what it learns, when there is none, and how it is stored and served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import trainer.register
from router.backends.onnx_encoder import OnnxMiniLM
from router.errors import InvalidInputError
from router.interfaces import FloatArray, HalfArray, PromptedLearner
from router.label_classifier import (
    ClassifierInput,
    LabelClassifier,
    LabelEvidence,
    read_evidence,
)
from router.loading import (
    CLASSIFIER_TENSOR,
    ENCODER_PROMPT_TENSOR,
    ServedModels,
    SnapshotLoader,
    read_classifier,
)
from router.routing import Router
from router.tasks import TaskKey, TaskRecord
from tests.catalogs import (
    DIMENSION,
    PlaceEncoder,
    new_record,
    new_workshop,
    place_background,
    prompt_values,
)
from tests.fakes import (
    TASKS,
    FakeEncoder,
    FakeLanguageModel,
    FixedLive,
    make_router,
    make_snapshot,
)
from tests.fakes import make_task as make_fake_task
from trainer.commands import RegisterTask
from trainer.encoder_prompts import LENGTH
from trainer.label_classifier import MAX_ROWS, PROMPT_WEIGHT, fit_classifier
from trainer.register import register
from trainer.switching import switch_encoder
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

LABELS = ("a", "b", "c")
# Their words: near to the centres of `clouds`.
LABEL_VECTORS = np.eye(3, 16, dtype=np.float32)


def clouds(
    rows: int, labels: int, *, seed: int = 0, distance: float = 1.0
) -> tuple[FloatArray, list[str]]:
    """Unit vectors `[N, 16]` around one centre a label, and the labels in turn."""
    random = np.random.default_rng(seed)
    truth = np.arange(rows) % labels
    vectors = random.normal(size=(rows, 16)) * 0.3
    vectors[np.arange(rows), truth] += distance
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), [LABELS[label] for label in truth]


@pytest.mark.parametrize("labels", [2, 3])
def test_labels_that_embeddings_tell_apart_are_learned(labels: int) -> None:
    vectors, outputs = clouds(60, labels)
    fitted = fit_classifier(vectors, outputs, LABELS[:labels], LABEL_VECTORS[:labels])
    assert fitted is not None
    assert fitted.rows.shape == (labels, 17)
    assert fitted.rows.dtype == np.float32
    assert fitted.accuracy > 0.9
    classifier = LabelClassifier(fitted.rows, PROMPT_WEIGHT)
    fresh, expected = clouds(60, labels, seed=1)
    nothing = np.zeros(labels, np.float32)
    found = [LABELS[classifier.evidence(vector).best(nothing)] for vector in fresh]
    assert np.mean([a == b for a, b in zip(found, expected, strict=True)]) > 0.9


def test_of_few_rows_the_words_of_the_labels_help_to_find_them() -> None:
    def accuracy(seed: int, label_vectors: FloatArray) -> float:
        vectors, outputs = clouds(9, 3, seed=seed, distance=0.5)
        fitted = fit_classifier(vectors, outputs, LABELS, label_vectors)
        if fitted is None:
            return 1 / 3
        fresh, expected = clouds(300, 3, seed=100 + seed, distance=0.5)
        found = (fresh @ fitted.rows[:, :-1].T + fitted.rows[:, -1]).argmax(1)
        return float(np.mean([LABELS[n] == e for n, e in zip(found, expected, strict=True)]))

    elsewhere = np.roll(LABEL_VECTORS, 8, axis=1)
    told = np.mean([accuracy(seed, LABEL_VECTORS) for seed in range(20)])
    assert told > np.mean([accuracy(seed, elsewhere) for seed in range(20)]) + 0.05


def test_embeddings_that_say_nothing_of_the_labels_hardly_count() -> None:
    spreads = []
    for seed in range(8):
        vectors, outputs = clouds(200, 2, seed=seed, distance=0.0)
        fitted = fit_classifier(vectors, outputs, LABELS[:2], LABEL_VECTORS[:2])
        scores = np.zeros((len(vectors), 2)) if fitted is None else vectors @ fitted.rows[:, :-1].T
        spreads.append(float((scores[:, 1] - scores[:, 0]).std()))
    told, outputs = clouds(200, 2)
    fitted = fit_classifier(told, outputs, LABELS[:2], LABEL_VECTORS[:2])
    assert fitted is not None
    apart = told @ fitted.rows[:, :-1].T
    assert np.mean(spreads) < 0.5 < 4.0 < float((apart[:, 1] - apart[:, 0]).std())


def test_a_label_that_cannot_be_held_out_leaves_no_classifier() -> None:
    vectors, _ = clouds(31, 3)
    assert fit_classifier(vectors, ["c", *["a", "b"] * 15], LABELS, LABEL_VECTORS) is None
    assert (
        fit_classifier(vectors, ["c", "c", *["a"] * 15, *["b"] * 14], LABELS, LABEL_VECTORS)
        is not None
    )


def test_of_many_rows_some_of_all_parts_of_the_file_are_fitted() -> None:
    # Sorted by label, as files often are.
    vectors, outputs = clouds(3 * MAX_ROWS, 3)
    order = np.argsort(outputs, kind="stable")
    fitted = fit_classifier(vectors[order], [outputs[i] for i in order], LABELS, LABEL_VECTORS)
    assert fitted is not None
    assert fitted.accuracy > 0.9


def test_the_prompt_and_the_embedding_decide_together() -> None:
    evidence = LabelEvidence(np.array([0.0, 1.0], np.float32), prompt_weight=0.5)
    assert evidence.best(np.array([0.0, 0.0], np.float32)) == 1
    assert evidence.best(np.array([-1.0, -2.5], np.float32)) == 1
    assert evidence.best(np.array([-1.0, -3.5], np.float32)) == 0


# With an encoder prompt


class SignPrompting:
    """Under this prompt, an embedding is what is given; which rows were tuned on is noted."""

    def __init__(self, vectors: FloatArray, tuned_dimensions: slice = slice(None)) -> None:
        self.vectors = vectors
        self.tuned_dimensions = tuned_dimensions
        self.label_vectors = LABEL_VECTORS
        self.tuned: list[list[int]] = []

    def tune(self, rows: np.ndarray) -> HalfArray:
        self.tuned.append(rows.tolist())
        return np.full((2, 4), len(self.tuned), np.float16)

    def embed(self, prompt: HalfArray, rows: np.ndarray) -> FloatArray:
        assert prompt.shape == (2, 4)
        return self.vectors[rows]

    def embed_labels(self, prompt: HalfArray) -> FloatArray:
        assert prompt.shape == (2, 4)
        return self.label_vectors


def test_the_dimensions_that_an_encoder_prompt_is_tuned_by_count_for_more() -> None:
    half, outputs = clouds(60, 3)
    vectors = np.hstack([half, half])
    labels = np.hstack([LABEL_VECTORS, LABEL_VECTORS])
    # What one half says is of the label "a", and the other half of "b".
    torn = np.concatenate([LABEL_VECTORS[0], LABEL_VECTORS[1]])
    for tuned, expected in ((slice(0, 16), 0), (slice(16, 32), 1)):
        prompting = SignPrompting(vectors, tuned)
        prompting.label_vectors = labels
        fitted = fit_classifier(vectors, outputs, LABELS, labels, prompting)
        assert fitted is not None
        assert (fitted.rows[:, :-1] @ torn + fitted.rows[:, -1]).argmax() == expected


def test_what_is_learned_under_a_prompt_counts_less_where_plain_embeddings_tell_little() -> None:
    prompted, outputs = clouds(60, 3, seed=1)

    def spread(plain: FloatArray) -> float:
        fitted = fit_classifier(plain, outputs, LABELS, LABEL_VECTORS, SignPrompting(prompted))
        assert fitted is not None
        return float((prompted @ fitted.rows[:, :-1].T).std())

    vague, clear = (clouds(60, 3, seed=2, distance=distance)[0] for distance in (0.5, 1.0))
    assert spread(vague) < 0.7 * spread(clear)


def test_of_few_rows_the_classifier_reads_embeddings_under_a_prompt_tuned_on_all_of_them() -> None:
    vectors, outputs = clouds(60, 3, distance=0.3)
    prompted, _ = clouds(60, 3, seed=1, distance=1.0)
    prompting = SignPrompting(prompted)
    fitted = fit_classifier(vectors, outputs, LABELS, LABEL_VECTORS, prompting)
    assert fitted is not None
    assert fitted.encoder_prompt is not None
    assert prompting.tuned == [list(range(60))]
    found = (prompted @ fitted.rows[:, :-1].T + fitted.rows[:, -1]).argmax(1)
    assert np.mean([LABELS[n] == output for n, output in zip(found, outputs, strict=True)]) > 0.95


@pytest.mark.parametrize(("plain", "under_prompt"), [(0.3, 1.0), (1.0, 0.3)])
def test_of_many_rows_the_better_embedding_is_read(plain: float, under_prompt: float) -> None:
    vectors, outputs = clouds(600, 3, distance=plain)
    prompted, _ = clouds(600, 3, seed=1, distance=under_prompt)
    prompting = SignPrompting(prompted)
    fitted = fit_classifier(vectors, outputs, LABELS, LABEL_VECTORS, prompting)
    assert fitted is not None
    assert (fitted.encoder_prompt is not None) == (under_prompt > plain)
    assert fitted.accuracy > 0.9
    [tuned] = prompting.tuned
    assert len(tuned) == 480  # the others judge


# In the catalog


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """A workshop in which every prompt is tuned at once."""
    monkeypatch.setattr(
        "trainer.tuning.tune", lambda _model, jobs, *_: {job.name: tuned(job) for job in jobs}
    )
    with new_workshop(tmp_path / "home") as workshop:
        yield workshop


def tuned(job: object) -> TunedPrompt:
    return TunedPrompt(
        name=job.name,  # type: ignore[attr-defined]
        values=prompt_values(job.name),  # type: ignore[attr-defined]
        scores={"prompt": 0.9, "majority": 0.5, "instruction": 0.6, "no_prompt": 0.3},
        validation_loss=0.5,
        instruction_loss=0.7,
        losses=(1.0, 0.5),
        steps=2,
        seconds=1.0,
    )


def two_labels(folder: Path) -> Path:
    """Rows of two places, each with an output of its own."""
    path = folder / "rows.jsonl"
    rows = [
        f'{{"input": "{place} {n}", "output": "{output}"}}\n'
        for n in range(20)
        for place, output in (("up", "yes"), ("down", "no"))
    ]
    path.write_text("".join(rows), encoding="utf-8")
    return path


def registered(workshop: Workshop, data: Path, **options: bool) -> TaskRecord:
    request = RegisterTask("places", data, **options)  # type: ignore[arg-type]
    [record] = register(workshop, [request], FakeLanguageModel(), TuningSettings()).records
    return record


def load(workshop: Workshop) -> SnapshotLoader:
    models = ServedModels(
        PlaceEncoder.fingerprint, DIMENSION, place_background, FakeLanguageModel.fingerprint
    )
    return SnapshotLoader(workshop.home, models)


def test_a_task_with_labels_gets_a_classifier_that_is_served(
    workshop: Workshop, tmp_path: Path
) -> None:
    record = registered(workshop, two_labels(tmp_path))
    assert record.classifier is not None
    assert record.classifier.accuracy == 1.0
    assert record.classifier.prompt_weight == PROMPT_WEIGHT
    assert TaskRecord.from_json(record.to_json()) == record
    classifier = load(workshop).load(workshop.catalog, 1, None).task("places").classifier
    assert classifier is not None
    vectors = workshop.encoder.encode(["up 99", "down 99"]).vectors
    nothing = np.zeros(2, np.float32)
    labels = [(record.outputs or ())[classifier.evidence(v).best(nothing)] for v in vectors]
    assert labels == ["yes", "no"]


def test_free_text_and_those_who_want_none_get_none(workshop: Workshop, tmp_path: Path) -> None:
    data = two_labels(tmp_path)
    record = registered(workshop, data, with_classifier=False)
    assert record.classifier is None
    assert "classifier" not in record.to_json()
    assert registered(workshop, data, revise=True, free_text=True).classifier is None


def test_a_damaged_classifier_takes_its_task_out_of_service(
    workshop: Workshop, tmp_path: Path
) -> None:
    record = registered(workshop, two_labels(tmp_path))
    workshop.publish("register", records=(new_record(workshop, "other"),), live={"other": 1})
    assert record.classifier is not None
    path = workshop.artifacts.path(record.classifier.sha256)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    snapshot = load(workshop).load(workshop.catalog, 2, None)
    assert "artifact" in snapshot.task("places").problem
    assert snapshot.task("places").prompt is None
    assert snapshot.task("other").problem == ""


def test_a_classifier_of_other_labels_or_dimensions_is_refused(
    workshop: Workshop, tmp_path: Path
) -> None:
    record = registered(workshop, two_labels(tmp_path))
    more = replace(record, outputs=("no", "yes", "perhaps"))
    with pytest.raises(trainer.register.PromptyardError, match="2 labels"):
        read_classifier(workshop.artifacts, more, DIMENSION)
    with pytest.raises(trainer.register.PromptyardError, match="25 columns, not 8"):
        read_classifier(workshop.artifacts, record, 7)


def test_an_encoder_prompt_that_nothing_would_read_is_refused(
    workshop: Workshop, tmp_path: Path, encoder: OnnxMiniLM
) -> None:
    data = two_labels(tmp_path)
    with pytest.raises(InvalidInputError, match="only the embedded one takes prompts"):
        registered(workshop, data, encoder_prompt=True)
    with Workshop(tmp_path / "embedded", encoder) as embedded:
        for without in ({"with_classifier": False}, {"free_text": True}, {"with_prompt": False}):
            with pytest.raises(InvalidInputError, match="encoder prompt: places"):
                registered(embedded, data, encoder_prompt=True, **without)
    assert workshop.catalog.newest_revision() == 0


def test_a_task_has_an_encoder_prompt_unless_none_is_wanted(
    workshop: Workshop, tmp_path: Path, encoder: OnnxMiniLM
) -> None:
    with Workshop(tmp_path / "embedded", encoder) as embedded:
        requests = [
            RegisterTask(name, two_labels(tmp_path), encoder_prompt=wanted)
            for name, wanted in (("plain", False), ("prompted", None))
        ]
        said: list[tuple[str, str]] = []
        found = register(
            embedded,
            requests,
            FakeLanguageModel(),
            TuningSettings(steps=2),
            progress=lambda task, stage, *_: said.append((task, stage)),
            gate_limit=1.0,
        )
        plain, prompted = found.records
        assert plain.classifier is not None
        assert prompted.classifier is not None
        assert plain.classifier.encoder_prompt_tokens == 0
        assert prompted.classifier.encoder_prompt_tokens == LENGTH
        assert prompted.classifier.prompt_weight < plain.classifier.prompt_weight
        classifier = read_classifier(embedded.artifacts, prompted, encoder.dimension)
    assert ("prompted", "encoder prompt") in said
    assert ("plain", "encoder prompt") not in said
    assert classifier is not None
    texts = ["up 99", "down 99"]
    evidence = read_evidence([ClassifierInput(classifier, text, None) for text in texts], encoder)
    nothing = np.zeros(2, np.float32)
    labels = [(prompted.outputs or ())[each.best(nothing)] for each in evidence if each]
    assert labels == ["yes", "no"]


@pytest.mark.usefixtures("workshop")  # in which prompts are tuned at once
def test_a_switch_of_the_encoder_tunes_an_encoder_prompt_where_there_was_one(
    home: Path, tmp_path: Path, encoder: OnnxMiniLM, float_encoder: OnnxMiniLM
) -> None:
    data = two_labels(tmp_path)
    requests = [
        RegisterTask("plain", data, encoder_prompt=False, keep_text=True),
        RegisterTask("prompted", data, keep_text=True),
    ]
    other = home.with_name("embedded")
    with Workshop(other, encoder) as embedded:
        settings = TuningSettings(steps=2)
        found = register(embedded, requests, FakeLanguageModel(), settings, gate_limit=1.0)
        assert not found.failures
    with Workshop(other, float_encoder) as embedded:
        switch_encoder(embedded)
        switched = [embedded.catalog.record(TaskKey(each.name, 2)) for each in requests]
        classifiers = [
            read_classifier(embedded.artifacts, record, float_encoder.dimension)
            for record in switched
        ]
    tokens = [record.classifier and record.classifier.encoder_prompt_tokens for record in switched]
    assert tokens == [0, LENGTH]
    assert [each is not None and each.encoder_prompt is not None for each in classifiers] == [
        False,
        True,
    ]


def test_an_encoder_prompt_is_stored_with_the_classifier_and_must_be_what_the_record_says(
    workshop: Workshop, tmp_path: Path
) -> None:
    record = registered(workshop, two_labels(tmp_path))
    assert record.classifier is not None
    assert "encoder_prompt" not in record.to_json()
    prompt = np.arange(12, dtype=np.float16).reshape(3, 4)
    rows = np.zeros((2, DIMENSION + 1), np.float32)
    stored = workshop.artifacts.write_tensors(
        {CLASSIFIER_TENSOR: rows, ENCODER_PROMPT_TENSOR: prompt}
    )
    about = replace(record.classifier, sha256=stored, encoder_prompt_tokens=3)
    prompted = replace(record, classifier=about)
    assert TaskRecord.from_json(prompted.to_json()) == prompted
    found = read_classifier(workshop.artifacts, prompted, DIMENSION)
    assert found is not None
    assert found.encoder_prompt is not None
    np.testing.assert_array_equal(found.encoder_prompt, prompt)
    other = replace(record, classifier=replace(about, encoder_prompt_tokens=4))
    with pytest.raises(trainer.register.PromptyardError, match="3 tokens"):
        read_classifier(workshop.artifacts, other, DIMENSION)


# Serving


@pytest.mark.parametrize("task", ["", "weather"])
async def test_an_answer_is_by_the_prompt_and_the_classifier(task: str) -> None:
    encoder = FakeEncoder()
    word = encoder.encode(["hail"]).vectors[0]
    rows = np.zeros((3, len(word) + 1), np.float32)
    rows[1, :-1] = 100 * word  # whoever writes of hail means rain
    weather = make_fake_task("weather", ("sun", "rain", "snow"))
    live = FixedLive(make_snapshot(tasks=[replace(weather, classifier=LabelClassifier(rows, 0.3))]))
    router = make_router(encoder, FakeLanguageModel(), live)
    answers = []
    for text in ("weather snow", "weather snow hail"):
        [_, answer, _] = [event async for event in router.generate(text, task=task)]
        answers.append(answer)
    router.close()
    assert answers == ["snow", "rain"]


class ShoutingEncoder(FakeEncoder):
    """Reads a text in front of which the words of its prompt's first number are written."""

    prompt_width = 4
    tuned_dimensions = slice(None)

    def for_gradients(self) -> PromptedLearner:
        raise NotImplementedError

    def encode_prompted(self, texts: Sequence[str], prompts: Sequence[HalfArray]) -> FloatArray:
        return self.encode(
            [
                f"number{prompt[0, 0]:.0f} {text}"
                for text, prompt in zip(texts, prompts, strict=True)
            ]
        ).vectors


def prompted_classifier(encoder: ShoutingEncoder, number: float, label: int) -> LabelClassifier:
    """Answers with one label whatever is read under an encoder prompt of that number."""
    word = encoder.encode([f"number{number:.0f}"]).vectors[0]
    rows = np.zeros((3, len(word) + 1), np.float32)
    rows[label, :-1] = 100 * word
    return LabelClassifier(rows, 0.3, np.full((2, 4), number, np.float16))


async def test_every_text_is_read_under_the_encoder_prompt_of_its_own_task() -> None:
    encoder = ShoutingEncoder()
    tasks = [
        replace(
            make_fake_task(name, TASKS[name]),
            classifier=prompted_classifier(encoder, number, label),
        )
        for name, number, label in (("weather", 1.0, 2), ("sport", 2.0, 1))
    ]
    live = FixedLive(make_snapshot(tasks=tasks))
    router = make_router(encoder, FakeLanguageModel(), live, prompted=encoder)
    answers = await asyncio.gather(
        *(answer_to(router, text) for text in ("weather sun", "sport goal", "weather rain"))
    )
    assert answers == ["snow", "match", "snow"]
    # A named task's text is not embedded for routing when only its prompt's embedding is read.
    encoder.batches.clear()
    assert await answer_to(router, "sport team", task="sport") == "match"
    assert encoder.batches == [["number2 sport team"]]
    router.close()


async def answer_to(router: Router, text: str, task: str = "") -> str:
    [_, answer, _] = [event async for event in router.generate(text, task=task)]
    return str(answer)
