"""Tunes soft prompts by gradient descent. The base model stays frozen; only the prompts move.

Several tasks are tuned in the same batches. They share the forward passes and nothing else: a
task's rows, schedule and gradient are the same whether it is tuned alone or beside others.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from router.backends.rows import Row, batches
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError, PromptyardError
from router.interfaces import LanguageModel
from router.tasks import PromptMethod
from trainer.commands import Initialisation
from trainer.initialisation import initial_prompt
from trainer.prompt_quality import LabelledRow, Quality, Trial, baseline_scores, measure
from trainer.tuned_prompt import TunedPrompt, TuningFailure, Validation

# progress(task or "", stage, done, total)
Progress = Callable[[str, str, int, int], None]

# Keys and values move the answers more than input embeddings do.
PREFIX_LEARNING_RATE = 0.01

_BETAS = (0.9, 0.98)
_MAX_POSITIONS = {"cpu": 2048, "cuda": 32_768}
# Padding that costs less than the fixed work of one more forward and backward pass.
_MAX_PADDING = {"cpu": 96, "cuda": 8192}
_MAX_WARMUP_SHARE = 0.1
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

    @classmethod
    def of_method(cls, method: PromptMethod) -> TuningSettings:
        """The defaults of a method."""
        if method == "prefix":
            return cls(method=method, learning_rate=PREFIX_LEARNING_RATE)
        return cls(method=method)


@dataclass(frozen=True, slots=True)
class TuningJob:
    """A task to tune a prompt for: rows are (input, output).

    `labels` is the closed set of outputs, or None where the outputs are free text.
    """

    name: str
    instruction: str
    labels: tuple[str, ...] | None
    train: Sequence[LabelledRow]
    validation: Sequence[LabelledRow]


def tune(
    model: LanguageModel,
    jobs: Sequence[TuningJob],
    settings: TuningSettings = TuningSettings(),
    progress: Progress = lambda *_: None,
) -> dict[str, TunedPrompt | TuningFailure]:
    """Tune a soft prompt for every job, all of them together; the results are by job name.

    Deterministic for a seed on the same kind of processor.

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
    tasks: list[_Task] = []
    for job in jobs:
        try:
            tasks.append(_Task(model, job, settings))
        except PromptyardError as error:
            results[job.name] = TuningFailure(
                job.name, f"{error.field}: {error.value}", error.remedy
            )
    if tasks:
        _descend(model, tasks, settings, progress)
    share = (time.perf_counter() - began) / max(1, len(tasks))
    for task in tasks:
        results[task.job.name] = task.result(share)
    return {job.name: results[job.name] for job in jobs}


class _Task:
    """The state of one task while it is tuned."""

    def __init__(self, model: TorchLanguageModel, job: TuningJob, settings: TuningSettings) -> None:
        for field, rows in (("train", job.train), ("validation", job.validation)):
            if not rows:
                raise InvalidInputError(f"{field} rows of {job.name}", "none", "give some")
            strangers = {output for _, output in rows if output not in (job.labels or (output,))}
            if strangers:
                raise InvalidInputError(
                    f"{field} rows of {job.name}", min(strangers), "use one of the labels"
                )
        self.job = job
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
        self._schedule = _passes(len(job.train), settings.rows_per_step, self._random)
        self.prompt = initial_prompt(
            model,
            settings.initialisation,
            settings.length,
            job.instruction,
            job.labels,
            job.train,
            settings.seed,
            settings.method,
        ).requires_grad_()
        self._baselines = baseline_scores(
            model, job.instruction, job.labels, job.train, job.validation
        )
        self._best: tuple[Quality, Tensor] | None = None
        self._stale = 0
        self._losses: list[float] = []
        self._validations: list[Validation] = []
        self._failed = False
        self._patience = settings.patience

    @property
    def is_running(self) -> bool:
        """Whether the task takes part in the next step."""
        return not self._failed and self._stale < self._patience

    def trial(self) -> Trial:
        """The prompt as it is now, on the validation rows."""
        return Trial(self.prompt.detach(), self.job.labels, self.job.validation, self._method)

    def next_rows(self) -> list[_TrainingRow]:
        """The rows of the next step."""
        return [
            _TrainingRow(self, Row(self.prompt, self._inputs[i], self._method), self._candidates(i))
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
            scores={"prompt": quality.score, **self._baselines},
            validation_loss=-quality.minus_loss,
            losses=tuple(self._losses),
            steps=len(self._losses),
            seconds=seconds,
            method=self._method,
            layers=self._layers,
            settings=asdict(self._settings),
            validations=tuple(self._validations),
        )


@dataclass(frozen=True, slots=True)
class _TrainingRow:
    """One row of a step. The first of `candidates` is the right output."""

    task: _Task
    row: Row
    candidates: Sequence[tuple[int, ...]]


def _descend(
    model: TorchLanguageModel,
    tasks: Sequence[_Task],
    settings: TuningSettings,
    progress: Progress,
) -> None:
    """AdamW over the prompts of all tasks, until each has stopped."""
    learner = model.copy_for_gradients()
    optimizer = torch.optim.AdamW(
        [task.prompt for task in tasks], settings.learning_rate, _BETAS, weight_decay=0.0
    )
    validate_after = _validation_steps(settings)
    _validate(model, tasks)
    for step in range(settings.steps):
        running = [task for task in tasks if task.is_running]
        if not running:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _share_of_rate(step, settings)
        optimizer.zero_grad()  # the prompt of a task that has stopped gets no gradient: it rests
        _accumulate_gradients(learner, [row for task in running for row in task.next_rows()])
        optimizer.step()
        if step in validate_after:
            _validate(model, [task for task in running if task.is_running])
        progress("", "tune", step + 1, settings.steps)


def _accumulate_gradients(model: TorchLanguageModel, rows: Sequence[_TrainingRow]) -> None:
    """Add the gradient of each task's mean loss to its prompt, in batches of similar length."""
    of_task = Counter(id(row.task) for row in rows)
    sums: dict[int, float] = dict.fromkeys(of_task, 0.0)
    kind = model.device.type
    for batch in batches(
        [len(row.row) for row in rows],
        _MAX_POSITIONS.get(kind, _MAX_POSITIONS["cuda"]),
        _MAX_PADDING.get(kind, _MAX_PADDING["cuda"]),
    ):
        chosen = [rows[i] for i in batch]
        losses = _losses(model, chosen)
        shares = losses.new_tensor([1 / of_task[id(row.task)] for row in chosen])
        torch.autograd.backward((losses * shares).sum())
        for row, loss in zip(chosen, (losses * shares).tolist(), strict=True):
            sums[id(row.task)] += loss
    for task in {id(row.task): row.task for row in rows}.values():
        task.stepped(sums[id(task)])


def _losses(model: TorchLanguageModel, rows: Sequence[_TrainingRow]) -> Tensor:
    """Loss per row `[B]`: to write the right output, and to prefer it to the other labels.

    The second term is cross-entropy over the labels' scores, which is what answers are chosen by;
    without it a prompt learns how often labels occur sooner than how to tell them apart. It is
    zero where the outputs are free text.
    """
    scores = model.log_likelihoods([row.row for row in rows], [row.candidates for row in rows])
    right = torch.stack([of_row[0] for of_row in scores])
    preferred = torch.stack([of_row.log_softmax(0)[0] for of_row in scores])
    return -(right + preferred)


def _validate(model: TorchLanguageModel, tasks: Sequence[_Task]) -> None:
    qualities = measure(model, [task.trial() for task in tasks])
    for task, quality in zip(tasks, qualities, strict=True):
        task.validated(quality)


def _share_of_rate(step: int, settings: TuningSettings) -> float:
    warmup = min(settings.warmup_steps, math.ceil(settings.steps * _MAX_WARMUP_SHARE))
    decay = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return min(1.0, (step + 1) / warmup) * decay if warmup else decay


def _validation_steps(settings: TuningSettings) -> set[int]:
    count = min(settings.validations, settings.steps)
    return {round(settings.steps * (k + 1) / count) - 1 for k in range(count)}


def _passes(rows: int, per_step: int, generator: random.Random) -> Iterator[list[int]]:
    """Row numbers for each step: pass after pass through all rows, each in a new order."""
    waiting: list[int] = []
    while True:
        while len(waiting) < per_step:
            order = list(range(rows))
            generator.shuffle(order)
            waiting += order
        yield waiting[:per_step]
        waiting = waiting[per_step:]


def _check(jobs: Sequence[TuningJob], settings: TuningSettings) -> None:
    for field in ("length", "steps", "rows_per_step", "validations", "patience"):
        if getattr(settings, field) < 1:
            raise InvalidInputError(field, getattr(settings, field), "give at least 1")
    if not 0 < settings.learning_rate < math.inf:
        raise InvalidInputError("learning rate", settings.learning_rate, "give a positive number")
    if settings.method not in get_args(PromptMethod):
        raise InvalidInputError(
            "method", settings.method, f"choose one of {', '.join(get_args(PromptMethod))}"
        )
    if settings.initialisation not in get_args(Initialisation):
        raise InvalidInputError(
            "initialisation",
            settings.initialisation,
            f"choose one of {', '.join(get_args(Initialisation))}",
        )
    if settings.warmup_steps < 0:
        raise InvalidInputError("warm-up steps", settings.warmup_steps, "give 0 or more")
    repeated = [name for name, count in Counter(job.name for job in jobs).items() if count > 1]
    if repeated:
        raise InvalidInputError("task name", repeated[0], "name every task once")
