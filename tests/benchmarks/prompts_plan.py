"""What the parts of `bench_prompts.py` share: options, tasks, base model, and the clock."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from bench_base_model import Task

from router.backends.language_model import Precision, load_language_model
from router.backends.torch_model import TorchLanguageModel
from trainer.prompt_quality import Quality, Trial, measure
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning import tune
from trainer.tuning_settings import TuningJob, TuningSettings

# One line of figures; a part gives many, and files of several runs are put together.
Record = dict[str, object]

# What each way is tried with: the same number of rates each, the likeliest first.
RATES = {
    "prompt": (0.03, 0.01, 0.1),
    "prefix": (0.03, 0.1, 0.01),
    "lora": (1e-3, 3e-3, 3e-4),
    "adapter": (1e-3, 3e-3, 3e-4),
    "full": (1e-4, 3e-4, 3e-5),
}


@dataclass(frozen=True, slots=True)
class Bench:
    """One part to run: what was asked for, and the tasks with at most so many rows."""

    options: argparse.Namespace
    tasks: Sequence[Task]
    steps: int

    def model(self, precision: Precision = "float32") -> TorchLanguageModel:
        """The base model, loaded anew."""
        options = self.options
        return load_language_model(
            options.model, device=options.device, precision=precision, threads=options.threads
        )

    @property
    def seeds(self) -> range:
        """Those to measure."""
        return range(self.options.first_seed, self.options.first_seed + self.options.seeds)

    def rates(self, method: str) -> tuple[float, ...]:
        """The learning rates to choose from by dev rows."""
        return RATES[method][: self.options.rates]

    def settings(self, **others: object) -> TuningSettings:
        """Those of `trainer.tuning`, without what would make steps or rows differ."""
        options = self.options
        given = {
            "length": options.length,
            "steps": self.steps,
            "rows_per_step": options.rows_per_step,
            "validations": options.validations,
            "patience": options.validations + 1,
            "initialisation": "text",
            "refit": "never",
            "precision": "float32",
            **others,
        }
        return TuningSettings(**given)


def synchronize(device: torch.device) -> None:
    """Wait for what was sent to a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, to its end on the device."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def tuned_prompts(
    model: TorchLanguageModel, jobs: Sequence[TuningJob], settings: TuningSettings
) -> dict[str, TunedPrompt]:
    """The prompts of all jobs, tuned together; leaves with the reason where one fails."""
    prompts = {}
    for name, result in tune(model, jobs, settings).items():
        if not isinstance(result, TunedPrompt):
            raise SystemExit(f"{name}: {result.reason}")
        prompts[name] = result
    return prompts


def quality_of(model: TorchLanguageModel, trial: Trial) -> Quality:
    """Of one trial."""
    return measure(model, [trial])[0]
