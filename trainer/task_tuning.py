"""One task while its prompt is tuned: its rows, its prompt, and how it goes."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.errors import InvalidInputError
from trainer.gradients import TrainingRow
from trainer.initialisation import choose_start
from trainer.prompt_parameters import PromptParameters
from trainer.prompt_quality import (
    Baselines,
    Quality,
    Trial,
    measure_baselines,
    output_probabilities,
)
from trainer.schedule import passes, share_of_rate, validation_steps
from trainer.tuned_prompt import TunedPrompt, TuningFailure, Validation
from trainer.tuning_settings import TuningJob, TuningSettings

# With fewer rows, those for validation are too few to tell the prompt of one step from another's:
# a prompt that is tuned once more takes all steps. On rows held out of the example tasks' training
# files that gave 76.3 % right where as many steps as were best gave 73.0, and 73.3 without (soft
# prompts alone, three seeds); on 15 public tasks of 80 rows there was no difference.
_FEW_ROWS = 400
# Rows of a task in each step. There, 4 did as well as 8 where the outputs are a closed set, and
# worse on free text.
_ROWS_PER_STEP = 8
_OF_FEW_ROWS = 4
# With more labels, each row is compared with a sample of them: time and memory stay bounded.
_MAX_OTHER_LABELS = 15
# Of a task that failed: nothing is worse.
WORST = Quality(-math.inf, -math.inf)


class TaskTuning:
    """The state of one task while it is tuned.

    `refit_steps`: go on for so many steps without looking at the validation rows. `run` is what to
    call it in a log.
    """

    def __init__(
        self,
        model: TorchLanguageModel,
        job: TuningJob,
        settings: TuningSettings,
        baselines: Baselines | None = None,
        refit_steps: int | None = None,
    ) -> None:
        for field, rows in (("train", job.train), ("validation", job.validation)):
            if not rows:
                raise InvalidInputError(f"{field} rows of {job.name}", "none", "give some")
            strangers = {output for _, output in rows if output not in (job.labels or (output,))}
            if strangers:
                raise InvalidInputError(
                    f"{field} rows of {job.name}", min(strangers), "use one of the labels"
                )
        settings = replace(settings, rows_per_step=settings.rows_per_step or _rows_per_step(job))
        self.job = job
        self.run = job.name
        self.settings = settings
        self._method = settings.method
        self._layers = model.prefix_shape.layers if settings.method == "prefix" else 0
        outputs = dict.fromkeys(
            (
                *(job.labels or ()),
                *(output for _, output in job.train),
                *(text for texts in job.rejected for text in texts),
            )
        )
        self._output_ids = {text: model.tokenize_output(text) for text in outputs}
        longest = max(len(ids) for ids in self._output_ids.values())
        tokens = model.tokenize_inputs(
            [text for text, _ in job.train],
            [settings.length] * len(job.train),
            [longest] * len(job.train),
        )
        self._inputs = [text.ids for text in tokens]
        # Seeded by its name, so that a task meets the same rows alone and beside others.
        self._random = random.Random(f"{settings.seed}/{job.name}")
        self._schedule = passes(len(job.train), settings.rows_per_step, self._random)
        self._started_from, start = choose_start(
            model,
            settings.initialisation,
            job,
            settings.length,
            settings.seed,
            settings.method,
            job.starts,
        )
        self._start = start.detach().clone()
        self.parameters = PromptParameters(
            start, settings.reparametrisation, settings.bottleneck, settings.seed
        )
        self.baselines = baselines or measure_baselines(
            model, job.instruction, job.labels, job.train, job.validation, job.metric
        )
        self._best: tuple[Quality, Tensor] | None = None
        self._stale = 0
        self._losses: list[float] = []
        self._validations: list[Validation] = []
        self._failed = False
        self._stopped = False
        self._validate_after = validation_steps(settings.steps, settings.validations)
        self._refit_steps = refit_steps

    @property
    def prompt(self) -> Tensor:
        """The prompt `[P, W]` as it is now."""
        return self.parameters.prompt

    @property
    def is_running(self) -> bool:
        """Whether the task takes part in the next step."""
        if self._refit_steps is not None:
            return not self._failed and len(self._losses) < self._refit_steps
        settings = self.settings
        left = self._stale < settings.patience and len(self._losses) < settings.steps
        return left and not self._failed and not self._stopped

    @property
    def is_due(self) -> bool:
        """Whether the validation rows are to be tried after the step that was just made."""
        return not self._failed and len(self._losses) - 1 in self._validate_after

    @property
    def tries(self) -> int:
        """How often the validation rows were tried, before the first step apart."""
        return len(self._validations) - 1

    def quality_after(self, tries: int) -> Quality:
        """The best of the first `tries` tries, and of that before the first step."""
        if self._failed:
            return WORST
        return max(_quality(validation) for validation in self._validations[: tries + 1])

    def stop(self) -> None:
        """Take no more steps; the best prompt so far stays."""
        self._stopped = True

    @property
    def is_validated(self) -> bool:
        """Whether the validation rows say how it goes."""
        return self._refit_steps is None

    def refitted(self, model: TorchLanguageModel) -> TaskTuning | None:
        """This task from its start again, on all of its rows; None where that is not wanted."""
        settings, job = self.settings, self.job
        repeats = settings.steps * settings.rows_per_step > len(job.train)
        if settings.refit == "never" or not repeats or self._failed or self._best is None:
            return None
        best = max(self._validations, key=_quality).step
        steps = settings.steps if best and _has_few_rows(job) else best
        everything = replace(
            job,
            train=(*job.train, *job.validation),
            rejected=(*job.rejected, *job.validation_rejected),
        )
        again = TaskTuning(model, everything, settings, self.baselines, steps)
        again.run = f"{self.run}.refit"
        return again

    def trial(self) -> Trial:
        """The prompt as it is now, on the validation rows."""
        job = self.job
        return Trial(self.prompt.detach(), job.labels, job.validation, self._method, job.metric)

    def next_rows(self) -> list[TrainingRow]:
        """The rows of the next step."""
        return [
            TrainingRow(
                Row(self.prompt, self._inputs[i], self._method),
                self._candidates(i),
                weight=1 / self.settings.rows_per_step,
                rejected=self._rejected(i),
                rejected_weight=self.settings.rejected_weight,
            )
            for i in next(self._schedule)
        ]

    def _rejected(self, i: int) -> list[tuple[int, ...]]:
        texts = self.job.rejected[i] if self.job.rejected else ()
        return [self._output_ids[text] for text in texts]

    def _candidates(self, i: int) -> list[tuple[int, ...]]:
        right = self.job.train[i][1]
        others = [label for label in self.job.labels or () if label != right]
        if len(others) > _MAX_OTHER_LABELS:
            others = self._random.sample(others, _MAX_OTHER_LABELS)
        return [self._output_ids[label] for label in (right, *others)]

    def stepped(self, loss: float) -> Mapping[str, float]:
        """Take the mean training loss of a step; the figures of that step, for a log."""
        told = self.settings
        rate = told.learning_rate * share_of_rate(
            len(self._losses), told.steps, told.warmup_steps, told.schedule
        )
        self._losses.append(loss)
        self._failed = not math.isfinite(loss)
        return {"loss/training": loss, "learning_rate": rate}

    def validated(self, quality: Quality) -> Mapping[str, float]:
        """Keep the prompt as it is now if it is the best so far; the figures, for a log."""
        self._validations.append(Validation(len(self._losses), quality.score, -quality.minus_loss))
        better = self._best is None or quality.clearly_exceeds(self._best[0])
        if better and math.isfinite(quality.minus_loss):
            self._best = (quality, self.prompt.detach().clone())
            self._stale = 0
        else:
            self._stale += 1
        return {
            "loss/validation": -quality.minus_loss,
            f"{self.job.metric}/validation": quality.score,
        }

    def values(self) -> dict[str, Any]:
        """What has changed since it was made, apart from tensors: see `restore`."""
        return {
            "losses": self._losses,
            "validations": [asdict(validation) for validation in self._validations],
            "best": None if self._best is None else astuple(self._best[0]),
            "stale": self._stale,
            "failed": self._failed,
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that have changed."""
        best = {} if self._best is None else {"best": self._best[1]}
        trained = {str(n): weights for n, weights in enumerate(self.parameters.trained)}
        return {**best, **trained}

    def restore(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Make a new task what the one was that gave `values` and `tensors`."""
        for _ in values["losses"]:
            self.next_rows()  # the same draws as then, so that the next ones are the same too
        self._losses = list(values["losses"])
        self._validations = [Validation(**validation) for validation in values["validations"]]
        self._stale, self._failed = values["stale"], values["failed"]
        if values["best"] is not None:
            best = tensors["best"].to(self.prompt.device)
            self._best = (Quality(*values["best"]), best)
        with torch.no_grad():
            for number, weights in enumerate(self.parameters.trained):
                weights.copy_(tensors[str(number)])
        self.parameters.follow()

    def probabilities(self, model: TorchLanguageModel) -> dict[str, float]:
        """Those of desired and rejected outputs of the validation rows, before and after tuning."""
        if self._best is None or not any(self.job.validation_rejected):
            return {}
        found: dict[str, float] = {}
        for when, prompt in (("before", self._start), ("after", self._best[1])):
            trial = Trial(prompt, None, self.job.validation, self._method)
            desired, rejected = output_probabilities(model, trial, self.job.validation_rejected)
            found |= {f"desired_{when}": desired, f"rejected_{when}": rejected}
        return found

    @property
    def quality(self) -> Quality:
        """Of the best prompt so far; nothing is worse than that of a task that failed."""
        if self._failed or self._best is None:
            return WORST
        return self._best[0]

    @property
    def steps(self) -> int:
        """How many were made."""
        return len(self._losses)

    @property
    def problem(self) -> str:
        """Why there is no prompt; empty where there is one."""
        if self._failed or self._best is None:
            return f"the loss was not finite at step {len(self._losses)}"
        return ""

    def result(
        self,
        seconds: float,
        refitted: TaskTuning | None = None,
        probabilities: Mapping[str, float] | None = None,
    ) -> TunedPrompt | TuningFailure:
        """What became of the task; the prompt is that of `refitted`, where there is one."""
        if self._failed or self._best is None:
            return TuningFailure(
                self.job.name,
                self.problem,
                "lower the learning rate, or look for odd rows",
            )
        quality, prompt = self._best
        if refitted is not None and not refitted._failed:
            prompt = refitted.prompt.detach()
        return TunedPrompt(
            name=self.job.name,
            values=prompt.cpu().numpy().astype(np.float32),
            scores={"prompt": quality.score, **self.baselines.scores},
            validation_loss=-quality.minus_loss,
            instruction_loss=self.baselines.instruction_loss,
            losses=tuple(self._losses),
            steps=len(self._losses),
            seconds=seconds,
            method=self._method,
            layers=self._layers,
            settings={**asdict(self.settings), "started_from": self._started_from},
            validations=tuple(self._validations),
            probabilities=probabilities or {},
        )


def _has_few_rows(job: TuningJob) -> bool:
    return len(job.train) + len(job.validation) < _FEW_ROWS


def _rows_per_step(job: TuningJob) -> int:
    return _OF_FEW_ROWS if job.labels is not None and _has_few_rows(job) else _ROWS_PER_STEP


def _quality(validation: Validation) -> Quality:
    if not math.isfinite(validation.loss):
        return WORST
    return Quality(validation.score, -validation.loss)
