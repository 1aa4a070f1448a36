"""Starting from what is there: prompts of similar tasks, found by the router's own index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from router.backends.torch_model import TorchLanguageModel
from router.errors import InvalidInputError
from router.tasks import PromptMethod, TaskKey
from tests.catalogs import artifact_file, flip_byte, head_file, new_workshop, texts_of, write_rows
from tests.unit.prompted_home import PromptedHome, make_prompted_home
from trainer.commands import Initialisation, RegisterTask
from trainer.initialisation import Start, choose_start, initial_prompt
from trainer.nearest_prompts import nearest_prompts, nearest_tasks
from trainer.prompt_quality import Trial, measure
from trainer.register import register
from trainer.tuning_settings import TuningJob, TuningSettings


@pytest.fixture
def made(tmp_path: Path) -> PromptedHome:
    return make_prompted_home(tmp_path)


JOB = TuningJob(
    "new",
    "good or bad",
    ("no", "yes"),
    tuple((f"weather {n}", "yes" if n % 2 else "no") for n in range(12)),
    tuple((f"weather {n}", "yes" if n % 2 else "no") for n in range(20, 26)),
)


def loss_of(model: TorchLanguageModel, prompt: torch.Tensor, method: PromptMethod) -> float:
    [quality] = measure(model, [Trial(prompt, JOB.labels, JOB.validation, method)])
    return -quality.minus_loss


def test_the_tasks_that_the_index_finds_come_nearest_first(made: PromptedHome) -> None:
    with new_workshop(made.folder) as workshop:
        head = workshop.newest_head()
        for name in ("weather", "sport", "story"):
            vectors = workshop.encoder.encode(texts_of(name, 10, start=100)).vectors
            assert nearest_tasks(head, vectors)[0] == TaskKey(name, 1)


def test_only_prompts_of_the_same_base_model_and_method_are_starts(made: PromptedHome) -> None:
    texts = texts_of("story", 10, start=100)  # the nearest task has a prefix
    with new_workshop(made.folder) as workshop:
        prompts = nearest_prompts(workshop, texts, made.base, "prompt")
        assert {start.name for start in prompts} == {"prompt of weather@1", "prompt of sport@1"}
        prefixes = nearest_prompts(workshop, texts, made.base, "prefix")
        assert [start.name for start in prefixes] == ["prompt of story@1"]
        assert prefixes[0].values.shape == (5, made.base.prefix_shape.width)
        other = type(made.base)(
            made.base.network, made.base.tokenizer, name="other", fingerprint="other"
        )
        assert nearest_prompts(workshop, texts, other, "prompt") == ()


def test_damaged_prompts_heads_and_empty_catalogs_give_no_start(
    made: PromptedHome, tmp_path: Path
) -> None:
    texts = texts_of("weather", 4)
    weather = made.records["weather"].prompt
    assert weather is not None
    flip_byte(artifact_file(made.folder, weather.sha256))
    with new_workshop(made.folder) as workshop:
        found = nearest_prompts(workshop, texts, made.base, "prompt")
        assert [start.name for start in found] == ["prompt of sport@1"]
        newest = workshop.catalog.revision(workshop.catalog.newest_revision())
        flip_byte(head_file(made.folder, newest.head_sha256))
        assert nearest_prompts(workshop, texts, made.base, "prompt") == ()
    with new_workshop(tmp_path / "empty") as workshop:
        assert nearest_prompts(workshop, texts, made.base, "prompt") == ()


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", ["nearest", "best"])
def test_the_start_with_the_least_validation_loss_is_chosen(
    made: PromptedHome, kind: Initialisation, method: PromptMethod
) -> None:
    model = made.base
    random = np.random.default_rng(3)
    width = model.prompt_width(method)
    scale = float(initial_prompt(model, "text", JOB, 4, 0, method).std())
    starts = [
        Start(f"start {n}", random.normal(0, scale, (4, width)).astype(np.float32))
        for n in range(3)
    ]
    name, chosen = choose_start(model, kind, JOB, 4, 0, method, starts)
    losses = {s.name: loss_of(model, torch.tensor(s.values), method) for s in starts}
    if kind == "best":
        for other in ("text", "examples", "vocabulary"):
            losses[other] = loss_of(model, initial_prompt(model, other, JOB, 4, 0, method), method)
    assert name == min(losses, key=lambda start: losses[start])
    assert loss_of(model, chosen, method) == pytest.approx(losses[name], abs=1e-4)


def test_where_there_is_nothing_near_the_text_is_the_start(made: PromptedHome) -> None:
    name, chosen = choose_start(made.base, "nearest", JOB, 6, 0)
    assert name == "text"
    assert torch.equal(chosen, initial_prompt(made.base, "text", JOB, 6, 0))


def test_a_start_is_cut_or_followed_by_the_text(made: PromptedHome) -> None:
    values = np.full((4, made.base.hidden_size), 0.5, np.float32)
    text = initial_prompt(made.base, "text", JOB, 6, 0)
    for length, expected in (
        (3, torch.tensor(values[:3])),
        (6, torch.cat([torch.tensor(values), text[4:]])),
    ):
        _, chosen = choose_start(
            made.base, "nearest", JOB, length, 0, "prompt", [Start("x", values)]
        )
        assert torch.equal(chosen, expected)


def test_a_task_without_words_starts_from_what_needs_none(made: PromptedHome) -> None:
    silent = replace(JOB, instruction=" ", labels=None)
    assert choose_start(made.base, "best", silent, 3, 0)[0] == "vocabulary"
    values = np.full((2, made.base.hidden_size), 0.5, np.float32)
    _, chosen = choose_start(made.base, "nearest", silent, 3, 0, "prompt", [Start("x", values)])
    assert chosen.shape == (2, made.base.hidden_size)
    with pytest.raises(InvalidInputError, match="prompt text"):
        choose_start(made.base, "nearest", silent, 3, 0)


def test_a_registered_task_says_what_its_prompt_started_from(
    made: PromptedHome, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "new.jsonl", texts_of("weather", 20, start=500))
    settings = TuningSettings(initialisation="nearest", length=5, steps=2, validations=1)
    requests = [
        RegisterTask("forecast", data, instruction="good", force="a test"),
        RegisterTask("weather", data, instruction="good", force="a test", revise=True),
    ]
    with new_workshop(made.folder) as workshop:
        result = register(workshop, requests, made.base, settings, gate_limit=1.0)
    assert result.failures == {}
    for record in result.records:
        assert record.prompt is not None
        assert record.prompt.settings["initialisation"] == "nearest"
        started = str(record.prompt.settings["started_from"])
        assert started in ("prompt of weather@1", "prompt of sport@1")
