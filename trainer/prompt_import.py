"""A prompt that was tuned elsewhere, measured as our own are."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError
from router.interfaces import LanguageModel
from trainer.peft_exchange import read_peft
from trainer.prompt_quality import Trial, measure, measure_baselines
from trainer.tuned_prompt import TunedPrompt
from trainer.tuning_settings import TuningJob


def import_prompt(model: LanguageModel, job: TuningJob, folder: Path) -> TunedPrompt:
    """The prompt of a PEFT folder, with its scores on the validation rows of `job`.

    Raises:
        InvalidInputError: the folder cannot be used.
        IncompatibleModelError: the prompt does not fit the model.
    """
    began = time.perf_counter()
    found = read_peft(folder, model)
    if not isinstance(model, TorchLanguageModel):
        raise IncompatibleModelError(
            "base model", model.name, "prompts are measured with a Hugging Face model"
        )
    prompt = torch.tensor(found.values, device=model.device)
    [quality] = measure(
        model, [Trial(prompt, job.labels, job.validation, found.method, job.metric)]
    )
    baselines = measure_baselines(
        model, job.instruction, job.labels, job.train, job.validation, job.metric
    )
    return TunedPrompt(
        name=job.name,
        values=found.values,
        scores={"prompt": quality.score, **baselines.scores},
        validation_loss=-quality.minus_loss,
        instruction_loss=baselines.instruction_loss,
        losses=(),
        steps=0,
        seconds=time.perf_counter() - began,
        method=found.method,
        layers=model.prefix_shape.layers if found.method == "prefix" else 0,
        settings={"initialisation": "imported from a PEFT folder"},
    )
