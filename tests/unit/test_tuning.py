"""Tuning: only the prompts move, tasks do not disturb each other, and the result is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from router.backends.language_model import load_language_model
from router.backends.prompted_network import PrefixShape
from router.backends.rows import Row
from router.backends.seq2seq import Seq2SeqLanguageModel
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError
from router.interfaces import Generation, PromptedInput
from tests.fakes import FakeLanguageModel
from tests.unit.small_models import KINDS, save_small_model
from trainer.answer_metrics import Metric, score
from trainer.prompt_parameters import PromptParameters
from trainer.prompt_quality import Quality, Trial, majority_score, measure, same_text
from trainer.task_tuning import TaskTuning
from trainer.tuned_prompt import TunedPrompt, TuningFailure
from trainer.tuning import tune
from trainer.tuning_options import tuning_settings
from trainer.tuning_settings import TuningJob, TuningSettings

WORDS = ("fox", "dog", "river", "book", "film", "end", "start")
SENTIMENT = TuningJob(
    "sentiment",
    "is it a good film",
    ("negative", "positive"),
    tuple(
        (f"a {mood} {word} {k}", output)
        for mood, output in (("good", "positive"), ("bad", "negative"))
        for k, word in enumerate(WORDS)
    ),
    tuple(
        (f"the {mood} {word}", output)
        for mood, output in (("good", "positive"), ("bad", "negative"))
        for word in WORDS[:3]
    ),
)
URGENCY = TuningJob(
    "urgency",
    "is it urgent",
    ("routine", "urgent"),
    tuple((f"{word} runs away {k}", "urgent") for k, word in enumerate(WORDS * 2)),
    tuple((f"the {word} runs", "urgent") for word in WORDS[:4]),
)
COPY = TuningJob(
    "copy",
    "say the word",
    None,
    tuple((f"the {word} and {k}", word) for k, word in enumerate(WORDS)),
    tuple((f"a {word}", word) for word in WORDS[:3]),
)
QUICK = TuningSettings(
    length=6,
    learning_rate=0.1,
    steps=20,
    rows_per_step=8,
    validations=4,
    patience=99,
    refit="never",
)
EMBEDDED_BASE = Path(__file__).parents[2] / "router" / "models" / "base"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: save_small_model(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def any_model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> TorchLanguageModel:
    return load_language_model(folders[request.param], device="cpu", precision="float32", threads=1)


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> TorchLanguageModel:
    return load_language_model(folders["bart"], device="cpu", precision="float32", threads=1)


def tuned(
    model: TorchLanguageModel, jobs: Sequence[TuningJob], settings: TuningSettings = QUICK
) -> dict[str, TunedPrompt]:
    results = tune(model, jobs, settings)
    assert [result for result in results.values() if isinstance(result, TuningFailure)] == []
    return {name: result for name, result in results.items() if isinstance(result, TunedPrompt)}


def weights_digest(model: TorchLanguageModel) -> str:
    state = model.network.state_dict()
    return hashlib.sha256(b"".join(state[k].numpy().tobytes() for k in sorted(state))).hexdigest()


def test_tuning_lowers_the_loss_on_every_architecture(any_model: TorchLanguageModel) -> None:
    settings = replace(QUICK, learning_rate=0.03, steps=30)
    result = tuned(any_model, [SENTIMENT], settings)["sentiment"]
    assert result.values.shape == (6, any_model.hidden_size)
    assert result.values.dtype == np.float32
    assert result.steps == len(result.losses) == 30
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5])
    assert set(result.scores) == {"prompt", "majority", "no_prompt", "instruction"}
    assert result.seconds > 0


def test_a_prefix_is_tuned_on_every_architecture_and_serves_as_it_was_measured(
    any_model: TorchLanguageModel,
) -> None:
    settings = replace(QUICK, method="prefix", learning_rate=0.02, steps=30)
    before = weights_digest(any_model)
    result = tuned(any_model, [SENTIMENT], settings)["sentiment"]
    assert weights_digest(any_model) == before
    shape = any_model.prefix_shape
    assert result.values.shape == (6, shape.width)
    assert result.layers == shape.layers
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5])
    labels = SENTIMENT.labels or ()
    rows = [PromptedInput(text, result.values, "prefix") for text, _ in SENTIMENT.validation]
    answers = [labels[row.best] for row in any_model.score(rows, [labels] * len(rows))]
    right = [
        answer == output for answer, (_, output) in zip(answers, SENTIMENT.validation, strict=True)
    ]
    assert float(np.mean(right)) == result.scores["prompt"]


def test_a_prefix_of_free_text_is_generated_under_it(any_model: TorchLanguageModel) -> None:
    settings = replace(QUICK, method="prefix", steps=2)
    assert tuned(any_model, [COPY], settings)["copy"].values.shape[0] == QUICK.length


def test_an_architecture_without_prefixes_refuses_them_before_anything_is_tuned(
    model: TorchLanguageModel,
) -> None:
    class Without(Seq2SeqLanguageModel):
        @property
        def prefix_shape(self) -> PrefixShape:
            raise IncompatibleModelError("method prefix", "no layers", "tune with --method prompt")

    seen: list[object] = []
    with pytest.raises(IncompatibleModelError, match="--method prompt"):
        tune(
            with_class(model, Without),
            [SENTIMENT],
            replace(QUICK, method="prefix"),
            lambda *step: seen.append(step),
        )
    assert seen == []


def test_the_base_models_weights_do_not_change(any_model: TorchLanguageModel) -> None:
    before = weights_digest(any_model)
    tuned(any_model, [SENTIMENT, COPY], replace(QUICK, steps=3))
    assert weights_digest(any_model) == before
    assert all(weights.grad is None for weights in any_model.network.parameters())


def test_a_tuned_prompt_serves_as_it_was_measured(model: TorchLanguageModel) -> None:
    result = tuned(model, [SENTIMENT])["sentiment"]
    labels = SENTIMENT.labels or ()
    rows = [PromptedInput(text, result.values) for text, _ in SENTIMENT.validation]
    scores = model.score(rows, [labels] * len(rows))
    answers = [labels[row.best] for row in scores]
    right = [
        answer == output for answer, (_, output) in zip(answers, SENTIMENT.validation, strict=True)
    ]
    assert float(np.mean(right)) == result.scores["prompt"]


def test_a_prompt_of_few_rows_is_tuned_once_more_on_the_validation_rows_too(
    model: TorchLanguageModel,
) -> None:
    slow = replace(QUICK, learning_rate=0.03, initialisation="text", steps=60, precision="float32")
    once = tuned(model, [SENTIMENT], slow)["sentiment"]
    twice = tuned(model, [SENTIMENT], replace(slow, refit="auto"))["sentiment"]
    assert twice.scores == once.scores
    assert twice.validations == once.validations
    everything = replace(SENTIMENT, train=(*SENTIMENT.train, *SENTIMENT.validation))

    def loss(prompt: np.ndarray) -> float:
        trial = Trial(torch.tensor(prompt), SENTIMENT.labels, everything.train)
        return -measure(model, [trial])[0].minus_loss

    start = tuned(model, [everything], replace(slow, steps=1, learning_rate=1e-9))["sentiment"]
    assert loss(twice.values) < loss(start.values)
    assert not np.array_equal(twice.values, once.values)


def test_few_rows_that_choose_among_labels_take_smaller_steps(model: TorchLanguageModel) -> None:
    settings = replace(QUICK, steps=1, rows_per_step=0)
    many = replace(SENTIMENT, name="many", train=SENTIMENT.train * 50)
    results = tuned(model, [SENTIMENT, COPY, many], settings)
    rows = {name: result.settings["rows_per_step"] for name, result in results.items()}
    assert rows == {"sentiment": 4, COPY.name: 8, "many": 8}


def test_few_rows_are_tuned_once_more_for_all_steps(model: TorchLanguageModel) -> None:
    job = replace(SENTIMENT, train=SENTIMENT.train[:6], validation=SENTIMENT.validation[:2])
    settings = replace(QUICK, steps=6, refit="auto", validations=6, precision="float32")
    task = TaskTuning(model, job, settings)
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.0)):
        task.validated(Quality(0.5, -loss))
        if step < 3:
            task.stepped(loss)
    again = task.refitted(model)
    assert again is not None
    steps = 0
    while again.is_running:
        again.stepped(1.0)
        steps += 1
    assert steps == settings.steps


def test_a_prompt_of_many_rows_is_tuned_once(model: TorchLanguageModel) -> None:
    settings = replace(QUICK, steps=2, rows_per_step=len(SENTIMENT.train) // 2)
    once = tuned(model, [SENTIMENT], settings)["sentiment"]
    still_once = tuned(model, [SENTIMENT], replace(settings, refit="auto"))["sentiment"]
    np.testing.assert_array_equal(still_once.values, once.values)


class Float32Model(Seq2SeqLanguageModel):
    """Computes gradients in float32 also where the CPU would do so in bfloat16."""

    def copy_for_gradients(self, precision: str = "auto") -> Float32Model:
        return self


def test_a_task_is_tuned_alone_as_it_is_beside_others(model: TorchLanguageModel) -> None:
    exact = with_class(model, Float32Model)
    alone = tuned(exact, [SENTIMENT], replace(QUICK, steps=4))["sentiment"]
    beside = tuned(exact, [URGENCY, SENTIMENT, COPY], replace(QUICK, steps=4))["sentiment"]
    # The same rows in the same order; only rounding differs.
    np.testing.assert_allclose(beside.losses, alone.losses, rtol=1e-3)


def test_many_labels_are_sampled_and_the_right_one_is_always_there(
    model: TorchLanguageModel,
) -> None:
    class Watched(Seq2SeqLanguageModel):
        """Notes the candidates of rows that a gradient is computed for."""

        def log_likelihoods(
            self, rows: Sequence[Row], candidates: Sequence[Sequence[Sequence[int]]]
        ) -> list[Tensor]:
            if torch.is_grad_enabled():
                seen.extend(tuple(map(tuple, of_row)) for of_row in candidates)
            return super().log_likelihoods(rows, candidates)

    seen: list[tuple[tuple[int, ...], ...]] = []
    labels = tuple(f"{one} {two}" for one in WORDS for two in WORDS)
    rows = tuple((f"a {label}", label) for label in labels)
    tuned(
        with_class(model, Watched),
        [TuningJob("many", "which one", labels, rows, rows[:4])],
        replace(QUICK, steps=1, rows_per_step=len(rows)),
    )
    right = {model.tokenize_output(label) for label in labels}
    assert {candidates[0] for candidates in seen} == right
    assert all(len(set(candidates)) == len(candidates) == 16 for candidates in seen)


def test_prompts_that_exist_already_do_not_change(model: TorchLanguageModel) -> None:
    first = tuned(model, [SENTIMENT], replace(QUICK, steps=3))["sentiment"]
    before = first.values.tobytes()
    tuned(model, [URGENCY, COPY], replace(QUICK, steps=3))
    assert first.values.tobytes() == before


def test_the_same_seed_gives_identical_prompts(model: TorchLanguageModel) -> None:
    one, two = (tuned(model, [SENTIMENT, URGENCY]) for _ in range(2))
    for name in one:
        assert one[name].values.tobytes() == two[name].values.tobytes()
        assert one[name].losses == two[name].losses
    other = tuned(model, [SENTIMENT], replace(QUICK, seed=1))["sentiment"]
    assert other.losses != one["sentiment"].losses


def test_the_best_prompt_is_kept_and_not_the_last(model: TorchLanguageModel) -> None:
    # A rate far too high: whatever comes after the start is worse.
    wild = replace(QUICK, initialisation="text", learning_rate=1e6, steps=4, validations=4)
    result = tuned(model, [SENTIMENT], wild)["sentiment"]
    start = model.text_embeddings("is it a good film negative positive", 6)
    best, begin = measure(
        model,
        [
            Trial(torch.tensor(result.values), SENTIMENT.labels, SENTIMENT.validation),
            Trial(start, SENTIMENT.labels, SENTIMENT.validation),
        ],
    )
    assert best >= begin
    assert best == Quality(result.scores["prompt"], -result.validation_loss)


def test_a_quality_exceeds_another_by_more_than_rounding() -> None:
    best = Quality(0.5, -1.0)
    assert Quality(0.6, -2.0).clearly_exceeds(best)
    assert Quality(0.5, -0.9).clearly_exceeds(best)
    assert not Quality(0.5, -1.0 + 1e-6).clearly_exceeds(best)
    assert not Quality(0.4, -0.1).clearly_exceeds(best)


def with_class(model: TorchLanguageModel, kind: type[Seq2SeqLanguageModel]) -> Seq2SeqLanguageModel:
    return kind(model.network, model.tokenizer, name=model.name, fingerprint=model.fingerprint)


class StuckModel(Seq2SeqLanguageModel):
    """Gives no gradient for rows whose first candidate is `urgent`."""

    def log_likelihoods(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[Tensor]:
        scores = super().log_likelihoods(rows, candidates)
        urgent = self.tokenize_output("urgent")
        return [
            values.detach() + 0 * values if tuple(ids[0]) == urgent else values
            for values, ids in zip(scores, candidates, strict=True)
        ]


def test_a_task_without_progress_stops_and_the_others_go_on(model: TorchLanguageModel) -> None:
    settings = replace(QUICK, learning_rate=0.03, steps=16, validations=8, patience=2)
    # Random weights generalise to nothing: progress is sure only on rows that are trained on.
    moving = replace(COPY, validation=COPY.train)
    results = tuned(with_class(model, StuckModel), [URGENCY, moving], settings)
    assert results["urgency"].steps == 4
    assert results["copy"].steps > 4


class PoisonedModel(Seq2SeqLanguageModel):
    """Its gradients and scores are not numbers for rows whose first candidate is `urgent`."""

    def log_likelihoods(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[Tensor]:
        scores = super().log_likelihoods(rows, candidates)
        urgent = self.tokenize_output("urgent")
        return [
            values * float("nan") if tuple(ids[0]) == urgent else values
            for values, ids in zip(scores, candidates, strict=True)
        ]


def test_a_loss_that_is_not_finite_fails_its_own_task_only(model: TorchLanguageModel) -> None:
    poisoned = with_class(model, PoisonedModel)
    results = tune(poisoned, [SENTIMENT, URGENCY], QUICK)
    failure = results["urgency"]
    assert isinstance(failure, TuningFailure)
    assert "not finite at step 1" in failure.reason
    assert failure.remedy
    survivor = results["sentiment"]
    assert isinstance(survivor, TunedPrompt)
    assert np.isfinite(survivor.values).all()
    assert survivor.steps == QUICK.steps


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (replace(COPY, name="broken", train=()), "train rows"),
        (replace(COPY, name="broken", validation=()), "validation rows"),
        (replace(COPY, name="broken", train=(("fox", "dog " * 100),)), "output"),
        (replace(SENTIMENT, name="broken", validation=(("fox", "maybe"),)), "validation rows"),
        (replace(COPY, name="broken", instruction=" "), "prompt text"),
    ],
)
def test_a_job_that_cannot_be_tuned_leaves_the_others(
    model: TorchLanguageModel, broken: TuningJob, reason: str
) -> None:
    results = tune(model, [broken, SENTIMENT], replace(QUICK, steps=2))
    failure = results["broken"]
    assert isinstance(failure, TuningFailure)
    assert reason in failure.reason
    assert isinstance(results["sentiment"], TunedPrompt)


def test_a_prompt_longer_than_the_window_fails_with_a_remedy(model: TorchLanguageModel) -> None:
    failure = tune(model, [SENTIMENT], replace(QUICK, length=500))["sentiment"]
    assert isinstance(failure, TuningFailure)
    assert "shorter prompt" in failure.remedy


@pytest.mark.parametrize("kind", ["text", "vocabulary", "random"])
def test_every_initialisation_can_be_tuned(model: TorchLanguageModel, kind: str) -> None:
    settings = replace(QUICK, steps=2, initialisation=kind)  # type: ignore[arg-type]
    assert tuned(model, [SENTIMENT], settings)["sentiment"].values.shape[0] == QUICK.length


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 0},
        {"steps": 0},
        {"rows_per_step": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup_steps": -1},
        {"patience": 0},
        {"initialisation": "magic"},
        {"method": "magic"},
        {"schedule": "magic"},
        {"precision": "int8"},
        {"reparametrisation": "magic"},
        {"seeds": 0},
        {"bottleneck": 0},
        {"clip_norm": -1.0},
        {"micro_batch_positions": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused(
    model: TorchLanguageModel, changes: dict[str, float]
) -> None:
    with pytest.raises(InvalidInputError):
        tune(model, [SENTIMENT], replace(QUICK, **changes))  # type: ignore[arg-type]


def test_two_jobs_of_one_name_are_refused(model: TorchLanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="every task once"):
        tune(model, [SENTIMENT, SENTIMENT], QUICK)


def test_a_model_without_gradients_is_refused() -> None:
    with pytest.raises(IncompatibleModelError, match="Hugging Face"):
        tune(FakeLanguageModel(), [SENTIMENT], QUICK)


def test_progress_counts_the_steps(model: TorchLanguageModel) -> None:
    seen: list[tuple[str, str, int, int]] = []
    tune(model, [SENTIMENT], replace(QUICK, steps=3), lambda *step: seen.append(step))
    assert seen == [("", "tune", step, 3) for step in (1, 2, 3)]


class CannedModel(Seq2SeqLanguageModel):
    """Answers `Fox` to everything."""

    def generate(self, inputs: Sequence[PromptedInput], max_new_tokens: int) -> list[Generation]:
        return [Generation("Fox", "stop", 1, 1, truncated=False) for _ in inputs]


def test_free_text_is_measured_by_exact_match(model: TorchLanguageModel) -> None:
    rows = (("a fox", "fox"), ("the fox", " fox "), ("a dog", "dog"), ("a cat", "a fox"))
    quality = measure(with_class(model, CannedModel), [Trial(None, None, rows)])[0]
    assert quality.score == 0.5


def test_answers_are_compared_without_case_and_white_space() -> None:
    assert same_text("Stoke - on - Trent ", "stoke-on-trent")
    assert not same_text("negative", "positive")


def test_the_majority_score_counts_the_most_frequent_train_output() -> None:
    train = [("a", "x"), ("b", "x"), ("c", "y")]
    assert majority_score(train, [("d", "x"), ("e", "y"), ("f", "x"), ("g", "z")]) == 0.5


def test_equal_scores_are_decided_by_the_loss() -> None:
    assert Quality(0.5, -1.0) > Quality(0.5, -2.0)
    assert Quality(0.6, -9.0) > Quality(0.5, -1.0)


def test_the_embedded_base_model_learns_a_shipped_example_task() -> None:
    path = Path(__file__).parents[2] / "trainer" / "examples" / "news-topic.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [(row["input"], row["output"]) for row in rows]
    labels = tuple(sorted({output for _, output in pairs}))
    job = TuningJob("news", "What is the topic?", labels, pairs[:60], pairs[60:])
    base = load_language_model(EMBEDDED_BASE, device="cpu", precision="float32", threads=1)
    settings = TuningSettings(steps=16, validations=2)
    scores = tuned(base, [job], settings)["news"].scores
    assert scores["prompt"] >= 0.7
    assert scores["prompt"] > max(scores["majority"], scores["no_prompt"])


# ---- what can be configured


def test_a_residual_prompt_starts_as_the_prompt_and_is_kept_folded(
    model: TorchLanguageModel,
) -> None:
    settings = replace(QUICK, reparametrisation="residual", learning_rate=0.01)
    plain = tuned(model, [SENTIMENT], replace(settings, reparametrisation="none"))["sentiment"]
    result = tuned(model, [SENTIMENT], settings)["sentiment"]
    assert result.values.shape == plain.values.shape
    assert result.losses[0] == pytest.approx(plain.losses[0])
    assert result.losses[1:] != plain.losses[1:]
    assert np.mean(result.losses[-5:]) < np.mean(result.losses[:5])
    # What is kept is all there is to it: it answers as it was measured.
    [quality] = measure(
        model, [Trial(torch.tensor(result.values), SENTIMENT.labels, SENTIMENT.validation)]
    )
    assert quality.score == result.scores["prompt"]


def test_the_residual_network_is_zero_at_first_and_gets_its_gradient() -> None:
    start = torch.randn(3, 8)
    parameters = PromptParameters(start, "residual", 4, seed=1)
    parameters.follow()
    assert torch.equal(parameters.prompt.detach(), start)
    parameters.prompt.grad = torch.ones(3, 8)
    parameters.take_gradient(0.0)
    base, _, _, up, bias = parameters.trained
    assert base.grad is not None
    assert bias.grad is not None
    assert torch.equal(bias.grad, torch.full((8,), 3.0))
    assert up.grad is not None
    assert up.grad.abs().sum() > 0
    with torch.no_grad():
        bias += 1
    parameters.follow()
    torch.testing.assert_close(parameters.prompt.detach(), start + 1)


def test_a_tasks_gradient_is_cut_to_its_length() -> None:
    parameters = PromptParameters(torch.zeros(2, 2), "none", 1, seed=0)
    parameters.prompt.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    parameters.take_gradient(0.0)
    assert float(parameters.prompt.grad.norm()) == pytest.approx(5)
    parameters.take_gradient(1.0)
    assert float(parameters.prompt.grad.norm()) == pytest.approx(1, rel=1e-3)


def test_of_several_seeds_the_best_on_the_validation_rows_is_kept(
    model: TorchLanguageModel,
) -> None:
    settings = replace(QUICK, initialisation="random", steps=3, validations=3)
    alone = [tuned(model, [COPY], replace(settings, seed=5 + k))["copy"] for k in range(3)]
    together = tuned(model, [COPY], replace(settings, seed=5, seeds=3))["copy"]
    best = min(alone, key=lambda result: (-result.scores["prompt"], result.validation_loss))
    assert together.settings["seed"] == best.settings["seed"]
    assert together.validation_loss == pytest.approx(best.validation_loss, rel=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_follows_its_schedule(model: TorchLanguageModel, schedule: str) -> None:
    settings = replace(QUICK, steps=3, schedule=schedule, precision="float32")  # type: ignore[arg-type]
    assert tuned(model, [SENTIMENT], settings)["sentiment"].settings["schedule"] == schedule


class SmallMemory(Float32Model):
    """Runs out of memory wherever a gradient needs more than `room` rows at once."""

    room = 3
    passes: list[int]

    def log_likelihoods(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[Tensor]:
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        if torch.is_grad_enabled():
            self.passes.append(len(rows))
        return super().log_likelihoods(rows, candidates)


def test_micro_batches_give_the_same_gradient(model: TorchLanguageModel) -> None:
    exact = with_class(model, Float32Model)
    settings = replace(QUICK, steps=4)
    whole = tuned(exact, [SENTIMENT], settings)["sentiment"]
    pieces = tuned(exact, [SENTIMENT], replace(settings, micro_batch_positions=30))["sentiment"]
    np.testing.assert_allclose(pieces.losses, whole.losses, rtol=1e-3)


def test_full_memory_means_smaller_micro_batches_said_aloud_and_the_same_result(
    model: TorchLanguageModel,
) -> None:
    settings = replace(QUICK, steps=4)
    whole = tuned(with_class(model, Float32Model), [SENTIMENT], settings)["sentiment"]
    small = with_class(model, SmallMemory)
    small.passes = []  # type: ignore[attr-defined]
    said: list[str] = []
    results = tune(small, [SENTIMENT], settings, lambda task, stage, *_: said.append(stage))
    result = results["sentiment"]
    assert isinstance(result, TunedPrompt)
    np.testing.assert_allclose(result.losses, whole.losses, rtol=1e-3)
    assert result.scores == whole.scores
    warnings = [stage for stage in said if "memory is full: micro-batches of" in stage]
    assert 1 <= len(warnings) <= 3  # once halved, it stays so
    assert sum(small.passes) == settings.steps * settings.rows_per_step  # type: ignore[attr-defined]


def test_memory_for_not_even_one_row_is_refused_with_a_remedy(
    model: TorchLanguageModel,
) -> None:
    class NoMemory(Float32Model):
        def log_likelihoods(
            self, rows: Sequence[Row], candidates: Sequence[Sequence[Sequence[int]]]
        ) -> list[Tensor]:
            if torch.is_grad_enabled():
                raise torch.OutOfMemoryError("out of memory")
            return super().log_likelihoods(rows, candidates)

    with pytest.raises(IncompatibleModelError, match="full with one row"):
        tune(with_class(model, NoMemory), [SENTIMENT], QUICK)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_are_computed_in_the_precision_that_was_asked_for(
    model: TorchLanguageModel, precision: str
) -> None:
    learner = model.copy_for_gradients(precision)
    assert str(learner.embedding.dtype) == f"torch.{precision}"
    assert model.embedding.dtype == torch.float32
    assert (learner is model) == (precision == "float32")
    settings = replace(QUICK, steps=2, precision=precision)  # type: ignore[arg-type]
    assert tuned(model, [SENTIMENT], settings)["sentiment"].values.dtype == np.float32


def test_settings_by_name_keep_what_suits_the_method() -> None:
    assert tuning_settings({}) == TuningSettings()
    assert tuning_settings({"method": "prefix"}).learning_rate == 0.1
    given = tuning_settings({"method": "prefix", "learning_rate": 1, "clip_norm": 0.5})
    assert (given.learning_rate, given.clip_norm, given.method) == (1, 0.5, "prefix")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"lenght": 3}, "tuning setting: lenght; the settings are length, "),
        ({"length": 2.5}, "tuning setting length: 2.5; give a whole number"),
        ({"length": True}, "give a whole number"),
        ({"clip_norm": "1"}, "give a number"),
        ({"schedule": 3}, "give a text"),
    ],
)
def test_a_setting_that_is_none_is_refused(given: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        tuning_settings(given)


def test_validation_scores_are_by_the_task_s_metric(model: TorchLanguageModel) -> None:
    labels, rows = SENTIMENT.labels or (), SENTIMENT.validation[:4]
    expected = [output for _, output in rows]
    scores = model.score([PromptedInput(text, None) for text, _ in rows], [labels] * 4)
    answers = [labels[row.best] for row in scores]
    metrics: tuple[Metric, ...] = ("accuracy", "macro-f1")
    accuracy, macro = measure(model, [Trial(None, labels, rows, metric=each) for each in metrics])
    assert accuracy.minus_loss == macro.minus_loss
    assert accuracy.score == score("accuracy", answers, expected)
    assert macro.score == score("macro-f1", answers, expected)
    # Three rows are positive and one is negative.
    assert majority_score(rows, rows) == 0.75
    assert majority_score(rows, rows, "macro-f1") == pytest.approx(3 / 7)
