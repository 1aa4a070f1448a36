"""Parts `tuning-speed` and `serving-speed`: Promptyard beside PEFT on the same network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from prompts_peft import SwitchingAdapters, tune_one_after_the_other
from prompts_plan import Bench, Record, seconds_of, tuned_prompts

from router.backends.torch_model import TorchLanguageModel
from router.interfaces import FloatArray, PromptedInput
from trainer.initialisation import Start, initial_prompt
from trainer.tuning_settings import TuningJob, TuningSettings

# Training losses of each step, by task.
Losses = dict[str, Sequence[float]]

# `tune` always looks at the validation rows; one row a task keeps that from being measured.
_VALIDATION_ROWS = 1
_PROMPTS = 16
_PROMPT_NOISE = 1e-3


def tuning_speed(bench: Bench) -> Iterator[Record]:
    """Seconds to tune all tasks, and the training loss at the end, a record each repeat.

    Three sides: Promptyard with its own loss (which also compares the labels), Promptyard with
    PEFT's loss, and PEFT. All prompts start from the same values.
    """
    model = bench.model("auto")
    settings = bench.settings(
        initialisation="nearest", validations=1, precision="auto", learning_rate=bench.options.rate
    )
    jobs = [
        replace(task.job, validation=task.job.validation[:_VALIDATION_ROWS]) for task in bench.tasks
    ]
    starts = {job.name: text_start(model, job, bench.options.length) for job in jobs}
    jobs = [replace(job, starts=(Start("text", starts[job.name]),)) for job in jobs]
    free = [replace(job, labels=None) for job in jobs]
    sides: dict[str, Callable[[TuningSettings], Losses]] = {
        "promptyard": lambda told: _tuned_together(model, jobs, told),
        "promptyard, PEFT's loss": lambda told: _tuned_together(model, free, told),
        "PEFT": lambda told: tune_one_after_the_other(model, jobs, starts, told),
    }
    for side in sides.values():
        side(replace(settings, steps=1))  # kernels are chosen and memory is taken here
    for repeat in range(bench.options.repeats):
        for name, side in sides.items():
            found: Losses = {}
            seconds = seconds_of(partial(_keep, side, settings, found), model.device)
            last = [np.mean(losses[-max(1, bench.steps // 4) :]) for losses in found.values()]
            yield {
                "side": name,
                "repeat": repeat,
                "tasks": len(jobs),
                "seconds": seconds,
                "training_loss": float(np.mean(last)),
            }


def _keep(side: Callable[[TuningSettings], Losses], settings: TuningSettings, to: Losses) -> None:
    to.update(side(settings))


def _tuned_together(
    model: TorchLanguageModel, jobs: Sequence[TuningJob], settings: TuningSettings
) -> Losses:
    return {name: tuned.losses for name, tuned in tuned_prompts(model, jobs, settings).items()}


def text_start(model: TorchLanguageModel, job: TuningJob, length: int) -> FloatArray:
    """The prompt that is made of instruction and labels."""
    return initial_prompt(model, "text", job, length, 0).detach().cpu().numpy()


def serving_speed(bench: Bench) -> Iterator[Record]:
    """Seconds for a batch whose rows have different prompts, by generating and by scoring.

    PEFT serves it twice: rows of a prompt together, and each row by itself, as requests come.
    """
    model = bench.model("auto")
    options = bench.options
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for number in range(_PROMPTS):
        start = torch.tensor(
            text_start(model, bench.tasks[number % len(bench.tasks)].job, options.length)
        )
        noise = torch.randn(start.shape, generator=generator) * _PROMPT_NOISE
        prompts.append((start + noise).numpy())
    of_row = [i % _PROMPTS for i in range(options.serving_rows)]
    rows = []
    for place, number in enumerate(of_row):
        dev = bench.tasks[number % len(bench.tasks)].job.validation
        rows.append(dev[place // _PROMPTS % len(dev)])
    texts = [text for text, _ in rows]
    outputs = [output for _, output in rows]
    inputs = [
        PromptedInput(text, prompts[number]) for text, number in zip(texts, of_row, strict=True)
    ]
    peft = SwitchingAdapters(model, prompts)
    new_tokens = options.new_tokens
    sides: dict[str, dict[str, Callable[[], list[object]]]] = {
        "generate": {
            "promptyard": lambda: [a.text.strip() for a in model.generate(inputs, new_tokens)],
            "PEFT, grouped": lambda: peft.answers(texts, of_row, new_tokens, grouped=True),
            "PEFT, row by row": lambda: peft.answers(texts, of_row, new_tokens, grouped=False),
        },
        "score": {
            "promptyard": lambda: [
                float(row.log_probabilities[0])
                for row in model.score(inputs, [(output,) for output in outputs])
            ],
            "PEFT, grouped": lambda: peft.scores(texts, of_row, outputs, grouped=True),
            "PEFT, row by row": lambda: peft.scores(texts, of_row, outputs, grouped=False),
        },
    }
    for work, ways in sides.items():
        answers = {name: way() for name, way in ways.items()}  # also warms up
        for repeat in range(options.repeats):
            for name, way in ways.items():
                yield {
                    "work": work,
                    "side": name,
                    "repeat": repeat,
                    "rows": len(rows),
                    "prompts": _PROMPTS,
                    "seconds": seconds_of(way, model.device),
                    "as_promptyard": _agreement(answers["promptyard"], answers[name]),
                }


def _agreement(ours: Sequence[object], theirs: Sequence[object]) -> float:
    """Share of rows with the same answer, or the same log p within 0.05 (bfloat16 rounds)."""
    same = [
        abs(a - b) <= 0.05 * max(1.0, abs(a))
        if isinstance(a, float) and isinstance(b, float)
        else a == b
        for a, b in zip(ours, theirs, strict=True)
    ]
    return sum(same) / len(same)
