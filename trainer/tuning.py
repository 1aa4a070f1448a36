"""Tunes soft prompts by gradient descent. The base model stays frozen; only the prompts move.

Several tasks are tuned in the same batches. They share the forward passes and nothing else: a
task's rows, schedule and gradient are the same whether it is tuned alone or beside others.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from importlib.metadata import version
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError, PromptyardError
from router.interfaces import LanguageModel
from router.tasks import PromptMethod
from trainer.checkpoint import Checkpoints, resume, state_of
from trainer.commands import GradientPrecision, Initialisation, Reparametrisation, Schedule
from trainer.gradients import MicroBatches, TrainingRow
from trainer.initialisation import Start, choose_start
from trainer.prompt_parameters import PromptParameters
from trainer.prompt_quality import LabelledRow, Quality, Trial, baseline_scores, measure
from trainer.schedule import passes, share_of_rate, validation_steps
from trainer.tuned_prompt import TunedPrompt, TuningFailure, Validation

# progress(task or "", stage, done, total)
Progress = Callable[[str, str, int, int], None]

_CHOICES = {
    "method": PromptMethod,
    "initialisation": Initialisation,
    "schedule": Schedule,
    "reparametrisation": Reparametrisation,
    "precision": GradientPrecision,
}
_BETAS = (0.9, 0.98)
# With more labels, each row is compared with a sample of them: time and memory stay bounded.
_MAX_OTHER_LABELS = 15


@dataclass(frozen=True, slots=True)
class TuningSettings:
    """How to tune.

    `method` is where the base model reads the prompt: `prompt`, before the input embeddings, or
    `prefix`, as keys and values of every layer. `length` is P, the virtual tokens.
    `rows_per_step` are per task; the learning rate rises
    over `warmup_steps` (at most a tenth of all steps) and falls to zero along a cosine. The
    validation rows are tried `validations` times, evenly spread; a task stops after `patience` of
    them in a row without a better result, and its best prompt is kept.

    A task is tuned with each of `seeds` seeds from `seed` on, and the best on the validation rows
    is kept. `schedule` is how the rate falls. `reparametrisation` `residual` tunes P + MLP(P) with
    that `bottleneck`, and keeps the sum. A task's gradient is cut to the length `clip_norm` (0: it
    is not), and added up in micro-batches of at most `micro_batch_positions` (0: what suits the
    device). It is computed in `precision`: `auto` is bfloat16 where the processor multiplies that
    itself, as GPUs do, and prompts are always kept in float32.
    """

    length: int = 20
    learning_rate: float = 0.03
    steps: int = 60
    rows_per_step: int = 8
    warmup_steps: int = 50
    initialisation: Initialisation = "text"
    validations: int = 6
    patience: int = 4
    seed: int = 0
    method: PromptMethod = "prompt"
    seeds: int = 1
    schedule: Schedule = "cosine"
    reparametrisation: Reparametrisation = "none"
    bottleneck: int = 64
    clip_norm: float = 0.0
    micro_batch_positions: int = 0
    precision: GradientPrecision = "auto"


@dataclass(frozen=True, slots=True)
class TuningJob:
    """A task to tune a prompt for: rows are (input, output).

    `labels` is the closed set of outputs, or None where the outputs are free text. `starts` are
    prompts that `nearest` and `best` may start from.
    """

    name: str
    instruction: str
    labels: tuple[str, ...] | None
    train: Sequence[LabelledRow]
    validation: Sequence[LabelledRow]
    starts: tuple[Start, ...] = ()

    @property
    def identity(self) -> list[object]:
        """What its result depends on, as values of JSON."""
        starts = [hashlib.sha256(start.values.tobytes()).hexdigest() for start in self.starts]
        return [
            *(self.name, self.instruction, self.labels, starts),
            *(list(map(list, self.train)), list(map(list, self.validation))),
        ]


def tune(
    model: LanguageModel,
    jobs: Sequence[TuningJob],
    settings: TuningSettings = TuningSettings(),
    progress: Progress = lambda *_: None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, TunedPrompt | TuningFailure]:
    """Tune a soft prompt for every job, all of them together; the results are by job name.

    Deterministic for a seed on the same kind of processor, also where it goes on from a checkpoint.

    Raises:
        InvalidInputError: settings that cannot be used, or two jobs of one name.
        IncompatibleModelError: gradients cannot be computed through this kind of model, or its
            architecture does not allow the method.
    """
    _check(jobs, settings)
    if not isinstance(model, TorchLanguageModel):
        raise IncompatibleModelError(
            "base model", model.name, "prompts are tuned with a Hugging Face model"
        )
    model.prompt_width(settings.method)
    began = time.perf_counter()
    results: dict[str, TunedPrompt | TuningFailure] = {}
    tasks: dict[str, list[_Task]] = {}
    for job in jobs:
        try:
            first = _Task(model, job, settings)
            tasks[job.name] = [first] + [
                _Task(model, job, replace(settings, seed=settings.seed + more), first.baselines)
                for more in range(1, settings.seeds)
            ]
        except PromptyardError as error:
            results[job.name] = TuningFailure(
                job.name, f"{error.field}: {error.value}", error.remedy
            )
    if tasks:
        _descend(
            model,
            [task for of_job in tasks.values() for task in of_job],
            settings,
            progress,
            checkpoints,
        )
    share = (time.perf_counter() - began) / max(1, len(tasks))
    for name, of_job in tasks.items():
        results[name] = max(of_job, key=lambda task: task.quality).result(share)
    return {job.name: results[job.name] for job in jobs}


class _Task:
    """The state of one task while it is tuned."""

    def __init__(
        self,
        model: TorchLanguageModel,
        job: TuningJob,
        settings: TuningSettings,
        baselines: Mapping[str, float] | None = None,
    ) -> None:
        for field, rows in (("train", job.train), ("validation", job.validation)):
            if not rows:
                raise InvalidInputError(f"{field} rows of {job.name}", "none", "give some")
            strangers = {output for _, output in rows if output not in (job.labels or (output,))}
            if strangers:
                raise InvalidInputError(
                    f"{field} rows of {job.name}", min(strangers), "use one of the labels"
                )
        self.job = job
        self.seed = settings.seed
        self._settings = settings
        self._method = settings.method
        self._layers = model.prefix_shape.layers if settings.method == "prefix" else 0
        self._output_ids = {
            text: model.tokenize_output(text)
            for text in (*(job.labels or ()), *(output for _, output in job.train))
        }
        longest = max(len(ids) for ids in self._output_ids.values())
        tokens = model.tokenize_inputs(
            [text for text, _ in job.train],
            [settings.length] * len(job.train),
            [longest] * len(job.train),
        )
        self._inputs = [text.ids for text in tokens]
        # Seeded by its name, so that a task meets the same rows alone and beside others.
        self._random = random.Random(f"{settings.seed}/{job.name}")
        self._schedule = passes(len(job.train), settings.rows_per_step, self._random)
        self._started_from, start = choose_start(
            model,
            settings.initialisation,
            job,
            settings.length,
            settings.seed,
            settings.method,
            job.starts,
        )
        self.parameters = PromptParameters(
            start, settings.reparametrisation, settings.bottleneck, settings.seed
        )
        self.baselines = baselines or baseline_scores(
            model, job.instruction, job.labels, job.train, job.validation
        )
        self._best: tuple[Quality, Tensor] | None = None
        self._stale = 0
        self._losses: list[float] = []
        self._validations: list[Validation] = []
        self._failed = False
        self._patience = settings.patience

    @property
    def prompt(self) -> Tensor:
        """The prompt `[P, W]` as it is now."""
        return self.parameters.prompt

    @property
    def is_running(self) -> bool:
        """Whether the task takes part in the next step."""
        return not self._failed and self._stale < self._patience

    def trial(self) -> Trial:
        """The prompt as it is now, on the validation rows."""
        return Trial(self.prompt.detach(), self.job.labels, self.job.validation, self._method)

    def next_rows(self) -> list[TrainingRow]:
        """The rows of the next step."""
        return [
            TrainingRow(
                Row(self.prompt, self._inputs[i], self._method),
                self._candidates(i),
                weight=1 / self._settings.rows_per_step,
            )
            for i in next(self._schedule)
        ]

    def _candidates(self, i: int) -> list[tuple[int, ...]]:
        right = self.job.train[i][1]
        others = [label for label in self.job.labels or () if label != right]
        if len(others) > _MAX_OTHER_LABELS:
            others = self._random.sample(others, _MAX_OTHER_LABELS)
        return [self._output_ids[label] for label in (right, *others)]

    def stepped(self, loss: float) -> None:
        """Take the mean training loss of a step."""
        self._losses.append(loss)
        self._failed = not math.isfinite(loss)

    def validated(self, quality: Quality) -> None:
        """Keep the prompt as it is now if it is the best so far."""
        self._validations.append(Validation(len(self._losses), quality.score, -quality.minus_loss))
        better = self._best is None or quality.clearly_exceeds(self._best[0])
        if better and math.isfinite(quality.minus_loss):
            self._best = (quality, self.prompt.detach().clone())
            self._stale = 0
        else:
            self._stale += 1

    def values(self) -> dict[str, Any]:
        """What has changed since it was made, apart from tensors: see `restore`."""
        return {
            "losses": self._losses,
            "validations": [asdict(validation) for validation in self._validations],
            "best": None if self._best is None else astuple(self._best[0]),
            "stale": self._stale,
            "failed": self._failed,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that have changed."""
        best = {} if self._best is None else {"best": self._best[1]}
        trained = {str(n): weights for n, weights in enumerate(self.parameters.trained)}
        return {**best, **trained}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Make a new task what the one was that gave `values` and `tensors`."""
        for _ in values["losses"]:
            self.next_rows()  # the same draws as then, so that the next ones are the same too
        self._losses = list(values["losses"])
        self._validations = [Validation(**validation) for validation in values["validations"]]
        self._stale, self._failed = values["stale"], values["failed"]
        if values["best"] is not None:
            best = tensors["best"].to(self.prompt.device)
            self._best = (Quality(*values["best"]), best)
        with torch.no_grad():
            for number, weights in enumerate(self.parameters.trained):
                weights.copy_(tensors[str(number)])
        self.parameters.follow()

    @property
    def quality(self) -> Quality:
        """Of the best prompt so far; nothing is worse than that of a task that failed."""
        if self._failed or self._best is None:
            return Quality(-math.inf, -math.inf)
        return self._best[0]

    def result(self, seconds: float) -> TunedPrompt | TuningFailure:
        """What became of the task."""
        if self._failed or self._best is None:
            return TuningFailure(
                self.job.name,
                f"the loss was not finite at step {len(self._losses)}",
                "lower the learning rate, or look for odd rows",
            )
        quality, prompt = self._best
        return TunedPrompt(
            name=self.job.name,
            values=prompt.cpu().numpy().astype(np.float32),
            scores={"prompt": quality.score, **self.baselines},
            validation_loss=-quality.minus_loss,
            losses=tuple(self._losses),
            steps=len(self._losses),
            seconds=seconds,
            method=self._method,
            layers=self._layers,
            settings={**asdict(self._settings), "started_from": self._started_from},
            validations=tuple(self._validations),
        )


def _descend(
    model: TorchLanguageModel,
    tasks: Sequence[_Task],
    settings: TuningSettings,
    progress: Progress,
    checkpoints: Checkpoints | None,
) -> None:
    """AdamW over the prompts of all tasks, until each has stopped."""
    learner = model.copy_for_gradients(settings.precision)
    micro_batches = MicroBatches(
        learner, settings.micro_batch_positions, lambda said: progress("", said, 1, 1)
    )
    optimizer = torch.optim.AdamW(
        [weights for task in tasks for weights in task.parameters.trained],
        settings.learning_rate,
        _BETAS,
        weight_decay=0.0,
    )
    validate_after = validation_steps(settings.steps, settings.validations)
    first = 0
    if checkpoints is not None:
        first = resume(checkpoints, _identity(model, tasks, settings), tasks, optimizer)
    if first:
        progress("", f"going on after step {first}, where it was cut short", 1, 1)
    else:
        _validate(model, tasks)
    for step in range(first, settings.steps):
        running = [task for task in tasks if task.is_running]
        if not running:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share_of_rate(
                step, settings.steps, settings.warmup_steps, settings.schedule
            )
        optimizer.zero_grad()  # the prompt of a task that has stopped gets no gradient: it rests
        _add_gradients(micro_batches, running)
        for task in running:
            task.parameters.take_gradient(settings.clip_norm)
        optimizer.step()
        for task in running:
            task.parameters.follow()
        if step in validate_after:
            _validate(model, [task for task in running if task.is_running])
        if checkpoints is not None and checkpoints.is_due:
            checkpoints.write(state_of(tasks, optimizer, step + 1))
        progress("", "tune", step + 1, settings.steps)


def _identity(
    model: TorchLanguageModel, tasks: Sequence[_Task], settings: TuningSettings
) -> dict[str, object]:
    """What the prompts depend on, as values of JSON."""
    return {
        "base_model": model.fingerprint,
        "device": model.device.type,
        "settings": asdict(settings),
        "versions": [version(name) for name in ("promptyard", "torch", "transformers")],
        "tasks": [[task.job.identity, task.seed] for task in tasks],
    }


def _add_gradients(batches: MicroBatches, tasks: Sequence[_Task]) -> None:
    """Add the gradient of each task's mean loss to its prompt."""
    rows = [task.next_rows() for task in tasks]
    losses = iter(batches.add([row for of_task in rows for row in of_task]))
    for task, of_task in zip(tasks, rows, strict=True):
        task.stepped(sum(next(losses) * row.weight for row in of_task))


def _validate(model: TorchLanguageModel, tasks: Sequence[_Task]) -> None:
    qualities = measure(model, [task.trial() for task in tasks])
    for task, quality in zip(tasks, qualities, strict=True):
        task.validated(quality)


def _check(jobs: Sequence[TuningJob], settings: TuningSettings) -> None:
    for field in (
        *("length", "steps", "rows_per_step", "validations", "patience", "seeds", "bottleneck"),
    ):
        if getattr(settings, field) < 1:
            raise InvalidInputError(field, getattr(settings, field), "give at least 1")
    if not 0 < settings.learning_rate < math.inf:
        raise InvalidInputError("learning rate", settings.learning_rate, "give a positive number")
    for field, choices in _CHOICES.items():
        if getattr(settings, field) not in get_args(choices):
            raise InvalidInputError(
                field, getattr(settings, field), f"choose one of {', '.join(get_args(choices))}"
            )
    for field in ("warmup_steps", "clip_norm", "micro_batch_positions"):
        if not 0 <= getattr(settings, field) < math.inf:
            raise InvalidInputError(field, getattr(settings, field), "give 0 or more")
    repeated = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if repeated:
        raise InvalidInputError("task name", repeated[0], "name every task once")
