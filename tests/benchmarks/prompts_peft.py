"""PEFT's side: prompt tuning of one task after the other, and serving by switching adapters.

It gets the same network in the same precision and mode, the same rows in the same order, and the
same optimiser. PEFT keeps one prompt active and repeats it over the batch.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor

from router.backends.rows import IGNORED, padded, token_losses
from router.backends.torch_model import TorchLanguageModel
from router.interfaces import FloatArray
from trainer.schedule import passes, share_of_rate
from trainer.tuning_settings import TuningJob, TuningSettings

# PEFT warns of its own way with transformers.
warnings.filterwarnings("ignore", category=FutureWarning, module="peft")


def tune_one_after_the_other(
    model: TorchLanguageModel,
    jobs: Sequence[TuningJob],
    starts: Mapping[str, FloatArray],
    settings: TuningSettings,
) -> dict[str, list[float]]:
    """Tune each job's prompt for log p of the right output; the loss of each step, by job name."""
    learner = model.copy_for_gradients(settings.precision)
    return {job.name: _tune(learner, job, starts[job.name], settings) for job in jobs}


def _tune(
    model: TorchLanguageModel, job: TuningJob, start: FloatArray, settings: TuningSettings
) -> list[float]:
    peft = get_peft_model(model.network, _config(model, len(start), inference=False))
    peft.to(model.device).eval()
    prompt = _fill(peft, "default", start)
    outputs = {output: model.tokenize_output(output) for _, output in job.train}
    texts = model.tokenize_inputs(
        [text for text, _ in job.train],
        [len(start)] * len(job.train),
        [max(map(len, outputs.values()))] * len(job.train),
    )
    order = passes(
        len(job.train), settings.rows_per_step, random.Random(f"{settings.seed}/{job.name}")
    )
    optimizer = torch.optim.AdamW([prompt], settings.learning_rate, (0.9, 0.98), weight_decay=0.0)
    means = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * share_of_rate(
                step, settings.steps, settings.warmup_steps, settings.schedule
            )
        chosen = next(order)
        optimizer.zero_grad()
        losses = _losses(
            model, peft, [texts[i].ids for i in chosen], [outputs[job.train[i][1]] for i in chosen]
        )
        mean = losses.mean()
        torch.autograd.backward(mean)
        means.append(mean.detach())
        optimizer.step()
    return [float(mean) for mean in means]


class SwitchingAdapters:
    """A copy of the base model in PEFT, with one adapter per prompt `[P, H]`."""

    def __init__(self, model: TorchLanguageModel, prompts: Sequence[FloatArray]) -> None:
        self._model = model
        self._peft: Any = None
        for number, prompt in enumerate(prompts):
            config = _config(model, len(prompt), inference=True)
            if self._peft is None:
                network = copy.deepcopy(model.network)
                self._peft = get_peft_model(network, config, adapter_name=str(number))
            else:
                self._peft.add_adapter(str(number), config)
            _fill(self._peft, str(number), prompt)
        self._peft.to(model.device).eval()
        self._length = max(map(len, prompts))

    def answers(
        self, texts: Sequence[str], prompts: Sequence[int], new_tokens: int, *, grouped: bool
    ) -> list[str]:
        """Greedy answers; `prompts` has the number of each row's prompt.

        `grouped`: the rows of a prompt in one batch; else one row after the other, as they come.
        """
        found: dict[int, str] = {}
        for number, rows in _turns(prompts, grouped):
            self._peft.set_adapter(str(number))
            with torch.no_grad():
                ids = self._peft.generate(
                    **self._inputs([texts[i] for i in rows]), max_new_tokens=new_tokens
                )
            answers = self._model.tokenizer.batch_decode(ids, skip_special_tokens=True)
            found.update(zip(rows, answers, strict=True))
        return [found[i].strip() for i in range(len(texts))]

    def scores(
        self, texts: Sequence[str], prompts: Sequence[int], outputs: Sequence[str], *, grouped: bool
    ) -> list[float]:
        """Log p of one output per row."""
        found: dict[int, float] = {}
        for number, rows in _turns(prompts, grouped):
            self._peft.set_adapter(str(number))
            inputs = self._inputs([texts[i] for i in rows])
            targets = [self._model.tokenize_output(outputs[i]) for i in rows]
            with torch.no_grad():
                losses = _forward(self._model, self._peft, inputs, targets)
            found.update(zip(rows, (-losses).tolist(), strict=True))
        return [found[i] for i in range(len(texts))]

    def _inputs(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = self._model.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self._model.window - self._length,
            return_tensors="pt",
        ).to(self._model.device)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _turns(prompts: Sequence[int], grouped: bool) -> list[tuple[int, list[int]]]:
    """Prompts in the order in which they are switched to, with the rows of each turn."""
    if not grouped:
        return [(number, [i]) for i, number in enumerate(prompts)]
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for i, number in enumerate(prompts):
        rows[number].append(i)
    return list(rows.items())


def _config(model: TorchLanguageModel, length: int, *, inference: bool) -> PromptTuningConfig:
    if model.shares_window:
        raise SystemExit("PEFT's side is written for encoder-decoders: give another --model")
    return PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=length,
        num_transformer_submodules=1,
        token_dim=model.hidden_size,
        num_layers=1,
        num_attention_heads=1,
        prompt_tuning_init="RANDOM",
        inference_mode=inference,
    )


def _fill(peft: Any, adapter: str, values: FloatArray) -> Tensor:
    """Give an adapter its prompt; the parameter that holds it."""
    weight: Tensor = peft.prompt_encoder[adapter].embedding.weight
    with torch.no_grad():
        weight.copy_(torch.tensor(values))
    return weight


def _losses(
    model: TorchLanguageModel,
    peft: Any,
    texts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
) -> Tensor:
    ids = padded(texts, model.tokenizer.pad_token_id, model.device)
    mask = padded([[1] * len(text) for text in texts], 0, model.device)
    return _forward(model, peft, {"input_ids": ids, "attention_mask": mask}, outputs)


def _forward(
    model: TorchLanguageModel,
    peft: Any,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[Sequence[int]],
) -> Tensor:
    """-log p of an output per row `[B]`, in one forward pass of PEFT."""
    targets = padded(outputs, IGNORED, model.device)
    fed = targets.roll(1, dims=1).clamp(min=0)
    fed[:, 0] = model.network.generation_config.decoder_start_token_id
    logits = peft(**inputs, decoder_input_ids=fed).logits
    return token_losses(logits, targets).sum(1)
