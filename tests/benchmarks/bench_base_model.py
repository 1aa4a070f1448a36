"""How steerable the embedded base model is: mean accuracy over the 15 tasks of `cl15`.

    PROMPTYARD_BENCH_DATA=/path/to/data python tests/benchmarks/bench_base_model.py

Five ways to answer, each by scoring the task's labels: always the majority class; no prompt; the
instruction in front of the input; a tuned prompt (all tasks tuned together by `trainer.tuning`);
full fine-tuning of all weights, one model per task. Prompts and fine-tuned models are trained on
`train` rows and chosen on `dev` rows; `test` rows are only scored.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from router.backends.language_model import load_language_model
from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from trainer.prompt_quality import LabelledRow, Quality, Trial, majority_score, measure
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning import tune
from trainer.tuning_settings import TuningJob, TuningSettings

DATA_VARIABLE = "PROMPTYARD_BENCH_DATA"
DATA_FILE = Path("cl") / "cl15.jsonl.gz"
BASE_MODEL = Path(__file__).parents[2] / "router" / "models" / "base"
SHUFFLE_SEED = 0
METHODS = {
    "majority": "majority class",
    "no_prompt": "no prompt",
    "instruction": "the instruction as prompt",
    "prompt": "tuned prompt",
    "full": "full fine-tuning",
}


@dataclass(frozen=True, slots=True)
class Task:
    """One of the 15 tasks: its job (train and dev rows) and its test rows."""

    job: TuningJob
    test: Sequence[LabelledRow]


@dataclass(frozen=True, slots=True)
class FullTuning:
    """How to fine-tune all weights; the rate is chosen per task on its dev rows."""

    rates: tuple[float, ...]
    steps: int
    rows_per_step: int = 32
    validations: int = 4
    warmup_share: float = 0.1
    weight_decay: float = 0.01


def main() -> int:
    """Measure, print a table, write the figures. Returns the exit status."""
    options = parse_arguments()
    path = find_data()
    if path is None:
        return 2
    began = time.perf_counter()
    tasks = read_tasks(path, options)
    model = load_language_model(
        options.model, device=options.device, precision="float32", threads=options.threads
    )
    report(f"{len(tasks)} tasks, {model.name} on {model.device}", began)
    settings = TuningSettings(
        length=options.length,
        steps=options.steps,
        learning_rate=options.rate,
        rows_per_step=options.rows_per_step,
        validations=options.validations,
        patience=options.validations,
        initialisation="text",
        refit="never",
        seed=options.seed,
    )
    accuracy: dict[str, dict[str, float]] = {}
    with computing(model, options.bf16):
        accuracy |= untrained(model, tasks)
        report("untrained ways measured", began)
        accuracy["prompt"] = tuned(model, tasks, settings, began)
        report("prompts tuned and measured", began)
        if not options.without_full:
            full = FullTuning(options.full_rates, options.full_steps)
            accuracy["full"] = {task.job.name: fine_tuned(model, task, full) for task in tasks}
            report("full fine-tuning measured", began)
    seconds = time.perf_counter() - began
    figures = {
        "command": f"{DATA_VARIABLE}={path.parents[1]} {shlex.join(['python', *sys.argv])}",
        "base_model": {"name": model.name, "fingerprint": model.fingerprint},
        "prompt_bytes": options.length * model.hidden_size * 4,
        "settings": asdict(settings),
        "test_rows": {task.job.name: len(task.test) for task in tasks},
        "test_rows_drawn": f"first {options.test_rows} after a shuffle with seed {SHUFFLE_SEED}",
        "mean_accuracy": {way: float(np.mean([*per.values()])) for way, per in accuracy.items()},
        "accuracy": accuracy,
        "seconds": seconds,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": device_name(model.device),
            "bf16": options.bf16,
        },
    }
    options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table(accuracy, [task.job.name for task in tasks]))
    print(f"\n{figures['command']}\n{seconds:.0f} s on {device_name(model.device)}; {options.out}")
    return 0


def find_data() -> Path | None:
    """The file with the 15 tasks; None, with the reason on stderr, where it cannot be found."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        print(f"set {DATA_VARIABLE} to the folder that holds {DATA_FILE}", file=sys.stderr)
        return None
    path = Path(folder) / DATA_FILE
    if not path.is_file():
        print(f"{path}: no such file; check {DATA_VARIABLE}", file=sys.stderr)
        return None
    return path


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(BASE_MODEL), help="folder or hub name of the base model")
    add("--tasks", nargs="+", default=[], help="only these tasks (all)")
    add("--rows", type=int, default=None, help="train rows a task at most (all)")
    add("--dev-rows", type=int, default=200, help="dev rows a task at most")
    add("--test-rows", type=int, default=500, help="test rows a task at most")
    add("--length", type=int, default=20, help="vectors of a prompt")
    add("--steps", type=int, default=1200, help="steps of prompt tuning")
    add("--rate", type=float, default=0.03, help="learning rate of prompt tuning")
    add("--rows-per-step", type=int, default=16, help="rows a task and step of prompt tuning")
    add("--validations", type=int, default=6, help="how often dev rows are tried")
    add("--full-steps", type=int, default=200, help="steps of full fine-tuning")
    add("--full-rates", type=float, nargs="+", default=[1e-4, 3e-4], help="rates to choose from")
    add("--without-full", action="store_true", help="leave full fine-tuning out")
    add("--device", default="auto")
    add("--threads", type=int, default=None)
    add("--bf16", action="store_true", help="autocast to bfloat16 on the GPU")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("bench_base_model.json"))
    options = parser.parse_args()
    options.full_rates = tuple(options.full_rates)
    return options


def read_tasks(path: Path, options: argparse.Namespace) -> list[Task]:
    """The tasks of the file, in its order; rows of each split shuffled with a fixed seed."""
    rows: dict[str, dict[str, list[LabelledRow]]] = {}
    instructions: dict[str, str] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            name = row["task"]
            if options.tasks and name not in options.tasks:
                continue
            instructions[name] = row["instruction"].strip()
            splits = rows.setdefault(name, {"train": [], "dev": [], "test": []})
            splits[row["split"]].append((row["input"], row["output"]))
    unknown = set(options.tasks) - set(rows)
    if unknown:
        raise SystemExit(f"no such task in {path}: {', '.join(sorted(unknown))}")
    tasks = []
    for name, splits in rows.items():
        for split in splits.values():
            random.Random(SHUFFLE_SEED).shuffle(split)
        job = TuningJob(
            name,
            instructions[name],
            tuple(sorted({output for _, output in splits["train"]})),
            splits["train"][: options.rows],
            splits["dev"][: options.dev_rows],
        )
        tasks.append(Task(job, splits["test"][: options.test_rows]))
    return tasks


def untrained(model: TorchLanguageModel, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """Test accuracy per task of what needs no training."""
    instructions = [
        model.text_embeddings(task.job.instruction) if task.job.instruction else None
        for task in tasks
    ]
    return {
        "majority": {task.job.name: majority_score(task.job.train, task.test) for task in tasks},
        "no_prompt": test_accuracy(model, tasks, [None] * len(tasks)),
        "instruction": test_accuracy(model, tasks, instructions),
    }


def tuned(
    model: TorchLanguageModel, tasks: Sequence[Task], settings: TuningSettings, began: float
) -> dict[str, float]:
    """Test accuracy per task with prompts that are tuned together."""

    def progress(_task: str, _stage: str, done: int, total: int) -> None:
        if done % max(1, total // 6) == 0:
            report(f"tuning prompts, step {done} of {total}", began)

    results = tune(model, [task.job for task in tasks], settings, progress)
    prompts = []
    for task in tasks:
        result = results[task.job.name]
        if not isinstance(result, TunedPrompt):
            raise SystemExit(f"{result.name}: {result.reason}")
        prompts.append(torch.tensor(result.values, device=model.device))
    return test_accuracy(model, tasks, prompts)


def fine_tuned(model: TorchLanguageModel, task: Task, full: FullTuning) -> float:
    """Test accuracy of the best of the fine-tuned models by dev rows: every rate, every check.

    The instruction's tokens stand in front of every input, as they do in text-to-text training.
    """
    best: tuple[Quality, float] | None = None
    for rate in full.rates:
        for candidate in fine_tune(model, task, full, rate):
            prompt = instruction_of(candidate, task)
            dev = Trial(prompt, task.job.labels, task.job.validation)
            quality = measure(candidate, [dev])[0]
            if best is None or quality > best[0]:
                # Scored now, since the weights move on; only the best by dev rows is reported.
                test = Trial(prompt, task.job.labels, task.test)
                best = (quality, measure(candidate, [test])[0].score)
    if best is None:
        raise SystemExit("give at least one rate for full fine-tuning")
    return best[1]


def fine_tune(
    model: TorchLanguageModel, task: Task, full: FullTuning, rate: float
) -> Iterator[TorchLanguageModel]:
    """A copy of the model in training, given out (in eval mode) at each check."""
    learner = type(model)(
        copy.deepcopy(model.network),
        model.tokenizer,
        name=model.name,
        fingerprint=model.fingerprint,
    )
    learner.network.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        learner.network.parameters(),
        rate,
        (0.9, 0.98),
        weight_decay=full.weight_decay,
        fused=model.device.type == "cuda",
    )
    warmup = max(1, int(full.steps * full.warmup_share))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - step / full.steps)
    )
    rows = training_rows(learner, task)
    generator = random.Random(SHUFFLE_SEED)
    checks = {full.steps * (k + 1) // full.validations for k in range(full.validations)}
    for step in range(1, full.steps + 1):
        learner.network.train()
        chosen = generator.choices(rows, k=full.rows_per_step)
        losses = learner.negative_log_likelihood(
            [row for row, _ in chosen], [output for _, output in chosen]
        )
        torch.autograd.backward(losses.mean())
        torch.nn.utils.clip_grad_norm_(learner.network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in checks:
            learner.network.eval()
            yield learner


def training_rows(model: TorchLanguageModel, task: Task) -> list[tuple[Row, tuple[int, ...]]]:
    """Token ids of the train rows, the instruction's in front, and of their outputs."""
    instruction = model.plain_ids([task.job.instruction])[0]
    outputs = {label: model.tokenize_output(label) for label in task.job.labels or ()}
    longest = max(len(ids) for ids in outputs.values())
    count = len(task.job.train)
    tokens = model.tokenize_inputs(
        [text for text, _ in task.job.train], [len(instruction)] * count, [longest] * count
    )
    return [
        (Row(None, (*instruction, *text.ids)), outputs[output])
        for text, (_, output) in zip(tokens, task.job.train, strict=True)
    ]


def instruction_of(model: TorchLanguageModel, task: Task) -> Tensor | None:
    """The instruction's embeddings as they are now."""
    with torch.no_grad():
        return model.text_embeddings(task.job.instruction) if task.job.instruction else None


def test_accuracy(
    model: TorchLanguageModel, tasks: Sequence[Task], prompts: Sequence[Tensor | None]
) -> dict[str, float]:
    """Share of test rows whose right label scores highest, per task."""
    trials = [
        Trial(prompt, task.job.labels, task.test)
        for task, prompt in zip(tasks, prompts, strict=True)
    ]
    qualities = measure(model, trials)
    return {task.job.name: quality.score for task, quality in zip(tasks, qualities, strict=True)}


def computing(model: TorchLanguageModel, bf16: bool) -> AbstractContextManager[object]:
    """The precision that everything is computed in."""
    torch.set_float32_matmul_precision("high")
    # No cache of cast weights: it would outlive the optimizer steps of full fine-tuning.
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def device_name(device: torch.device) -> str:
    """What the hardware is called."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def table(accuracy: dict[str, dict[str, float]], names: Sequence[str]) -> str:
    """The figures as a Markdown table: one row per way to answer."""
    lines = [
        "| way | mean | " + " | ".join(names) + " |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for way, per_task in accuracy.items():
        cells = [f"{value:.3f}" for value in [np.mean([*per_task.values()]), *per_task.values()]]
        lines.append(f"| {METHODS[way]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(message: str, began: float) -> None:
    """Say on stderr how far it is."""
    print(f"[{time.perf_counter() - began:6.1f} s] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
