"""Tunes soft prompts by gradient descent. The base model stays frozen; only the prompts move.

Several tasks, and several settings of each, are tuned in the same batches. They share the forward
passes and nothing else: a task's rows, schedule and gradient are the same whether it is tuned alone
or beside others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version

import torch
from torch import Tensor

from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError
from router.interfaces import LanguageModel
from trainer.checkpoint import Checkpoints, resume, state_of
from trainer.commands import Schedule
from trainer.gradients import MicroBatches
from trainer.job_tuning import JobTuning
from trainer.prompt_quality import measure
from trainer.schedule import share_of_rate
from trainer.task_tuning import TaskTuning
from trainer.tuned_prompt import TunedPrompt, TuningFailure
from trainer.tuning_log import TuningLog
from trainer.tuning_settings import TuningJob, TuningSettings, check_tuning

# progress(task or "", stage, done, total)
Progress = Callable[[str, str, int, int], None]

_BETAS = (0.9, 0.98)
_DEFAULTS = TuningSettings()


def tune(
    model: LanguageModel,
    jobs: Sequence[TuningJob],
    settings: TuningSettings = _DEFAULTS,
    progress: Progress = lambda *_: None,
    checkpoints: Checkpoints | None = None,
    others: Sequence[TuningSettings] = (),
    log: TuningLog | None = None,
) -> dict[str, TunedPrompt | TuningFailure]:
    """Tune a soft prompt for every job, all of them together; the results are by job name.

    With `others`, each job is tuned with `settings` and with each of them, which differ in what
    `trainer.search` may search; the worse ones are stopped early, and the best prompt on the
    validation rows is kept. `log` gets the figures of every step and validation.

    Deterministic for a seed on the same kind of processor, also where it goes on from a checkpoint.

    Raises:
        InvalidInputError: settings that cannot be used, or two jobs of one name.
        IncompatibleModelError: gradients cannot be computed through this kind of model, or its
            architecture does not allow the method.
    """
    configurations = (settings, *others)
    for each in configurations:
        check_tuning(jobs, each)
    results = tune_each(model, [(job, configurations) for job in jobs], progress, checkpoints, log)
    return {job.name: result for job, result in zip(jobs, results, strict=True)}


def tune_each(
    model: LanguageModel,
    wanted: Sequence[tuple[TuningJob, Sequence[TuningSettings]]],
    progress: Progress = lambda *_: None,
    checkpoints: Checkpoints | None = None,
    log: TuningLog | None = None,
) -> list[TunedPrompt | TuningFailure]:
    """As `tune`, for jobs with settings of their own; the results are in the order of the jobs.

    All settings must have the same `precision` and `micro_batch_positions`, which the forward
    passes share, and must have been checked.

    Raises:
        IncompatibleModelError: as `tune`.
    """
    if not isinstance(model, TorchLanguageModel):
        raise IncompatibleModelError(
            "base model", model.name, "prompts are tuned with a Hugging Face model"
        )
    for method in sorted({each.method for _, settings in wanted for each in settings}):
        model.prompt_width(method)
    began = time.perf_counter()
    tunings = [JobTuning(model, job, settings) for job, settings in wanted]
    tasks = [task for tuning in tunings for task in tuning.tried]
    if tasks:
        _descend(model, tasks, progress, checkpoints, tunings, log)
    refitted = [tuning.refitted(model) for tuning in tunings]
    again = [task for task in refitted if task is not None]
    if again:
        _descend(model, again, progress, log=log, stage="refit")
    share = (time.perf_counter() - began) / max(1, sum(bool(tuning.tried) for tuning in tunings))
    return [
        tuning.result(model, share, last) for tuning, last in zip(tunings, refitted, strict=True)
    ]


def _descend(
    model: TorchLanguageModel,
    tasks: Sequence[TaskTuning],
    progress: Progress,
    checkpoints: Checkpoints | None = None,
    tunings: Sequence[JobTuning] = (),
    log: TuningLog | None = None,
    stage: str = "tune",
) -> None:
    """AdamW over the prompts of all tasks, until each has stopped or was stopped by its tuning."""
    shared = tasks[0].settings
    learner = model.copy_for_gradients(shared.precision)
    micro_batches = MicroBatches(
        learner, shared.micro_batch_positions, lambda said: progress("", said, 1, 1)
    )
    schedules: dict[tuple[float, int, int, Schedule], list[Tensor]] = {}
    for task in tasks:
        schedules.setdefault(_schedule(task.settings), []).extend(task.parameters.trained)
    optimizer = torch.optim.AdamW(
        [{"params": weights} for weights in schedules.values()], betas=_BETAS, weight_decay=0.0
    )
    steps = max(task.settings.steps for task in tasks)
    first = 0
    if checkpoints is not None:
        first = resume(checkpoints, _identity(model, tasks), tasks, optimizer)
    if log is not None:
        for task in tasks:
            log.begin(task.run, first + 1 if first else 0, asdict(task.settings))
    if first:
        progress("", f"going on after step {first}, where it was cut short", 1, 1)
    else:
        _validate(model, tasks, log)
    for step in range(first, steps):
        _stop_worse(tunings, progress)
        running = [task for task in tasks if task.is_running]
        if not running:
            break
        for group, (rate, of_all, warmup, kind) in zip(
            optimizer.param_groups, schedules, strict=True
        ):
            group["lr"] = rate * share_of_rate(step, of_all, warmup, kind)
        optimizer.zero_grad()  # the prompt of a task that has stopped gets no gradient: it rests
        _add_gradients(micro_batches, running, log)
        for task in running:
            task.parameters.take_gradient(task.settings.clip_norm)
        optimizer.step()
        for task in running:
            task.parameters.follow()
        _validate(model, [task for task in running if task.is_due], log)
        if checkpoints is not None and checkpoints.is_due:
            checkpoints.write(state_of(tasks, optimizer, step + 1))
        progress("", stage, step + 1, steps)


def _schedule(settings: TuningSettings) -> tuple[float, int, int, Schedule]:
    """What the learning rate of a step depends on: tasks that share it share a step of AdamW."""
    return settings.learning_rate, settings.steps, settings.warmup_steps, settings.schedule


def _stop_worse(tunings: Sequence[JobTuning], progress: Progress) -> None:
    stopped = sum([tuning.stop_worse() for tuning in tunings])
    if stopped:
        left = sum(task.is_running for tuning in tunings for task in tuning.tried)
        progress("", f"search: {stopped} configurations stopped, {left} go on", 1, 1)


def _identity(model: TorchLanguageModel, tasks: Sequence[TaskTuning]) -> dict[str, object]:
    """What the prompts depend on, as values of JSON."""
    return {
        "base_model": model.fingerprint,
        "device": model.device.type,
        "versions": [version(name) for name in ("promptyard", "torch", "transformers")],
        "tasks": [[task.job.identity, asdict(task.settings)] for task in tasks],
    }


def _add_gradients(
    batches: MicroBatches, tasks: Sequence[TaskTuning], log: TuningLog | None
) -> None:
    """Add the gradient of each task's mean loss to its prompt."""
    rows = [task.next_rows() for task in tasks]
    losses = iter(batches.add([row for of_task in rows for row in of_task]))
    for task, of_task in zip(tasks, rows, strict=True):
        figures = task.stepped(sum(next(losses) * row.weight for row in of_task))
        if log is not None:
            log.write(task.run, task.steps, figures)


def _validate(
    model: TorchLanguageModel, tasks: Sequence[TaskTuning], log: TuningLog | None
) -> None:
    tasks = [task for task in tasks if task.is_validated]
    qualities = measure(model, [task.trial() for task in tasks]) if tasks else []
    for task, quality in zip(tasks, qualities, strict=True):
        figures = task.validated(quality)
        if log is not None:
            log.write(task.run, task.steps, figures)
