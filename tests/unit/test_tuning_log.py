"""What is logged of tuning can be read by TensorBoard and MLflow, and holds no text of rows."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tensorboardX.proto.event_pb2 import Event
from typer.testing import CliRunner

from router.errors import InvalidInputError, StorageError
from tests.catalogs import texts_of, write_rows
from tests.unit.small_models import save_small_model
from trainer.cli import app
from trainer.tuning_log import MLflow, TensorBoard, TuningLogs


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model("bart", tmp_path_factory.mktemp("base") / "bart")


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # The client alone has no database; a folder does where somebody asks for it.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path / 'mlruns'}"


def events(folder: Path) -> Iterator[Event]:
    """What TensorBoard would read: records of a length, its checksum, the data, its checksum."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            [size] = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[12 + size + 4 :]


def scalars(folder: Path, name: str) -> dict[int, float]:
    return {
        event.step: value.simple_value
        for event in events(folder)
        for value in event.summary.value
        if value.tag == name
    }


def test_a_registration_is_logged_step_by_step_and_without_the_texts_of_its_rows(
    tmp_path: Path, base_folder: Path, tracking: str
) -> None:
    write_rows(tmp_path / "weather.jsonl", texts_of("weather", 20))
    write_rows(tmp_path / "sport.jsonl", texts_of("sport", 20))
    (tmp_path / "tasks.yaml").write_text(
        "tasks:\n"
        "- {name: weather, data: weather.jsonl, instruction: good or bad, force: a test}\n"
        "- {name: sport, data: sport.jsonl, instruction: good or bad, force: a test}\n"
        "tuning: {steps: 6, validations: 3, length: 4, warmup_steps: 0, schedule: linear,"
        " patience: 9, refit: never, learning_rate: 0.06}\n"
    )
    logs = tmp_path / "logs"
    command = ["register", "--manifest", str(tmp_path / "tasks.yaml"), "--log-dir", str(logs)]
    command += ["--mlflow", tracking, "--home", str(tmp_path / "home")]
    result = CliRunner().invoke(app, [*command, "--base-model", str(base_folder)])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in logs.iterdir()) == ["sport", "weather"]
    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name("promptyard")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"sport", "weather"}
    for name, run in runs.items():
        losses = scalars(logs / name, "loss/training")
        assert list(losses) == [1, 2, 3, 4, 5, 6]
        rates = scalars(logs / name, "learning_rate")
        assert rates == pytest.approx({n + 1: 0.06 * (1 - n / 6) for n in range(6)})
        assert list(scalars(logs / name, "loss/validation")) == [0, 2, 4, 6]
        assert set(scalars(logs / name, "accuracy/validation")) == {0, 2, 4, 6}
        sent = client.get_metric_history(run.info.run_id, "loss/training")
        assert {figure.step: figure.value for figure in sent} == pytest.approx(losses)
        assert run.data.params["length"] == "4"
        assert run.info.status == "FINISHED"
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if _is_log(path))
    assert b"learning_rate" in written
    for text in [*texts_of("weather", 20), *texts_of("sport", 20)]:
        assert text.encode() not in written


def _is_log(path: Path) -> bool:
    return path.is_file() and {"logs", "mlruns"} & set(path.parts) != set()


def test_every_configuration_of_a_search_is_a_run_and_so_is_the_refit(
    tmp_path: Path, base_folder: Path
) -> None:
    write_rows(tmp_path / "weather.jsonl", texts_of("weather", 20))
    (tmp_path / "tasks.yaml").write_text(
        "tasks: [{name: weather, data: weather.jsonl, instruction: good or bad, force: a test}]\n"
        "tuning: {steps: 4, rows_per_step: 8, length: 3, search: {learning_rate: [0.01, 0.1]}}\n"
    )
    logs = tmp_path / "logs"
    command = ["register", "--manifest", str(tmp_path / "tasks.yaml"), "--log-dir", str(logs)]
    command += ["--home", str(tmp_path / "home"), "--base-model", str(base_folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    names = {path.name for path in logs.iterdir()}
    assert {"weather.1", "weather.2"} <= names
    assert any(name.endswith(".refit") for name in names)


def test_what_goes_on_after_a_kill_hides_what_was_written_twice(tmp_path: Path) -> None:
    with TuningLogs([TensorBoard(tmp_path)], print) as log:
        log.begin("weather", 0, {})
        for step in (1, 2, 3):
            log.write("weather", step, {"loss/training": 1.0})
    with TuningLogs([TensorBoard(tmp_path)], print) as log:
        log.begin("weather", 3, {})
        log.write("weather", 3, {"loss/training": 2.0})
    restarts = [e.step for e in events(tmp_path / "weather") if e.HasField("session_log")]
    assert 3 in restarts


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    with TuningLogs([TensorBoard(tmp_path)], print) as log:
        log.begin("weather", 0, {})
        log.write("weather", 1, {"loss/training": float("nan"), "learning_rate": 0.5})
    assert scalars(tmp_path / "weather", "loss/training") == {}
    assert scalars(tmp_path / "weather", "learning_rate") == {1: 0.5}


def test_a_log_that_fails_is_told_of_once_and_the_others_go_on(tmp_path: Path) -> None:
    class FullDisk:
        """Fails at every write."""

        def begin(self, run: str, first_step: int, settings: Mapping[str, object]) -> None:
            """Nothing is written yet."""

        def write(self, run: str, step: int, figures: Mapping[str, float]) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise AssertionError

    said: list[str] = []
    with TuningLogs([FullDisk(), TensorBoard(tmp_path)], said.append) as log:
        log.begin("weather", 0, {})
        for step in (1, 2):
            log.write("weather", step, {"loss/training": 1.0})
    assert len(said) == 1
    assert "FullDisk" in said[0]
    assert "No space left" in said[0]
    assert list(scalars(tmp_path / "weather", "loss/training")) == [1, 2]


def test_many_figures_are_sent_to_mlflow_in_bounded_calls(tmp_path: Path, tracking: str) -> None:
    with TuningLogs([MLflow(tracking)], pytest.fail) as log:
        log.begin("weather", 0, {"length": 3})
        for step in range(1, 1103):
            log.write("weather", step, {"loss/training": 1 / step})
    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name("promptyard")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss/training")) == 1102


def test_places_that_cannot_be_written_to_are_refused_before_anything_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--log-dir"):
        TensorBoard(tmp_path / "file" / "logs")
    for uri in ("gopher://nowhere", str(tmp_path / "no-store-without-the-variable")):
        with pytest.raises(InvalidInputError, match="--mlflow"):
            MLflow(uri)
    for module, log, argument in (
        ("tensorboardX", TensorBoard, tmp_path),
        ("mlflow", MLflow, "http://localhost:1"),
    ):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(InvalidInputError, match="promptyard\\["):
            log(argument)  # type: ignore[arg-type]
