"""The ways to teach a base model a task, behind one training loop: same rows, loss and schedule.

What they differ in is what is trained: a prompt, a prefix, LoRA (PEFT's, with its own choice of
layers), bottleneck adapters (after the feed-forward part of every layer; Pfeiffer et al. 2021), or
all weights. The prompts start from the instruction and the labels; for the others the instruction
stands in front of the input, as in text-to-text training.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from bench_base_model import Task
from peft import LoraConfig, inject_adapter_in_model
from prompts_plan import Bench, quality_of
from torch import Tensor, nn

from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.tasks import PromptMethod
from trainer.gradients import TrainingRow, row_losses
from trainer.initialisation import initial_prompt
from trainer.prompt_quality import LabelledRow, Quality, Trial
from trainer.schedule import passes, share_of_rate, validation_steps

LORA_RANK = 8
LORA_ALPHA = 16
BOTTLENECK = 32
_BETAS = (0.9, 0.98)
_WEIGHT_DECAY = 0.01
_CLIP_NORM = 1.0
_WARMUP_SHARE = 0.1
# The last projection of the feed-forward part, in BART, T5, and Llama and its kin.
_FEED_FORWARD_ENDS = ("fc2", "wo", "down_proj")


@dataclass(frozen=True, slots=True)
class Learner:
    """A model, and which of its tensors (or which prompt beside it) are trained."""

    method: str
    model: TorchLanguageModel
    trained: Sequence[Tensor]

    @property
    def is_prompt(self) -> bool:
        """Whether the network stays as it is."""
        return self.method in ("prompt", "prefix")

    def prompt(self, task: Task) -> Tensor | None:
        """What stands before the inputs of `task`, as it is now."""
        if self.is_prompt:
            return self.trained[0]
        text = task.job.instruction
        return self.model.text_embeddings(text) if text else None

    def trial(self, task: Task, rows: Sequence[LabelledRow]) -> Trial:
        """The learner as it is now, on rows of a task."""
        with torch.no_grad():
            prompt = self.prompt(task)
        prompt = None if prompt is None else prompt.detach()
        return Trial(prompt, task.job.labels, rows, self._row_method)

    @property
    def _row_method(self) -> PromptMethod:
        return "prefix" if self.method == "prefix" else "prompt"

    def state(self) -> list[Tensor]:
        """A copy of what is trained."""
        return [tensor.detach().clone() for tensor in self.trained]

    def load(self, state: Sequence[Tensor]) -> None:
        """Go back to what `state` gave, from wherever its tensors are."""
        with torch.no_grad():
            for tensor, kept in zip(self.trained, state, strict=True):
                tensor.copy_(kept)

    def training_rows(self, task: Task) -> Callable[[Sequence[int]], list[TrainingRow]]:
        """What makes train rows of the task, by their numbers; inputs are tokenised once."""
        job = task.job
        outputs = {label: self.model.tokenize_output(label) for label in job.labels or ()}
        prompt = self.trial(task, ()).prompt
        count = len(job.train)
        texts = self.model.tokenize_inputs(
            [text for text, _ in job.train],
            [0 if prompt is None else len(prompt)] * count,
            [max(map(len, outputs.values()))] * count,
        )

        def rows(numbers: Sequence[int]) -> list[TrainingRow]:
            # One tensor for the step: the instruction's embeddings change with the weights.
            now = self.prompt(task)
            made = []
            for i in numbers:
                right = job.train[i][1]
                others = [ids for label, ids in outputs.items() if label != right]
                row = Row(now, texts[i].ids, self._row_method)
                made.append(TrainingRow(row, [outputs[right], *others], 1 / len(numbers)))
            return made

        return rows


def new_learner(method: str, model: TorchLanguageModel, task: Task, length: int) -> Learner:
    """A learner that starts at `model`, of whose network all but the prompts take a copy.

    `length` is that of prompt and prefix, which start from the texts of `task`.
    """
    if method in ("prompt", "prefix"):
        kind: PromptMethod = "prefix" if method == "prefix" else "prompt"
        start = initial_prompt(model, "text", task.job, length, 0, kind)
        return Learner(method, model, [start.detach().clone().requires_grad_()])
    own = type(model)(
        copy.deepcopy(model.network),
        model.tokenizer,
        name=model.name,
        fingerprint=model.fingerprint,
    )
    parts = {"full": _all_weights, "lora": _lora, "adapter": _adapters}
    trained = parts[method](own.network)
    for tensor in trained:
        tensor.requires_grad_(True)
    return Learner(method, own, trained)


def _all_weights(network: nn.Module) -> list[Tensor]:
    return list(network.parameters())


def _lora(network: nn.Module) -> list[Tensor]:
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA), network)
    return [weights for name, weights in network.named_parameters() if "lora_" in name]


def _adapters(network: nn.Module) -> list[Tensor]:
    trained: list[Tensor] = []
    for name, module in list(network.named_modules()):
        if name.rpartition(".")[2] in _FEED_FORWARD_ENDS and isinstance(module, nn.Linear):
            adapter = Adapter(module.out_features).to(module.weight.device)
            module.register_forward_hook(adapter.follow)
            trained += adapter.parameters()
    if not trained:
        raise SystemExit("no feed-forward layers that adapters could follow: leave adapter out")
    return trained


class Adapter(nn.Module):
    """x + up(gelu(down(x))), which starts as x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._down = nn.Linear(width, BOTTLENECK)
        self._up = nn.Linear(BOTTLENECK, width)
        nn.init.zeros_(self._up.weight)
        nn.init.zeros_(self._up.bias)

    def follow(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        """As a forward hook of the layer that it comes after."""
        changed: Tensor = output + self._up(nn.functional.gelu(self._down(output)))
        return changed


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast to train."""

    rate: float
    steps: int
    rows_per_step: int
    validations: int
    seed: int


def train(learner: Learner, task: Task, schedule: Schedule) -> Iterator[int]:
    """Train; gives the steps done at each validation, with the learner ready to be measured.

    As is the custom, dropout, weight decay and clipping are for weights and not for prompts.
    """
    of_weights = not learner.is_prompt
    device = learner.model.device
    torch.manual_seed(schedule.seed)  # dropout
    optimizer = torch.optim.AdamW(
        learner.trained,
        schedule.rate,
        _BETAS,
        weight_decay=_WEIGHT_DECAY if of_weights else 0.0,
        fused=device.type == "cuda",
    )
    warmup = max(1, int(schedule.steps * _WARMUP_SHARE))
    rows = learner.training_rows(task)
    order = passes(
        len(task.job.train),
        schedule.rows_per_step,
        random.Random(f"{schedule.seed}/{task.job.name}"),
    )
    validate_after = validation_steps(schedule.steps, schedule.validations)
    for step in range(schedule.steps):
        learner.model.network.train(of_weights)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * share_of_rate(step, schedule.steps, warmup, "cosine")
        optimizer.zero_grad()
        torch.autograd.backward(row_losses(learner.model, rows(next(order))).mean())
        if of_weights:
            nn.utils.clip_grad_norm_(learner.trained, _CLIP_NORM)
        optimizer.step()
        if step in validate_after:
            learner.model.network.train(False)
            yield step + 1
    learner.model.network.train(False)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to: the best by dev rows of every rate and every check."""

    quality: Quality
    rate: float
    steps: int


def search(learner: Learner, task: Task, bench: Bench, seed: int) -> Found:
    """Train with each rate from where the learner is, and leave it at the best by dev rows."""
    start = learner.state()
    best: tuple[Found, list[Tensor]] | None = None
    for rate in bench.rates(learner.method):
        learner.load(start)
        options = bench.options
        schedule = Schedule(rate, bench.steps, options.rows_per_step, options.validations, seed)
        for steps in train(learner, task, schedule):
            quality = quality_of(learner.model, learner.trial(task, task.job.validation))
            if best is None or quality > best[0].quality:
                best = Found(quality, rate, steps), learner.state()
    if best is None:
        raise SystemExit("give at least one rate and one validation")
    learner.load(best[1])
    return best[0]


def taught(
    model: TorchLanguageModel, task: Task, method: str, bench: Bench, seed: int
) -> dict[str, object]:
    """What one method comes to on one task."""
    began = time.perf_counter()
    learner = new_learner(method, model, task, bench.options.length)
    found = search(learner, task, bench, seed)
    return {
        "task": task.job.name,
        "seed": seed,
        "rate": found.rate,
        "steps": found.steps,
        "dev": found.quality.score,
        "test": quality_of(learner.model, learner.trial(task, task.test)).score,
        "seconds": time.perf_counter() - began,
    }
