"""Tunes soft prompts by gradient descent. The base model stays frozen; only the prompts move.

Several tasks are tuned in the same batches. They share the forward passes and nothing else: a
task's rows, schedule and gradient are the same whether it is tuned alone or beside others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version

import torch

from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, PromptyardError
from router.interfaces import LanguageModel
from trainer.checkpoint import Checkpoints, resume, state_of
from trainer.gradients import MicroBatches
from trainer.prompt_quality import measure
from trainer.schedule import share_of_rate, validation_steps
from trainer.task_tuning import TaskTuning
from trainer.tuned_prompt import TunedPrompt, TuningFailure
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
) -> dict[str, TunedPrompt | TuningFailure]:
    """Tune a soft prompt for every job, all of them together; the results are by job name.

    Deterministic for a seed on the same kind of processor, also where it goes on from a checkpoint.

    Raises:
        InvalidInputError: settings that cannot be used, or two jobs of one name.
        IncompatibleModelError: gradients cannot be computed through this kind of model, or its
            architecture does not allow the method.
    """
    check_tuning(jobs, settings)
    if not isinstance(model, TorchLanguageModel):
        raise IncompatibleModelError(
            "base model", model.name, "prompts are tuned with a Hugging Face model"
        )
    model.prompt_width(settings.method)
    began = time.perf_counter()
    results: dict[str, TunedPrompt | TuningFailure] = {}
    tasks: dict[str, list[TaskTuning]] = {}
    for job in jobs:
        try:
            first = TaskTuning(model, job, settings)
            others = [
                replace(settings, seed=settings.seed + more) for more in range(1, settings.seeds)
            ]
            tasks[job.name] = [
                first,
                *(TaskTuning(model, job, other, first.baselines) for other in others),
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
    best = {name: max(of_job, key=lambda task: task.quality) for name, of_job in tasks.items()}
    refitted = {name: again for name, task in best.items() if (again := task.refitted(model))}
    if refitted:
        _descend(model, list(refitted.values()), settings, progress, stage="refit")
    share = (time.perf_counter() - began) / max(1, len(tasks))
    for name, task in best.items():
        results[name] = task.result(share, refitted.get(name), task.probabilities(model))
    return {job.name: results[job.name] for job in jobs}


def _descend(
    model: TorchLanguageModel,
    tasks: Sequence[TaskTuning],
    settings: TuningSettings,
    progress: Progress,
    checkpoints: Checkpoints | None = None,
    stage: str = "tune",
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
        progress("", stage, step + 1, settings.steps)


def _identity(
    model: TorchLanguageModel, tasks: Sequence[TaskTuning], settings: TuningSettings
) -> dict[str, object]:
    """What the prompts depend on, as values of JSON."""
    return {
        "base_model": model.fingerprint,
        "device": model.device.type,
        "settings": asdict(settings),
        "versions": [version(name) for name in ("promptyard", "torch", "transformers")],
        "tasks": [[task.job.identity, task.seed] for task in tasks],
    }


def _add_gradients(batches: MicroBatches, tasks: Sequence[TaskTuning]) -> None:
    """Add the gradient of each task's mean loss to its prompt."""
    rows = [task.next_rows() for task in tasks]
    losses = iter(batches.add([row for of_task in rows for row in of_task]))
    for task, of_task in zip(tasks, rows, strict=True):
        task.stepped(sum(next(losses) * row.weight for row in of_task))


def _validate(model: TorchLanguageModel, tasks: Sequence[TaskTuning]) -> None:
    tasks = [task for task in tasks if task.is_validated]
    qualities = measure(model, [task.trial() for task in tasks])
    for task, quality in zip(tasks, qualities, strict=True):
        task.validated(quality)
