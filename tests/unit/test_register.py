"""Registering, from the data file to the catalog: the real use case with the real encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from router.backends.language_model import load_language_model
from router.backends.onnx_encoder import OnnxMiniLM
from router.catalog import CatalogReader
from router.decision import Outcome
from router.errors import (
    IncompatibleModelError,
    InvalidInputError,
    PromptyardError,
    RefusedError,
    TaskExistsError,
    TaskNotFoundError,
)
from router.fitting import Background
from router.interfaces import PromptedInput
from router.loading import ServedModels, SnapshotLoader, read_prompt, read_statistics
from router.statistics import FIXED_POINT
from router.tasks import TaskKey
from tests.catalogs import (
    DIMENSION,
    PlaceEncoder,
    file_digests,
    new_workshop,
    place_background,
    prompt_values,
    texts_of,
    write_rows,
)
from tests.fakes import FakeLanguageModel
from tests.unit.small_models import save_small_model
from trainer.admission import Registered
from trainer.commands import PolicyChange, RegisterTask
from trainer.data import read_labelled
from trainer.register import check_prompt, register
from trainer.tuned_prompt import TunedPrompt, TuningFailure
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

LIGHTS = [
    "turn on the light in the kitchen",
    "switch off all the lamps upstairs",
    "dim the bedroom lights a little",
    "make it brighter in the living room",
    "lights out please",
    "set the hallway lamp to red",
    "is the garage light still on?",
    "put the porch light on at seven",
    "the lamp in the study is too bright",
    "light up the garden path",
]
MONEY = [
    "how do I move money to my savings account",
    "my card was charged twice for one payment",
    "what is the exchange rate for dollars today",
    "I want to close my bank account",
    "the cash machine has kept my card",
    "when will my salary arrive in my account",
    "raise the limit of my credit card",
    "why was my transfer declined",
    "order a new card, mine was stolen",
    "can I pay this invoice in instalments",
]


def routing(name: str, data: Path, **options: object) -> RegisterTask:
    return RegisterTask(name, data, with_prompt=False, **options)  # type: ignore[arg-type]


def register_only(workshop: Workshop, *requests: RegisterTask, **options: object) -> Registered:
    return register(workshop, requests, None, TuningSettings(), **options)  # type: ignore[arg-type]


def rows_at(folder: Path, place: str, count: int = 12, **options: object) -> Path:
    return write_rows(folder / f"{place}.jsonl", texts_of(place, count), **options)  # type: ignore[arg-type]


# With the real encoder


def test_texts_are_routed_to_the_tasks_that_were_registered(
    tmp_path: Path, encoder: OnnxMiniLM
) -> None:
    home = tmp_path / "home"
    with Workshop(home, encoder) as workshop:
        result = register_only(
            workshop,
            routing("lights", write_rows(tmp_path / "lights.jsonl", LIGHTS)),
            routing("money", write_rows(tmp_path / "money.jsonl", MONEY)),
        )
        assert result.published is not None
        assert result.failures == {}
        stored = read_statistics(workshop.artifacts, result.records[0])
    background = Background(np.zeros(1152), np.eye(1152) / 1152)
    models = ServedModels(encoder.fingerprint, encoder.dimension, lambda: background)
    with CatalogReader(home) as catalog:
        snapshot = SnapshotLoader(home, models).load(catalog, 1, None)
    decisions = snapshot.decide(
        encoder.encode(["could you turn the lamp off", "there is money missing on my account"])
    )
    assert [decision.task for decision in decisions] == [TaskKey("lights", 1), TaskKey("money", 1)]
    [elsewhere] = snapshot.decide(encoder.encode(["Napoleon was born on the island of Corsica."]))
    assert elsewhere.outcome is Outcome.UNKNOWN
    # What is stored are the encoder's vectors, in the canonical order of the rows.
    order = [e.input for e in read_labelled(tmp_path / "lights.jsonl", with_output=False).examples]
    np.testing.assert_allclose(
        stored.embeddings / FIXED_POINT, encoder.encode(order).vectors, atol=1 / FIXED_POINT
    )


# Records


def test_a_record_says_where_its_knowledge_came_from(workshop: Workshop, tmp_path: Path) -> None:
    data = rows_at(tmp_path, "weather")
    [record] = register_only(
        workshop, routing("weather", data, description="About the weather", instruction="Answer")
    ).records
    assert workshop.catalog.record(TaskKey("weather", 1)) == record
    assert (record.description, record.instruction) == ("About the weather", "Answer")
    assert record.data.sha256 == read_labelled(data, with_output=False).sha256
    assert (record.data.rows, record.data.train_rows) == (12, 12)
    assert record.encoder == PlaceEncoder.fingerprint
    assert record.prompt is None
    assert record.outputs is None
    assert record.created_at.endswith("+00:00")


def test_the_order_of_the_file_changes_neither_rows_nor_head(tmp_path: Path) -> None:
    texts = texts_of("weather", 40)
    digests = set()
    for name, order in (("a", texts), ("b", texts[::-1])):
        with new_workshop(tmp_path / name) as workshop:
            data = write_rows(tmp_path / f"{name}.jsonl", order)
            result = register_only(workshop, routing("weather", data))
            assert result.published is not None
            digests.add((result.records[0].embeddings_sha256, result.published.head.to_bytes()))
    assert len(digests) == 1


def test_several_tasks_come_in_one_revision(workshop: Workshop, tmp_path: Path) -> None:
    requests = [routing(name, rows_at(tmp_path, name)) for name in ("weather", "sport", "money")]
    result = register_only(workshop, *requests)
    assert result.published is not None
    assert result.published.revision == 1
    about = workshop.catalog.revision(1)
    assert (about.action, about.tasks) == ("register", ("money", "sport", "weather"))


def test_nothing_asked_for_is_nothing_done(workshop: Workshop) -> None:
    assert register_only(workshop) == Registered((), {}, None)
    assert workshop.catalog.newest_revision() == 0


def test_a_policy_can_come_with_a_registration(workshop: Workshop, tmp_path: Path) -> None:
    change = PolicyChange(head="nearest-mean", false_reject_rate=0.1)
    result = register_only(
        workshop, routing("weather", rows_at(tmp_path, "weather")), change=change
    )
    assert result.published is not None
    assert result.published.head.kind == "nearest-mean"
    assert workshop.catalog.revision(1).policy.false_reject_rate == 0.1
    with pytest.raises(InvalidInputError, match="head: ridge"):
        register_only(
            workshop,
            routing("sport", rows_at(tmp_path, "sport")),
            change=PolicyChange(head="ridge"),
        )


def test_progress_is_told_from_the_first_row_to_the_publish(
    workshop: Workshop, tmp_path: Path
) -> None:
    told: list[tuple[str, str, int, int]] = []
    register_only(
        workshop,
        routing("weather", rows_at(tmp_path, "weather", 300)),
        progress=lambda *step: told.append(step),
    )
    assert told == [
        ("weather", "embed", 0, 300),
        ("weather", "embed", 256, 300),
        ("weather", "embed", 300, 300),
        ("", "publish", 0, 1),
        ("", "publish", 1, 1),
    ]


# Names and revisions


def test_a_name_that_exists_is_refused_with_the_remedy(workshop: Workshop, tmp_path: Path) -> None:
    data = rows_at(tmp_path, "weather")
    register_only(workshop, routing("weather", data))
    before = file_digests(workshop.home)
    result = register_only(workshop, routing("weather", data))
    assert isinstance(result.failures["weather"], TaskExistsError)
    assert "add --revise for its next revision" in str(result.failures["weather"])
    assert (result.records, result.published) == ((), None)
    assert file_digests(workshop.home) == before


def test_a_retired_name_is_taken_too(workshop: Workshop, tmp_path: Path) -> None:
    data = rows_at(tmp_path, "weather")
    register_only(workshop, routing("weather", data))
    workshop.publish("retire", live={"weather": None})
    assert "weather" in register_only(workshop, routing("weather", data)).failures


def test_a_revision_is_live_at_once_and_the_old_one_stays(
    workshop: Workshop, tmp_path: Path
) -> None:
    register_only(workshop, routing("weather", rows_at(tmp_path, "weather")))
    old = workshop.catalog.record(TaskKey("weather", 1))
    more = write_rows(tmp_path / "more.jsonl", texts_of("weather", 20, start=50))
    result = register_only(workshop, routing("weather", more, revise=True))
    assert result.records[0].key == TaskKey("weather", 2)
    assert workshop.catalog.live(2) == [TaskKey("weather", 2)]
    assert workshop.catalog.record(TaskKey("weather", 1)) == old
    assert workshop.catalog.revision(2).action == "revise"


def test_a_revision_of_a_task_that_does_not_exist_is_refused(
    workshop: Workshop, tmp_path: Path
) -> None:
    result = register_only(workshop, routing("weather", rows_at(tmp_path, "weather"), revise=True))
    assert isinstance(result.failures["weather"], TaskNotFoundError)
    assert "register it first, without --revise" in str(result.failures["weather"])


@pytest.mark.parametrize(
    "name", ["", " ", "-a", ".a", "a b", "a/b", "../a", "a\n", "ä", "a" * 101, "a\0", "a@1"]
)
def test_a_name_that_cannot_be_used_is_refused(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    result = register_only(workshop, routing(name, rows_at(tmp_path, "weather")))
    assert "use letters, digits" in str(result.failures[name])
    assert result.published is None


def test_names_of_every_allowed_kind_can_be_registered(workshop: Workshop, tmp_path: Path) -> None:
    names = ["a", "7", "A.b_c-9", "a" * 100]
    data = {name: rows_at(tmp_path, f"place{n}") for n, name in enumerate(names)}
    result = register_only(workshop, *(routing(name, data[name]) for name in names))
    assert [record.name for record in result.records] == names


# Failures


def test_the_failure_of_one_task_leaves_the_others(workshop: Workshop, tmp_path: Path) -> None:
    good, more = rows_at(tmp_path, "weather"), rows_at(tmp_path, "sport")
    single = rows_at(tmp_path, "money", 1)
    result = register_only(
        workshop,
        routing("single", single),
        routing("weather", good),
        routing("missing", tmp_path / "none.jsonl"),
        routing("no name!", good),
        routing("sport", more),
        routing("new", good, revise=True),
    )
    assert [record.name for record in result.records] == ["weather", "sport"]
    assert set(result.failures) == {"single", "missing", "no name!", "new"}
    assert all(isinstance(error, PromptyardError) for error in result.failures.values())
    assert [key.name for key in workshop.catalog.live(1)] == ["sport", "weather"]


def test_a_name_that_is_given_twice_registers_neither(workshop: Workshop, tmp_path: Path) -> None:
    result = register_only(
        workshop,
        routing("weather", rows_at(tmp_path, "weather")),
        routing("sport", rows_at(tmp_path, "sport")),
        routing("weather", rows_at(tmp_path, "money")),
    )
    assert "name every task once" in str(result.failures["weather"])
    assert [record.name for record in result.records] == ["sport"]


def test_a_home_of_another_encoder_is_refused_before_anything_is_done(
    workshop: Workshop, tmp_path: Path
) -> None:
    register_only(workshop, routing("weather", rows_at(tmp_path, "weather")))
    before = file_digests(workshop.home)
    with (
        Workshop(workshop.home, PlaceEncoder("places:2")) as other,
        pytest.raises(IncompatibleModelError, match="choose it with --encoder"),
    ):
        register_only(other, routing("sport", rows_at(tmp_path, "sport")))
    assert file_digests(workshop.home) == before


def test_a_prompt_to_take_and_no_prompt_wanted_is_refused(
    workshop: Workshop, tmp_path: Path
) -> None:
    request = routing("weather", rows_at(tmp_path, "weather"), prompt_from=tmp_path)
    failure = register_only(workshop, request).failures["weather"]
    assert "give it without --no-prompt" in str(failure)


def test_a_prompt_without_a_base_model_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    request = RegisterTask("weather", rows_at(tmp_path, "weather"))
    with pytest.raises(InvalidInputError, match="base model: none; give --base-model"):
        register(workshop, [request], None, TuningSettings())


@pytest.mark.parametrize(
    ("rows", "outputs", "problem"),
    [
        (7, ("yes", "no"), "7 different rows; give at least 8"),
        (12, ("yes",), "field 'output': only 'yes'; give rows of at least two outputs"),
    ],
)
def test_data_that_no_prompt_can_be_tuned_on_is_refused(
    workshop: Workshop, tmp_path: Path, rows: int, outputs: Sequence[str], problem: str
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", texts_of("weather", rows), outputs)
    model = FakeLanguageModel()
    result = register(workshop, [RegisterTask("weather", data)], model, TuningSettings())
    assert problem in str(result.failures["weather"])
    assert register_only(workshop, routing("weather", data)).failures == {}


# Prompts, with a tuner that costs nothing


def test_a_prefix_is_stored_with_its_method_and_served_as_it_was_tuned(
    workshop: Workshop, tmp_path: Path
) -> None:
    base = load_language_model(
        save_small_model("bart", tmp_path / "bart"), device="cpu", precision="float32", threads=1
    )
    request = RegisterTask(
        "weather", rows_at(tmp_path, "weather", 20), instruction="is it good", force="a test"
    )
    settings = TuningSettings(method="prefix", length=5, steps=2, validations=1)
    result = register(workshop, [request], base, settings)
    [record] = result.records
    assert record.prompt is not None
    assert (record.prompt.method, record.prompt.layers, record.prompt.hidden_size) == (
        "prefix",
        2,
        32,
    )
    assert record.prompt.settings["method"] == "prefix"
    models = ServedModels(PlaceEncoder.fingerprint, DIMENSION, place_background, base.fingerprint)
    assert result.published is not None
    snapshot = SnapshotLoader(workshop.home, models).load(
        workshop.catalog, result.published.revision, None
    )
    served = snapshot.task("weather").prompt
    assert served is not None
    assert served.shape == (5, 2, 2, 32)
    [scores] = base.score(
        [PromptedInput("weather 1", served.values, served.method)], [record.outputs or ()]
    )
    assert np.isfinite(scores.log_probabilities).all()


class Tuner:
    """Takes the place of `tune`: gives every job the result that was set for it."""

    def __init__(self) -> None:
        self.results: dict[str, TunedPrompt | TuningFailure] = {}
        self.jobs: list[object] = []

    def __call__(self, model, jobs, settings, *_):
        self.jobs += jobs
        return {
            job.name: replace(result, settings=asdict(settings))
            if isinstance(result := self.results[job.name], TunedPrompt)
            else result
            for job in jobs
        }


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Tuner:
    tuner = Tuner()
    monkeypatch.setattr("trainer.tuning.tune", tuner)
    return tuner


def tuned(name: str, *, instruction_loss: float = 0.7, **scores: float) -> TunedPrompt:
    return TunedPrompt(
        name=name,
        values=prompt_values(name),
        scores={"prompt": 0.9, "majority": 0.5, "instruction": 0.6, "no_prompt": 0.3, **scores},
        validation_loss=0.5,
        instruction_loss=instruction_loss,
        losses=(1.0, 0.5),
        steps=2,
        seconds=1.23456,
    )


def test_a_tuned_prompt_is_stored_with_what_it_was_tuned_on(
    workshop: Workshop, tmp_path: Path, tuner: Tuner
) -> None:
    tuner.results = {"weather": tuned("weather")}
    model = FakeLanguageModel()
    request = RegisterTask("weather", rows_at(tmp_path, "weather", 20), instruction="Answer")
    [record] = register(workshop, [request], model, TuningSettings(steps=7)).records
    assert record.prompt is not None
    assert read_prompt(workshop.artifacts, record).tobytes() == prompt_values("weather").tobytes()
    assert (record.prompt.tokens, record.prompt.hidden_size) == (4, 8)
    assert (record.prompt.base_model, record.prompt.base_model_name) == (
        model.fingerprint,
        model.name,
    )
    assert record.prompt.settings["steps"] == 7
    assert record.prompt.scores["prompt"] == 0.9
    assert record.prompt.metric == "accuracy"
    assert record.outputs == ("no", "yes")
    assert (record.data.train_rows, record.data.validation_rows) == (16, 4)
    [job] = tuner.jobs
    assert job.instruction == "Answer"
    assert len(job.train) == 16
    assert set(job.train).isdisjoint(job.validation)
    json.loads(record.to_json())


def test_free_text_has_no_closed_outputs_and_another_metric(
    workshop: Workshop, tmp_path: Path, tuner: Tuner
) -> None:
    tuner.results = {"weather": tuned("weather"), "sport": tuned("sport")}
    answers = [f"answer {n}" for n in range(12)]
    requests = [
        RegisterTask("weather", rows_at(tmp_path, "weather", outputs=answers), description="Why?"),
        RegisterTask("sport", rows_at(tmp_path, "sport"), free_text=True),
    ]
    for record in register(workshop, requests, FakeLanguageModel(), TuningSettings()).records:
        assert record.outputs is None
        assert record.prompt is not None
        assert record.prompt.metric == "exact-match"
    assert tuner.jobs[0].instruction == "Why?"


def test_a_task_without_instruction_and_description_is_told_by_the_words_of_its_name(
    workshop: Workshop, tmp_path: Path
) -> None:
    """Free text has no labels either that a prompt could start from, or a baseline be made of."""
    base = load_language_model(
        save_small_model("bart", tmp_path / "bart"), device="cpu", precision="float32", threads=1
    )
    request = RegisterTask(
        "travel-is_good.place",
        rows_at(tmp_path, "weather", 20),
        free_text=True,
        force="a test",
    )
    settings = TuningSettings(length=5, steps=2, validations=1)

    result = register(workshop, [request], base, settings)

    assert not result.failures
    [record] = result.records
    assert record.prompt is not None
    assert record.instruction == ""


@pytest.mark.parametrize(
    ("scores", "passes"),
    [
        ({"prompt": 0.61}, True),
        ({"prompt": 0.6}, True),
        ({"prompt": 0.6, "instruction_loss": 0.5}, False),
        ({"prompt": 0.59}, False),
        ({"prompt": 0.55, "instruction": 0.2}, True),
        ({"prompt": 0.5, "instruction": 0.2}, False),
        ({"prompt": 0.9, "no_prompt": 0.95}, True),
        ({"prompt": 0.5, "instruction": 0.5}, False),
        ({"prompt": 0.0, "majority": 0.0, "instruction": 0.0}, False),
    ],
)
def test_a_prompt_must_beat_the_majority_and_the_instruction(
    scores: dict[str, float], passes: bool
) -> None:
    request = RegisterTask("weather", Path("weather.jsonl"))
    if passes:
        check_prompt(request, tuned("weather", **scores))
        return
    with pytest.raises(RefusedError, match=r"prompt of weather: .*--force REASON publishes it"):
        check_prompt(request, tuned("weather", **scores))
    check_prompt(replace(request, force="the owner wants it"), tuned("weather", **scores))


def test_a_prompt_that_is_refused_leaves_the_others_and_no_record(
    workshop: Workshop, tmp_path: Path, tuner: Tuner
) -> None:
    tuner.results = {
        "weather": tuned("weather", prompt=0.4),
        "sport": tuned("sport"),
        "money": TuningFailure("money", "the loss is not a number", "lower the learning rate"),
        "forced": tuned("forced", prompt=0.4),
    }
    requests = [
        RegisterTask(name, rows_at(tmp_path, name), force="wanted" if name == "forced" else "")
        for name in tuner.results
    ]
    requests.append(routing("only-routed", rows_at(tmp_path, "elsewhere")))
    result = register(workshop, requests, FakeLanguageModel(), TuningSettings())
    assert [record.name for record in result.records] == ["sport", "forced", "only-routed"]
    assert set(result.failures) == {"weather", "money"}
    assert "the loss is not a number; lower the learning rate" in str(result.failures["money"])
    assert [record.forced_reason for record in result.records] == ["", "wanted", ""]
    assert workshop.catalog.newest_record("weather") == 0


def test_one_task_is_never_tuned_for_routing_alone(
    workshop: Workshop, tmp_path: Path, tuner: Tuner
) -> None:
    result = register(
        workshop,
        [routing("weather", rows_at(tmp_path, "weather"))],
        FakeLanguageModel(),
        TuningSettings(),
    )
    assert tuner.jobs == []
    assert result.records[0].prompt is None


def test_a_served_snapshot_has_the_prompts_that_were_tuned(
    workshop: Workshop, tmp_path: Path, tuner: Tuner
) -> None:
    tuner.results = {"weather": tuned("weather")}
    model = FakeLanguageModel()
    register(
        workshop, [RegisterTask("weather", rows_at(tmp_path, "weather"))], model, TuningSettings()
    )
    models = ServedModels(PlaceEncoder.fingerprint, DIMENSION, place_background, model.fingerprint)
    snapshot = SnapshotLoader(workshop.home, models).load(workshop.catalog, 1, None)
    prompt = snapshot.task("weather").prompt
    assert prompt is not None
    assert prompt.values.tobytes() == prompt_values("weather").tobytes()
