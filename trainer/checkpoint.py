"""The state of an unfinished tuning on disk, so that it can go on where it was killed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open

from router.artifacts import MAX_ARTIFACT_BYTES
from router.errors import StorageError
from trainer.artifact_writer import write_durably

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEFAULT_SECONDS = 60.0
_STATE = "state"


@dataclass(frozen=True, slots=True)
class State:
    """What tuning needs to go on: values of JSON, and tensors by name."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Resumable(Protocol):
    """A task that is being tuned."""

    def values(self) -> dict[str, Any]:
        """What has changed since it was made, apart from tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that have changed."""

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Make a new task what the one was that gave `values` and `tensors`."""


class Checkpoints:
    """Keeps one state for each set of tasks in `folder`, written at most every `seconds`.

    A state belongs to everything that its result depends on: tasks, rows, settings, base model and
    versions. It holds no text of the rows.
    """

    def __init__(self, folder: Path, seconds: float = DEFAULT_SECONDS) -> None:
        self._folder = folder
        self._seconds = seconds
        self._path: Path | None = None
        self._written = time.monotonic()

    def open(self, belongs_to: object) -> State | None:
        """The state of what `belongs_to` describes (values of JSON), if there is one that is whole.

        It is this one that `write` and `remove` are about from here on.
        """
        text = json.dumps(belongs_to, sort_keys=True, ensure_ascii=False, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()
        self._path = self._folder / f"{name}.safetensors"
        self._written = time.monotonic()
        try:
            if self._path.stat().st_size > MAX_ARTIFACT_BYTES:
                return None
            with safe_open(self._path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                values = json.loads((file.metadata() or {})[_STATE])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        return State(values, tensors)

    @property
    def is_due(self) -> bool:
        """Whether so much time has passed that a state should be written."""
        return time.monotonic() - self._written >= self._seconds

    def write(self, state: State) -> None:
        """Replace the state on disk, whole or not at all.

        Raises:
            StorageError: the disk is full, or the folder may not be written.
        """
        if self._path is None:
            return
        from safetensors.torch import save  # here: registering without a prompt needs no torch

        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_durably(self._path, save(tensors, {_STATE: json.dumps(state.values)}))
        except OSError as error:
            raise StorageError(
                f"checkpoint folder {self._folder}",
                error.strerror or error,
                "free disk space or fix the folder's permissions; nothing was published",
            ) from error
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget the state: what it was for is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def resume(
    checkpoints: Checkpoints,
    belongs_to: object,
    tasks: Sequence[Resumable],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Take up the state of the same tuning, if there is one; how many steps that has made."""
    state = checkpoints.open(belongs_to)
    if state is None:
        return 0
    _restore_optimizer(optimizer, _parts_of(state.tensors, "optimizer/"))
    for number, (task, values) in enumerate(zip(tasks, state.values["tasks"], strict=True)):
        task.restore(values, _parts_of(state.tensors, f"{number}/"))
    return int(state.values["steps"])


def state_of(tasks: Sequence[Resumable], optimizer: torch.optim.Optimizer, steps: int) -> State:
    """The state after so many steps. The optimiser's own must be tensors, as AdamW's is."""
    tensors = {
        f"optimizer/{number}/{name}": value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }
    for number, task in enumerate(tasks):
        tensors |= {f"{number}/{name}": tensor for name, tensor in task.tensors().items()}
    return State({"steps": steps, "tasks": [task.values() for task in tasks]}, tensors)


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split("/")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _parts_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
