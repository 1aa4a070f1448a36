"""Figures of tuning for those who watch: TensorBoard's event files, and MLflow.

There are losses, scores, learning rates and settings in them, and no text of any row.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from router.errors import InvalidInputError, StorageError

_EXPERIMENT = "promptyard"
# MLflow takes at most so many figures in one call.
_MOST_FIGURES = 1000
_SECONDS = 5.0

Settings = Mapping[str, float | int | str]


class TuningLog(Protocol):
    """Takes the figures of runs: one for each task, and for each configuration of a search."""

    def begin(self, run: str, first_step: int, settings: Settings) -> None:
        """A run is there, of which figures from `first_step` on will come."""

    def write(self, run: str, step: int, figures: Mapping[str, float]) -> None:
        """What is known after `step` steps, all of it finite."""

    def close(self) -> None:
        """Nothing comes any more."""


class TuningLogs:
    """Writes to several logs. One that fails later on is told of and left out: tuning goes on."""

    def __init__(self, logs: Sequence[TuningLog], say: Callable[[str], None]) -> None:
        self._logs = list(logs)
        self._say = say

    def __enter__(self) -> TuningLogs:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """As `TuningLog.close`."""
        self._each(lambda log: log.close())

    def begin(self, run: str, first_step: int, settings: Settings) -> None:
        """As `TuningLog.begin`."""
        self._each(lambda log: log.begin(run, first_step, settings))

    def write(self, run: str, step: int, figures: Mapping[str, float]) -> None:
        """As `TuningLog.write`; what is not finite is left out."""
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._each(lambda log: log.write(run, step, finite))

    def _each(self, work: Callable[[TuningLog], None]) -> None:
        for log in tuple(self._logs):
            try:
                work(log)
            except Exception as error:  # whatever a server or a disk comes up with
                self._logs.remove(log)
                self._say(f"no more figures to {type(log).__name__}: {error}")


class TensorBoard:
    """Event files in `folder`, in a folder of its own for each run.

    Raises:
        InvalidInputError: tensorboardX is not installed.
        StorageError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise InvalidInputError(
                "--log-dir", folder, "install tensorboardX: pip install 'promptyard[tensorboard]'"
            ) from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"--log-dir {folder}", error.strerror or error, "give a folder of yours"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise StorageError(
                f"--log-dir {folder}", "may not be written", "give a folder of yours"
            )
        self._folder = folder
        self._writer = SummaryWriter
        self._writers: dict[str, Any] = {}

    def begin(self, run: str, first_step: int, settings: Settings) -> None:
        """Open an event file; what an earlier one says of `first_step` and later is hidden."""
        writer = self._writer(str(self._folder / run), purge_step=first_step)
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}", first_step)
        self._writers[run] = writer

    def write(self, run: str, step: int, figures: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in figures.items():
            self._writers[run].add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close all files."""
        with ExitStack() as files:
            for writer in self._writers.values():
                files.callback(writer.close)


class MLflow:
    """Runs in the experiment `promptyard` of the tracking server (or folder) at `uri`.

    Raises:
        InvalidInputError: mlflow is not installed, or `uri` cannot be used.
    """

    def __init__(self, uri: str) -> None:
        # It would report its use to its makers, and wait minutes for a server that is not there.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise InvalidInputError(
                "--mlflow", uri, "install it: pip install 'promptyard[mlflow]'"
            ) from error
        self._metric, self._param = Metric, Param
        try:
            self._client = MlflowClient(uri)
            found = self._client.get_experiment_by_name(_EXPERIMENT)
            self._experiment: str = (
                found.experiment_id if found else self._client.create_experiment(_EXPERIMENT)
            )
        except (MlflowException, OSError) as error:
            raise InvalidInputError(
                "--mlflow", uri, f"give the address of a server that answers ({error})"
            ) from error
        self._runs: dict[str, str] = {}
        self._waiting: dict[str, list[Any]] = {}
        self._sent = time.monotonic()

    def begin(self, run: str, first_step: int, settings: Settings) -> None:  # noqa: ARG002
        """Make a run, whose parameters are the settings."""
        made = self._client.create_run(self._experiment, run_name=run)
        self._runs[run] = made.info.run_id
        parameters = [self._param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(made.info.run_id, params=parameters)

    def write(self, run: str, step: int, figures: Mapping[str, float]) -> None:
        """Keep figures, and send them every few seconds."""
        now = int(time.time() * 1000)
        waiting = self._waiting.setdefault(run, [])
        waiting += [self._metric(name, value, now, step) for name, value in figures.items()]
        full = len(waiting) + len(figures) > _MOST_FIGURES
        if full or time.monotonic() - self._sent > _SECONDS:
            self._send()

    def close(self) -> None:
        """Send what is left, and end the runs."""
        self._send()
        for run in self._runs.values():
            self._client.set_terminated(run)

    def _send(self) -> None:
        for run, figures in self._waiting.items():
            self._client.log_batch(self._runs[run], metrics=figures)
        self._waiting.clear()
        self._sent = time.monotonic()
