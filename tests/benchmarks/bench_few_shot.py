"""What prompts and classifiers of few rows answer, by what they start from. No test row is read.

    PROMPTYARD_BENCH_DATA=/path/to/data python tests/benchmarks/bench_few_shot.py

Three kinds of tasks: the shipped example tasks, by holding out a quarter of their training rows
(the frozen held-out rows are the demo's); the tasks of `cl15` with at most ten labels, trained on
`train` rows and judged on `dev` rows; groups of six intents from the training rows of Banking77.
This is what base models, and the settings of tuning and of label classifiers, are chosen by.

Judges are the soft prompt alone; the label classifier of plain embeddings, and of those under an
encoder prompt; and each classifier together with the soft prompt, as served. Tasks of free text
are answered under the soft prompt by all of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from router.backends.language_model import load_language_model
from router.backends.onnx_encoder import OnnxMiniLM
from router.backends.torch_model import TorchLanguageModel
from router.interfaces import FloatArray, PromptedInput
from router.label_classifier import (
    ClassifierInput,
    LabelClassifier,
    LabelEvidence,
    read_evidence,
)
from router.settings import DEFAULT_BASE_MODEL
from trainer.commands import Initialisation
from trainer.data import closed_outputs, read_labelled
from trainer.encoder_prompts import EncoderPromptJob, EncoderPromptTuner, TaskPrompting
from trainer.label_classifier import fit_classifier
from trainer.manifest import read_manifest
from trainer.prompt_quality import LabelledRow, Trial, measure
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning import tune
from trainer.tuning_settings import TuningJob, TuningSettings

DATA_VARIABLE = "PROMPTYARD_BENCH_DATA"
EXAMPLES = Path(__file__).parents[2] / "trainer" / "examples"
MOST_LABELS = 10
VALIDATION_SHARE = 0.2
ANSWERED_ROWS = 200
LONGEST_INPUT = 1200
JUDGES = (
    "soft prompt",
    "classifier, plain",
    "both, plain",
    "classifier, encoder prompt",
    "both, encoder prompt",
)


@dataclass(frozen=True, slots=True)
class Task:
    """A tuning job of one kind of task, and the rows that its prompt is judged by."""

    kind: str
    job: TuningJob
    held_out: Sequence[LabelledRow]


def main() -> int:
    """Measure and print; returns the exit status."""
    options = parse_arguments()
    folder = os.environ.get(DATA_VARIABLE)
    if not folder and set(options.kinds) != {"examples"}:
        print(f"set {DATA_VARIABLE}, or give --kinds examples", file=sys.stderr)
        return 2
    model = load_language_model(options.model, device=options.device, precision="float32")
    encoder = OnnxMiniLM()
    figures: list[dict[str, object]] = []
    for start in options.starts:
        for seed in range(options.seeds):
            tasks = [t for kind in options.kinds for t in read(kind, folder, seed, options.rows)]
            settings = TuningSettings(
                steps=options.steps,
                learning_rate=options.rate,
                initialisation=start,
                seed=seed,
            )
            began = time.perf_counter()
            found = held_out_accuracy(model, encoder, tasks, settings)
            seconds = time.perf_counter() - began
            for judge, accuracy in found.items():
                about = {"start": start, "judge": judge, "seed": seed, "seconds": seconds}
                figures.append({**about, **accuracy})
                print(json.dumps(figures[-1]), flush=True)
    print(table(figures, options.kinds))
    print(f"\n{DATA_VARIABLE}={folder} {shlex.join(['python', *sys.argv])}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    default = TuningSettings()
    add("--model", default=DEFAULT_BASE_MODEL, help="folder or hub name of the base model")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of tasks")
    add(
        "--starts",
        nargs="+",
        choices=get_args(Initialisation),
        default=["text", "examples"],
        help="what prompts start from",
    )
    add("--rows", type=int, default=80, help="rows a task, a fifth of them for validation")
    add("--steps", type=int, default=default.steps)
    add("--rate", type=float, default=default.learning_rate, help="learning rate")
    add("--seeds", type=int, default=3)
    add("--device", default="auto")
    add("--json", type=Path, help="write the figures here too")
    return parser.parse_args()


def held_out_accuracy(
    model: TorchLanguageModel,
    encoder: OnnxMiniLM,
    tasks: Sequence[Task],
    settings: TuningSettings,
) -> dict[str, dict[str, float]]:
    """By judge, the mean accuracy on held-out rows by kind of task; prompts are tuned together."""
    results = tune(model, [task.job for task in tasks], settings)
    tuner = EncoderPromptTuner(encoder)
    by_judge: dict[str, defaultdict[str, list[float]]] = {
        judge: defaultdict(list) for judge in JUDGES
    }
    for task in tasks:
        result = results[task.job.name]
        if not isinstance(result, TunedPrompt):
            raise SystemExit(f"{result.name}: {result.reason}")
        if task.job.labels is None:
            prompt = torch.tensor(result.values, device=model.device)
            [quality] = measure(model, [Trial(prompt, None, task.held_out)])
            accuracy = dict.fromkeys(JUDGES, quality.score)
        else:
            accuracy = label_accuracy(model, tuner, encoder, task, result, settings.seed)
        for judge, value in accuracy.items():
            by_judge[judge][task.kind].append(value)
    return {
        judge: {kind: float(np.mean(values)) for kind, values in kinds.items()}
        for judge, kinds in by_judge.items()
    }


def label_accuracy(
    model: TorchLanguageModel,
    tuner: EncoderPromptTuner,
    encoder: OnnxMiniLM,
    task: Task,
    tuned: TunedPrompt,
    seed: int,
) -> dict[str, float]:
    """The share of held-out rows that each of the judges labels rightly, of a task with labels."""
    labels = task.job.labels or ()
    inputs = [PromptedInput(text, tuned.values, tuned.method) for text, _ in task.held_out]
    scored = model.score(inputs, [labels] * len(inputs))
    nothing = LabelEvidence(np.zeros(len(labels), np.float32), 1.0)
    judges: dict[str, list[LabelEvidence]] = {"soft prompt": [nothing] * len(inputs)}
    vectors = encoder.encode([text for text, _ in task.held_out]).vectors
    for name, prompted in (("plain", False), ("encoder prompt", True)):
        classifier = classifier_of(encoder, task, tuner if prompted else None, seed)
        found = judges["soft prompt"]
        if classifier is not None:
            asked = [
                ClassifierInput(classifier, text, vector)
                for (text, _), vector in zip(task.held_out, vectors, strict=True)
            ]
            found = [one or nothing for one in read_evidence(asked, encoder)]
            judges[f"classifier, {name}"] = [replace(one, prompt_weight=0.0) for one in found]
        else:
            judges[f"classifier, {name}"] = found
        judges[f"both, {name}"] = found
    return {
        judge: float(
            np.mean(
                [
                    labels[evidence.best(scores.log_probabilities)] == output
                    for (_, output), evidence, scores in zip(
                        task.held_out, found, scored, strict=True
                    )
                ]
            )
        )
        for judge, found in judges.items()
    }


def classifier_of(
    encoder: OnnxMiniLM, task: Task, tuner: EncoderPromptTuner | None, seed: int
) -> LabelClassifier | None:
    """The label classifier of a task's few rows; under an encoder prompt where one is tuned."""
    labels = task.job.labels or ()
    rows = [*task.job.train, *task.job.validation]
    texts, outputs = [text for text, _ in rows], [output for _, output in rows]
    prompting = None
    if tuner is not None:
        about = " ".join([task.job.instruction, *labels]).strip()
        truth = np.array([labels.index(output) for output in outputs])
        job = EncoderPromptJob(f"{task.job.name}/{seed}", about, texts, truth)
        prompting = TaskPrompting(tuner, encoder, job, labels)

    def embed(these: Sequence[str]) -> FloatArray:
        return encoder.encode(these).vectors

    fitted = fit_classifier(embed(texts), outputs, labels, embed(labels), prompting)
    if fitted is None:
        return None
    return LabelClassifier(fitted.rows, fitted.prompt_weight, fitted.encoder_prompt)


def read(kind: str, folder: str | None, seed: int, rows: int) -> Iterator[Task]:
    """The tasks of a kind; each seed draws other rows."""
    for task in KINDS[kind](folder, random.Random(f"{seed}/{kind}")):
        train, held_out = list(task.job.train), task.held_out
        few = train[:rows]
        validation = max(2, int(len(few) * VALIDATION_SHARE))
        job = replace(task.job, train=few[validation:], validation=few[:validation])
        yield Task(kind, job, held_out[:ANSWERED_ROWS])


def example_tasks(_: str | None, chance: random.Random) -> Iterator[Task]:
    """The example tasks, a quarter of their training rows held out."""
    for name in ("manifest.yaml", "live.yaml"):
        for request in read_manifest(EXAMPLES / name):
            examples = read_labelled(request.data).examples
            labels = None if request.free_text else closed_outputs(examples)
            rows = [(example.input, example.output) for example in examples]
            chance.shuffle(rows)
            quarter = len(rows) // 4
            job = TuningJob(request.name, request.instruction, labels, rows[quarter:], ())
            yield Task("examples", job, rows[:quarter])


def benchmark_tasks(folder: str | None, chance: random.Random) -> Iterator[Task]:
    """The tasks of `cl15` with few labels: train rows, judged on dev rows."""
    rows: dict[str, dict[str, list[LabelledRow]]] = {}
    instructions: dict[str, str] = {}
    for row in read_lines(Path(folder or "") / "cl" / "cl15.jsonl.gz"):
        if row["split"] == "test":
            continue
        instructions[row["task"]] = row["instruction"].strip()
        splits = rows.setdefault(row["task"], {"train": [], "dev": []})
        splits[row["split"]].append((row["input"][:LONGEST_INPUT], row["output"]))
    for name, splits in rows.items():
        labels = tuple(sorted({label for split in splits.values() for _, label in split}))
        if len(labels) <= MOST_LABELS:
            chance.shuffle(splits["train"])
            chance.shuffle(splits["dev"])
            job = TuningJob(name, instructions[name], labels, splits["train"], ())
            yield Task("cl15", job, splits["dev"])


def intent_tasks(folder: str | None, chance: random.Random) -> Iterator[Task]:
    """Six intents of Banking77 at a time, from its training rows."""
    by_intent: defaultdict[str, list[str]] = defaultdict(list)
    for row in read_lines(Path(folder or "") / "routing" / "banking77.jsonl.gz"):
        if row["split"] == "train":
            by_intent[row["label"].replace("_", " ")].append(row["text"])
    for number in range(3):
        chosen = sorted(chance.sample(sorted(by_intent), 6))
        rows = [(text, intent) for intent in chosen for text in by_intent[intent]]
        chance.shuffle(rows)
        half = len(rows) // 2
        about = "What does the customer of the bank ask about?"
        job = TuningJob(f"intents-{number}", about, tuple(chosen), rows[:half], ())
        yield Task("banking77", job, rows[half:])


KINDS = {"examples": example_tasks, "cl15": benchmark_tasks, "banking77": intent_tasks}


def read_lines(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a gzipped file of JSON lines."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; check {DATA_VARIABLE}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def table(figures: Sequence[dict[str, object]], kinds: Sequence[str]) -> str:
    """Mean and spread over the seeds, a row for each start and judge."""
    lines = ["| start | judge | " + " | ".join(kinds) + " |", "|---|---|" + "---|" * len(kinds)]
    for start, judge in dict.fromkeys((str(row["start"]), str(row["judge"])) for row in figures):
        cells = []
        for kind in kinds:
            values = [
                float(str(row[kind]))
                for row in figures
                if (row["start"], row["judge"]) == (start, judge)
            ]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {start} | {judge} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
