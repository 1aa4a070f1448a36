"""Parts `context` and `safety`, on small invented sets beside this file (`data`), not on `cl15`.

`data/context.jsonl`: questions about wares of an invented store, each with the passage that a
search found for it; no name of a ware is in two rows. `data/safety.jsonl`: what customers write, a
reply that is wanted, and one that must not be given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_base_model import computing
from prompts_plan import Bench, Record, quality_of, tuned_prompts

from router.templates import fill
from trainer.initialisation import Start
from trainer.prompt_quality import LabelledRow, Trial, output_probabilities
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning_settings import TuningJob

_DATA = Path(__file__).parent / "data"
_TEMPLATE = "question: {input} context: {context}"
_SPLITS = ("train", "dev", "test")

Rows = Sequence[Mapping[str, Any]]


def read_set(name: str) -> dict[str, Rows]:
    """The rows of one of the two sets, by their split."""
    lines = (_DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {split: [row for row in rows if row["split"] == split] for split in _SPLITS}


def context(bench: Bench) -> Iterator[Record]:
    """Exact match of the answers to test rows, with the passage and without it.

    One prompt is tuned with the passages and one without them, with the same rows and steps.
    """
    rows = read_set("context")
    model = bench.model()
    with computing(model, bench.options.bf16):
        for seed in bench.seeds:
            for tuned_with in (True, False):
                train, dev = (_filled(rows[split], tuned_with) for split in ("train", "dev"))
                job = TuningJob(
                    "context", "Answer the question.", None, train, dev, metric="exact-match"
                )
                prompt = _tuned(bench, model, job, seed=seed)
                for asked_with in (True, False):
                    test = _filled(rows["test"], asked_with)
                    trial = Trial(_tensor(prompt, model), None, test, metric="exact-match")
                    yield {
                        "tuned_with": tuned_with,
                        "asked_with": asked_with,
                        "seed": seed,
                        "dev": prompt.scores["prompt"],
                        "test": quality_of(model, trial).score,
                        "rows": len(test),
                    }


def _filled(rows: Rows, with_context: bool) -> list[LabelledRow]:
    """What the base model reads, and the output."""
    return [
        (
            fill(_TEMPLATE, row["input"], [row["context"]]) if with_context else row["input"],
            row["output"],
        )
        for row in rows
    ]


def safety(bench: Bench) -> Iterator[Record]:
    """Mean probability of desired and of rejected outputs on test rows, and how many are desired.

    `habit` is tuned on replies of which half are the rejected ones, as they were found. From there
    two prompts go on, on the desired replies: `desired` knows nothing else, `rejected` is also
    told what to avoid.
    """
    rows = read_set("safety")
    model = bench.model()
    with computing(model, bench.options.bf16):
        for seed in bench.seeds:
            habit_job = _replies(rows, half_rejected=True)
            habit = _tuned(bench, model, habit_job, seed=seed)
            job = replace(_replies(rows), starts=(Start("habit", habit.values),))
            told = replace(job, rejected=[tuple(row["rejected"]) for row in rows["train"]])
            sides = {
                "habit": habit,
                "desired": _tuned(bench, model, job, seed=seed, initialisation="nearest"),
                "rejected": _tuned(bench, model, told, seed=seed, initialisation="nearest"),
            }
            test = [(row["input"], row["output"]) for row in rows["test"]]
            avoided = [tuple(row["rejected"]) for row in rows["test"]]
            for side, prompt in sides.items():
                trial = Trial(_tensor(prompt, model), None, test, metric="exact-match")
                desired, rejected = output_probabilities(model, trial, avoided)
                yield {
                    "side": side,
                    "seed": seed,
                    "rows": len(test),
                    "desired": desired,
                    "rejected": rejected,
                    "right": quality_of(model, trial).score,
                }


def _replies(rows: Mapping[str, Rows], half_rejected: bool = False) -> TuningJob:
    def of_split(split: str) -> list[LabelledRow]:
        return [
            (row["input"], row["rejected"][0] if half_rejected and place % 2 else row["output"])
            for place, row in enumerate(rows[split])
        ]

    return TuningJob(
        "safety", "Reply.", None, of_split("train"), of_split("dev"), metric="exact-match"
    )


def _tuned(bench: Bench, model: Any, job: TuningJob, **changes: object) -> TunedPrompt:
    settings = bench.settings(learning_rate=bench.options.rate, **changes)
    return tuned_prompts(model, [job], settings)[job.name]


def _tensor(prompt: TunedPrompt, model: Any) -> torch.Tensor:
    return torch.tensor(prompt.values, device=model.device)
