"""How well soft prompts answer labelled rows: the score by the task's metric, and the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError
from router.interfaces import FloatArray, LanguageModel, PromptedInput
from router.tasks import PromptMethod
from trainer.answer_metrics import Metric, score
from trainer.answer_metrics import same_text as same_text

LabelledRow = tuple[str, str]

_LOSS_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True, order=True)
class Quality:
    """Compares by the score, then by the loss (negated: more is better).

    The loss is the mean of -log p(right label among the labels), or of -log p(output) where the
    outputs are free text. It decides between prompts that score the same, which is most
    of them when the rows are few.
    """

    score: float
    minus_loss: float

    def clearly_exceeds(self, other: Quality) -> bool:
        """Whether this is better by more than rounding: losses differ a little with the batch."""
        return self > Quality(other.score, other.minus_loss + _LOSS_ROUNDING)


@dataclass(frozen=True, slots=True)
class Trial:
    """A prompt `[P, W]` (or none) to try on rows (input, output) of one task."""

    prompt: Tensor | None
    labels: tuple[str, ...] | None
    rows: Sequence[LabelledRow]
    method: PromptMethod = "prompt"
    metric: Metric = "accuracy"


def measure(model: TorchLanguageModel, trials: Sequence[Trial]) -> list[Quality]:
    """The quality of each trial. The rows of all trials share batches."""
    candidates = [[trial.labels or (output,) for _, output in trial.rows] for trial in trials]
    ids_of = {
        text: model.tokenize_output(text) for rows in candidates for texts in rows for text in texts
    }
    rows = [row for trial in trials for row in _rows(model, trial)]
    scores = model.score_rows(
        rows, [[ids_of[text] for text in texts] for rows in candidates for texts in rows]
    )
    qualities = []
    begin = 0
    for trial in trials:
        end = begin + len(trial.rows)
        qualities.append(_quality(model, trial, scores[begin:end]))
        begin = end
    return qualities


@dataclass(frozen=True, slots=True)
class Baselines:
    """What a prompt must beat: scores on the validation rows, and the loss of the instruction.

    `scores`: `majority` (always the most frequent output of the training rows), `no_prompt`, and
    `instruction`, its plain text as the prompt.
    """

    scores: Mapping[str, float]
    instruction_loss: float


def measure_baselines(
    model: TorchLanguageModel,
    instruction: str,
    labels: tuple[str, ...] | None,
    train: Sequence[LabelledRow],
    validation: Sequence[LabelledRow],
    metric: Metric = "accuracy",
) -> Baselines:
    """The baselines on `validation`, none of which has a soft prompt."""
    text = model.text_embeddings(instruction) if instruction.strip() else None
    without, with_instruction = measure(
        model, [Trial(prompt, labels, validation, metric=metric) for prompt in (None, text)]
    )
    scores = {
        "majority": majority_score(train, validation, metric),
        "no_prompt": without.score,
        "instruction": with_instruction.score,
    }
    return Baselines(scores, -with_instruction.minus_loss)


def majority_score(
    train: Sequence[LabelledRow], rows: Sequence[LabelledRow], metric: Metric = "accuracy"
) -> float:
    """The score of always answering the most frequent output of `train` (the first, if several)."""
    most_frequent = Counter(sorted(output for _, output in train)).most_common(1)[0][0]
    return score(metric, [most_frequent] * len(rows), [output for _, output in rows])


def output_probabilities(
    model: TorchLanguageModel, trial: Trial, rejected: Sequence[Sequence[str]]
) -> tuple[float, float]:
    """The mean probabilities of the right and of the rejected outputs, over rows that have these.

    A row's is that of its whole output; of several rejected ones, their sum.
    """
    chosen = [(row, texts) for row, texts in zip(trial.rows, rejected, strict=True) if texts]
    some = replace(trial, rows=[row for row, _ in chosen])
    scores = model.score(_inputs(some), [(row[1], *texts) for row, texts in chosen])
    found = [np.exp(row.log_probabilities.astype(np.float64)) for row in scores]
    desired, undesired = [row[0] for row in found], [row[1:].sum() for row in found]
    return float(np.mean(desired)), float(np.mean(undesired))


def _rows(model: TorchLanguageModel, trial: Trial) -> list[Row]:
    length = 0 if trial.prompt is None else len(trial.prompt)
    longest = max(
        len(model.tokenize_output(text))
        for text in (trial.labels or [output for _, output in trial.rows])
    )
    tokens = model.tokenize_inputs(
        [text for text, _ in trial.rows],
        [length] * len(trial.rows),
        [longest] * len(trial.rows),
    )
    return [Row(trial.prompt, text.ids, trial.method) for text in tokens]


def _quality(model: TorchLanguageModel, trial: Trial, scores: Sequence[np.ndarray]) -> Quality:
    if trial.labels is None:
        loss = -float(np.mean([row[0] for row in scores]))
        return Quality(_score(trial, _generated(model, trial)), -loss)
    right = [trial.labels.index(output) for _, output in trial.rows]
    answers = [trial.labels[int(row.argmax())] for row in scores]
    log_shares = [
        float(torch.from_numpy(row).log_softmax(0)[k]) for row, k in zip(scores, right, strict=True)
    ]
    return Quality(_score(trial, answers), float(np.mean(log_shares)))


def _score(trial: Trial, answers: Sequence[str]) -> float:
    return score(trial.metric, answers, [output for _, output in trial.rows])


def answers_under(
    model: LanguageModel,
    prompt: FloatArray,
    method: PromptMethod,
    labels: tuple[str, ...] | None,
    rows: Sequence[LabelledRow],
) -> list[str]:
    """The answer to each row under a prompt `[P, W]`.

    Raises:
        IncompatibleModelError: this is no Hugging Face model.
    """
    if not isinstance(model, TorchLanguageModel):
        raise IncompatibleModelError(
            "base model", model.name, "prompts are measured with a Hugging Face model"
        )
    trial = Trial(torch.from_numpy(prompt), labels, rows, method)
    if trial.labels is None:
        return _generated(model, trial)
    scores = model.score(_inputs(trial), [trial.labels] * len(trial.rows))
    return [trial.labels[row.best] for row in scores]


def _inputs(trial: Trial) -> list[PromptedInput]:
    values = None if trial.prompt is None else trial.prompt.detach().cpu().numpy()
    return [PromptedInput(text, values, trial.method) for text, _ in trial.rows]


def _generated(model: TorchLanguageModel, trial: Trial) -> list[str]:
    longest = max(len(model.tokenize_output(output)) for _, output in trial.rows)
    return [answer.text for answer in model.generate(_inputs(trial), longest)]
