"""Parts `accuracy` and `data-size`: prompts tuned together, all as `trainer.tuning` does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from bench_base_model import Task, computing
from prompts_learners import taught
from prompts_plan import Bench, Record, tuned_prompts

from router.backends.torch_model import TorchLanguageModel
from router.tasks import PromptMethod
from trainer.initialisation import Start
from trainer.prompt_quality import Quality, Trial, measure
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning_settings import TuningJob

_METHODS: tuple[PromptMethod, ...] = ("prompt", "prefix")
_STARTS = ("text", "nearest", "vocabulary")
_DATA_SIZE_VALIDATIONS = 10


def accuracy(bench: Bench) -> Iterator[Record]:
    """Test accuracy of prompts and prefixes, all tasks together, and of full fine-tuning.

    The same steps, rows, number of rates and checks on dev rows for all three.
    """
    model = bench.model()
    with computing(model, bench.options.bf16):
        for seed in bench.seeds:
            for method in _METHODS:
                if method in bench.options.methods:
                    yield from _prompts(model, method, bench, seed)
            if "full" in bench.options.methods:
                for task in bench.tasks:
                    yield {"method": "full", **taught(model, task, "full", bench, seed)}


def _prompts(
    model: TorchLanguageModel, method: PromptMethod, bench: Bench, seed: int
) -> Iterator[Record]:
    best = best_prompts(model, method, bench, seed)
    tests = of_tests(model, bench.tasks, [each.prompt for each in best])
    for task, each, test in zip(bench.tasks, best, tests, strict=True):
        yield {
            "method": method,
            "task": task.job.name,
            "seed": seed,
            "rate": each.rate,
            "dev": each.prompt.scores["prompt"],
            "test": test,
        }


@dataclass(frozen=True, slots=True)
class BestPrompt:
    """The best prompt of a task by its dev rows, and the learning rate that it was tuned with."""

    prompt: TunedPrompt
    rate: float


def best_prompts(
    model: TorchLanguageModel, method: PromptMethod, bench: Bench, seed: int
) -> list[BestPrompt]:
    """The best prompt of each task of every rate, all tasks tuned together."""
    best: dict[str, tuple[Quality, BestPrompt]] = {}
    for rate in bench.rates(method):
        settings = bench.settings(method=method, learning_rate=rate, seed=seed)
        for name, tuned in tuned_prompts(model, [t.job for t in bench.tasks], settings).items():
            quality = Quality(tuned.scores["prompt"], -tuned.validation_loss)
            if name not in best or quality > best[name][0]:
                best[name] = quality, BestPrompt(tuned, rate)
    return [best[task.job.name][1] for task in bench.tasks]


def of_tests(
    model: TorchLanguageModel, tasks: Sequence[Task], prompts: Sequence[TunedPrompt]
) -> list[float]:
    """Test accuracy of each task under its prompt; the rows of all tasks share batches."""
    trials = [
        Trial(
            torch.tensor(prompt.values, device=model.device),
            task.job.labels,
            task.test,
            prompt.method,
        )
        for task, prompt in zip(tasks, prompts, strict=True)
    ]
    return [quality.score for quality in measure(model, trials)]


def data_size(bench: Bench) -> Iterator[Record]:
    """Test accuracy by the number of train rows and by what prompts start from.

    There are as many dev rows as train rows, up to `--dev-rows`. `nearest` starts from the prompts
    of the other tasks, tuned on all their rows: the one with the least loss on the dev rows.
    `steps_to_loss` is after how many steps the dev loss was first as low as the best one that the
    vocabulary start came to on the same rows; None where it never was.
    """
    model = bench.model()
    options = bench.options
    with computing(model, options.bf16):
        donors = tuned_prompts(
            model, [task.job for task in bench.tasks], bench.settings(learning_rate=options.rate)
        )
        for size in options.sizes:
            for seed in bench.seeds:
                jobs = [_fewer(task.job, size, seed, donors) for task in bench.tasks]
                tuned = {
                    start: tuned_prompts(
                        model,
                        jobs,
                        bench.settings(
                            initialisation=start,
                            seed=seed,
                            learning_rate=options.rate,
                            validations=_DATA_SIZE_VALIDATIONS,
                            patience=_DATA_SIZE_VALIDATIONS + 1,
                        ),
                    )
                    for start in _STARTS
                }
                for start in _STARTS:
                    prompts = [tuned[start][job.name] for job in jobs]
                    tests = of_tests(model, bench.tasks, prompts)
                    for job, prompt, test in zip(jobs, prompts, tests, strict=True):
                        aim = tuned["vocabulary"][job.name]
                        yield {
                            "start": start,
                            "started_from": prompt.settings["started_from"],
                            "rows": size,
                            "seed": seed,
                            "task": job.name,
                            "train_rows": len(job.train),
                            "dev_rows": len(job.validation),
                            "test": test,
                            "steps_to_loss": _steps_to(prompt, aim),
                        }


def _fewer(job: TuningJob, size: int, seed: int, donors: dict[str, TunedPrompt]) -> TuningJob:
    """The job with `size` train rows (0: all) that the seed draws, and the other tasks' prompts."""
    starts = tuple(Start(name, donor.values) for name, donor in donors.items() if name != job.name)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(job.train), generator=generator).tolist()
    chosen = order[:size] if size else order
    dev = job.validation[:size] if size else job.validation
    return replace(job, train=[job.train[i] for i in chosen], validation=dev, starts=starts)


def _steps_to(prompt: TunedPrompt, aim: TunedPrompt) -> int | None:
    least = min(validation.loss for validation in aim.validations)
    return next((v.step for v in prompt.validations if v.loss <= least), None)
