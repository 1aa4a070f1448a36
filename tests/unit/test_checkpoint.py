"""A tuning that was cut short goes on where it was, and comes to the same prompt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from router.backends.language_model import load_language_model
from router.backends.torch_model import TorchLanguageModel
from router.catalog import CatalogReader
from router.errors import StorageError
from router.tasks import TaskKey
from tests.catalogs import flip_byte, texts_of, write_rows
from tests.unit.small_models import save_small_model
from trainer.checkpoint import Checkpoints, State
from trainer.cli import app
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning import tune
from trainer.tuning_settings import TuningJob, TuningSettings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TorchLanguageModel:
    folder = save_small_model("bart", tmp_path_factory.mktemp("bart"))
    return load_language_model(folder, device="cpu", precision="float32", threads=1)


def job(name: str, labels: tuple[str, ...] | None = ("no", "yes")) -> TuningJob:
    rows = tuple((f"{name} {n}", "yes" if n % 2 else "no") for n in range(20))
    return TuningJob(name, "good or bad", labels, rows[:14], rows[14:])


# More labels than are compared in a step: the draws of the others must go on where they were.
MANY = TuningJob(
    "many",
    "which one",
    tuple(f"label {n}" for n in range(20)),
    tuple((f"text {n}", f"label {n}") for n in range(20)),
    tuple((f"text {n}", f"label {n}") for n in range(3)),
)
JOBS = [job("weather"), job("story", None), MANY]
SETTINGS = TuningSettings(
    length=4, learning_rate=0.1, steps=12, rows_per_step=6, validations=4, patience=99
)


class Killed(BaseException):
    """Stands for what nobody catches."""


def tuned_until(
    model: TorchLanguageModel, folder: Path, settings: TuningSettings, last: int
) -> None:
    """Tune, and die after the step `last`, whose state is on disk."""

    def progress(task: str, stage: str, done: int, total: int) -> None:
        if (stage, done) == ("tune", last):
            raise Killed

    with pytest.raises(Killed):
        tune(model, JOBS, settings, progress, Checkpoints(folder, 0))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reparametrisation": "residual", "seeds": 2},
        {"method": "prefix"},
        {"patience": 1},
    ],
)
@pytest.mark.parametrize("last", [1, 7])
def test_a_tuning_that_goes_on_comes_to_the_same_bits(
    model: TorchLanguageModel, tmp_path: Path, changes: dict[str, object], last: int
) -> None:
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    whole = tune(model, JOBS, settings)
    tuned_until(model, tmp_path, settings, last)
    said: list[tuple[str, int]] = []
    checkpoints = Checkpoints(tmp_path, 0)
    resumed = tune(
        model, JOBS, settings, lambda _, stage, done, __: said.append((stage, done)), checkpoints
    )
    assert said[0][0] == f"going on after step {last}, where it was cut short"
    assert said[1] == ("tune", last + 1)
    for name, expected in whole.items():
        found = resumed[name]
        assert isinstance(found, TunedPrompt)
        assert isinstance(expected, TunedPrompt)
        assert found.values.tobytes() == expected.values.tobytes()
        assert replace(found, values=expected.values, seconds=0) == replace(expected, seconds=0)
    checkpoints.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "jobs"),
    [
        (replace(SETTINGS, seed=1), JOBS),
        (SETTINGS, JOBS[:2]),
        (SETTINGS, [replace(JOBS[0], instruction="other"), *JOBS[1:]]),
        (SETTINGS, [replace(JOBS[0], train=JOBS[0].train[:-1]), *JOBS[1:]]),
    ],
)
def test_another_tuning_starts_anew(
    model: TorchLanguageModel, tmp_path: Path, settings: TuningSettings, jobs: list[TuningJob]
) -> None:
    tuned_until(model, tmp_path, SETTINGS, 2)
    said: list[int] = []

    def progress(_: str, stage: str, done: int, __: int) -> None:
        if stage == "tune":
            said.append(done)

    tune(model, jobs, settings, progress, Checkpoints(tmp_path, 99))
    assert said == list(range(1, settings.steps + 1))
    assert len(list(tmp_path.iterdir())) == 1  # that of the other one


def test_a_damaged_state_is_none(model: TorchLanguageModel, tmp_path: Path) -> None:
    tuned_until(model, tmp_path, SETTINGS, 2)
    [file] = tmp_path.iterdir()
    flip_byte(file, 3)
    said: list[int] = []
    tune(model, JOBS, SETTINGS, lambda *step: said.append(step[2]), Checkpoints(tmp_path, 99))
    assert said[0] == 1


def test_a_state_is_written_when_it_is_due(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new", 0.05)
    assert checkpoints.open({"of": "this"}) is None
    assert not checkpoints.is_due
    time.sleep(0.06)
    assert checkpoints.is_due
    state = State({"steps": 3, "loss": 0.1}, {"a": torch.arange(3.0)})
    checkpoints.write(state)
    assert not checkpoints.is_due
    found = Checkpoints(tmp_path / "new").open({"of": "this"})
    assert found is not None
    assert found.values == state.values
    assert torch.equal(found.tensors["a"], state.tensors["a"])
    assert Checkpoints(tmp_path / "new").open({"of": "that"}) is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file")
    checkpoints.open({})
    with pytest.raises(StorageError, match="checkpoint folder"):
        checkpoints.write(State({}, {}))


def test_a_registration_that_was_killed_goes_on_when_it_is_called_again(tmp_path: Path) -> None:
    base = save_small_model("bart", tmp_path / "bart")
    for name in ("weather", "sport"):
        write_rows(tmp_path / f"{name}.jsonl", texts_of(name, 20))
    manifest = tmp_path / "tasks.yaml"
    manifest.write_text(
        "tasks:\n"
        "- {name: weather, data: weather.jsonl, instruction: good, force: a test}\n"
        "- {name: sport, data: sport.jsonl, instruction: bad, force: a test}\n"
        "tuning: {length: 4, steps: 100, validations: 2, patience: 99}\n"
    )

    def command(home: str) -> list[str]:
        return [
            *("register", "--manifest", str(manifest), "--home", str(tmp_path / home)),
            *("--base-model", str(base), "--checkpoint-seconds", "0"),
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    checkpoints = tmp_path / "killed" / "checkpoints"
    program = [sys.executable, "-c", "from trainer.cli import main; main()", *command("killed")]
    running = subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("*.safetensors")):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert list(checkpoints.glob("*.safetensors"))
    # One thread, as there.
    torch.set_num_threads(1)
    resumed, whole = (CliRunner().invoke(app, command(home)) for home in ("killed", "whole"))
    assert resumed.exit_code == whole.exit_code == 0, resumed.output + whole.output
    assert "where it was cut short" in resumed.stderr
    assert "where it was cut short" not in whole.stderr
    assert list(checkpoints.glob("*.safetensors")) == []
    for name in ("weather", "sport"):
        digests = set()
        for home in ("killed", "whole"):
            with CatalogReader(tmp_path / home) as catalog:
                prompt = catalog.record(TaskKey(name, 1)).prompt
                assert prompt is not None
                digests.add(prompt.sha256)
        assert len(digests) == 1
