"""Measures a base model by what soft prompts can make of it: the 15 tasks, frozen weights.

    python -m trainer.base_model.evaluate MODEL_DIR PREPARED_DIR

All 15 prompts are tuned in the same steps, one for each task; a prompt's gradient comes from its
task's rows alone, so this equals tuning them one after the other.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, BartForConditionalGeneration

from trainer.base_model.start import END, PAD, START

_IGNORED = -100
_SHORT = 90
"""Tasks whose inputs are at most this long go in one part of a step, the others in another."""


@dataclass(frozen=True, slots=True)
class BenchmarkTask:
    """One of the 15 tasks as token ids; rows are (input, index of the label)."""

    name: str
    labels: list[list[int]]
    instruction: list[int]
    rows: dict[str, list[tuple[list[int], int]]]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How prompts are tuned; the plain recipe."""

    length: int = 20
    steps: int = 1000
    rows_per_step: int = 16
    learning_rate: float = 0.03
    warm_up: int = 50
    checks: int = 5
    """How often prompts are measured on dev; each task keeps its best."""
    train_rows: int | None = None
    """Tune on so few rows, without looking at dev."""


def read_benchmark(prepared: Path) -> list[BenchmarkTask]:
    """The tasks that `prepare` wrote."""
    with gzip.open(prepared / "benchmark.json.gz", "rt") as file:
        stored = json.load(file)
    splits = ("train", "dev", "test")
    return [
        BenchmarkTask(
            name,
            about["labels"],
            about["instruction"],
            {split: [(ids, label) for ids, label in about[split]] for split in splits},
        )
        for name, about in stored.items()
    ]


class Benchmark:
    """The 15 tasks and a frozen base model."""

    def __init__(
        self, model: BartForConditionalGeneration, tasks: Sequence[BenchmarkTask], most_rows: int
    ) -> None:
        self._model = model.requires_grad_(False)
        self._model.train(False)
        self._device = model.model.shared.weight.device
        self._tasks = tasks
        self._most_rows = most_rows

    def majority(self, split: str) -> dict[str, float]:
        """Accuracy of always answering the label that is most frequent in training."""
        result = {}
        for task in self._tasks:
            counts = np.bincount([label for _, label in task.rows["train"]])
            rows = task.rows[split][: self._most_rows]
            result[task.name] = float(np.mean([label == counts.argmax() for _, label in rows]))
        return result

    def no_prompts(self) -> Tensor:
        """Prompts of length 0 [15, 0, H]."""
        return self._embedding.new_zeros(len(self._tasks), 0, self._embedding.shape[1])

    def text_prompts(self, length: int) -> Tensor:
        """The embedded instruction and labels, repeated to the length [15, P, H]."""
        ids = []
        for task in self._tasks:
            said = task.instruction + [token for label in task.labels for token in label]
            ids.append((said * length)[:length])
        return functional.embedding(torch.tensor(ids, device=self._device), self._embedding)

    @torch.inference_mode()
    def accuracy(self, prompts: Tensor, split: str) -> dict[str, float]:
        """Share of rows whose right label scores best, by task."""
        result = {}
        for number, task in enumerate(self._tasks):
            rows = sorted(task.rows[split][: self._most_rows], key=lambda row: len(row[0]))
            right = 0
            for start in range(0, len(rows), 250):
                chunk = rows[start : start + 250]
                losses = self._label_losses(number, [ids for ids, _ in chunk], prompts)
                wanted = torch.tensor([label for _, label in chunk], device=self._device)
                right += int((losses.argmin(1) == wanted).sum())
            result[task.name] = right / len(rows)
        return result

    def tune(self, tuning: Tuning, seed: int = 1) -> Tensor:
        """Tune one prompt a task. Returns [15, P, H]."""
        random = np.random.default_rng(seed)
        prompts = torch.nn.Parameter(self.text_prompts(tuning.length).float().clone())
        optimizer = torch.optim.AdamW([prompts], weight_decay=0.0, betas=(0.9, 0.98))
        best = prompts.detach().clone()
        best_accuracy = np.full(len(self._tasks), -1.0)
        started = time.monotonic()
        for step in range(tuning.steps):
            decay = 0.5 * (1 + np.cos(np.pi * step / tuning.steps))
            for group in optimizer.param_groups:
                group["lr"] = tuning.learning_rate * min(1.0, (step + 1) / tuning.warm_up) * decay
            for part in self._parts(tuning, random):
                loss = self._losses(part, prompts).sum() / tuning.rows_per_step
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if (
                tuning.train_rows is None
                and (step + 1) % max(1, tuning.steps // tuning.checks) == 0
            ):
                accuracy = np.array(list(self.accuracy(prompts.detach(), "dev").values()))
                for number in np.flatnonzero(accuracy > best_accuracy):
                    best_accuracy[number] = accuracy[number]
                    best[number] = prompts.detach()[number]
                seconds = time.monotonic() - started
                print(f"  step {step + 1} dev {accuracy.mean():.4f} {seconds:.0f} s", flush=True)
        return prompts.detach() if tuning.train_rows else best

    @property
    def _embedding(self) -> Tensor:
        weight: Tensor = self._model.model.shared.weight
        return weight

    def _parts(
        self, tuning: Tuning, random: np.random.Generator
    ) -> list[list[tuple[int, list[int], list[int]]]]:
        """A step's rows, (task, input, output), tasks with short inputs apart from the others."""
        parts: list[list[tuple[int, list[int], list[int]]]] = [[], []]
        for number, task in enumerate(self._tasks):
            rows = task.rows["train"][: tuning.train_rows]
            chosen = [rows[i] for i in random.integers(0, len(rows), tuning.rows_per_step)]
            part = parts[max(len(ids) for ids, _ in chosen) > _SHORT]
            part.extend((number, ids, task.labels[label]) for ids, label in chosen)
        return [part for part in parts if part]

    def _losses(self, rows: list[tuple[int, list[int], list[int]]], prompts: Tensor) -> Tensor:
        """Negative log-likelihood of each row's output [N]."""
        numbers = torch.tensor([number for number, _, _ in rows], device=self._device)
        inputs = [ids for _, ids, _ in rows]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._on_gpu):
            states, mask = self._encode(inputs, prompts[numbers])
            return self._output_losses(states, mask, [output for _, _, output in rows])

    def _label_losses(self, number: int, inputs: list[list[int]], prompts: Tensor) -> Tensor:
        """Each label's negative log-likelihood for each input [N, labels]."""
        own = prompts[number].expand(len(inputs), -1, -1)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._on_gpu):
            states, mask = self._encode(inputs, own)
            losses = [
                self._output_losses(states, mask, [label] * len(inputs))
                for label in self._tasks[number].labels
            ]
        return torch.stack(losses, 1)

    @property
    def _on_gpu(self) -> bool:
        return bool(self._device.type == "cuda")

    def _encode(self, inputs: list[list[int]], prompts: Tensor) -> tuple[Tensor, Tensor]:
        """`PROMPT [CLS] input [SEP]` through the encoder: states [N, L, H] and mask [N, L]."""
        texts = [[START, *ids, END] for ids in inputs]
        width = -(-max(map(len, texts)) // 32) * 32
        tokens = np.full((len(texts), width), PAD)
        for line, ids in zip(tokens, texts, strict=True):
            line[: len(ids)] = ids
        text = torch.from_numpy(tokens).to(self._device)
        prompt_mask = torch.ones(prompts.shape[:2], dtype=torch.long, device=self._device)
        mask = torch.cat([prompt_mask, (text != PAD).long()], 1)
        embedded = functional.embedding(text, self._embedding)
        embedded = torch.cat([prompts.to(embedded.dtype), embedded], 1)
        encoder = self._model.get_encoder()
        return encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state, mask

    def _output_losses(self, states: Tensor, mask: Tensor, outputs: list[list[int]]) -> Tensor:
        width = max(map(len, outputs)) + 1
        decoder = np.full((len(outputs), width), PAD)
        labels = np.full((len(outputs), width), _IGNORED)
        for row, output in enumerate(outputs):
            decoder[row, : len(output) + 1] = [START, *output]
            labels[row, : len(output) + 1] = [*output, END]
        logits = self._model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=torch.from_numpy(decoder).to(self._device),
            use_cache=False,
        ).logits
        wanted = torch.from_numpy(labels).to(self._device)
        losses = functional.cross_entropy(
            logits.float().transpose(1, 2), wanted, ignore_index=_IGNORED, reduction="none"
        )
        return losses.sum(1)


Figures = dict[str, dict[str, dict[str, float]]]
"""Accuracy by split, by way of prompting, and by task."""


def measure(
    model: BartForConditionalGeneration,
    tasks: Sequence[BenchmarkTask],
    splits: Sequence[str],
    tuning: Tuning,
    most_rows: int = 500,
    few_rows: int = 80,
) -> Figures:
    """Accuracies on each split; prompts are always tuned on train and chosen on dev."""
    benchmark = Benchmark(model, tasks, most_rows)
    few = Tuning(tuning.length, max(1, tuning.steps // 4), train_rows=few_rows)
    prompts = {
        "no prompt": benchmark.no_prompts(),
        "instruction as prompt": benchmark.text_prompts(tuning.length),
        f"prompt tuned on {few_rows} rows": benchmark.tune(few),
        "tuned prompt": benchmark.tune(tuning),
    }
    figures = {}
    for split in splits:
        figures[split] = {"majority": benchmark.majority(split)}
        figures[split] |= {name: benchmark.accuracy(p, split) for name, p in prompts.items()}
        for name, by_task in figures[split].items():
            print(f"{split} {name}: mean {mean(by_task):.4f}", flush=True)
        print({task: round(value, 3) for task, value in by_task.items()}, flush=True)
    return figures


def mean(by_task: dict[str, float]) -> float:
    """The unweighted mean over tasks."""
    return float(np.mean(list(by_task.values())))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("prepared", type=Path, help="folder that `prepare` wrote")
    parser.add_argument(
        "--splits", nargs="+", choices=("dev", "test"), default=["dev"], help="what to report on"
    )
    parser.add_argument("--steps", type=int, default=Tuning().steps)
    parser.add_argument("--rows", type=int, default=500, help="at most so many rows a task")
    parser.add_argument("--figures", type=Path, help="write the accuracies to this JSON file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    tuning = Tuning(steps=options.steps)
    tasks = read_benchmark(options.prepared)
    figures = measure(model, tasks, options.splits, tuning, options.rows)
    if options.figures:
        options.figures.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
