"""Gradients of many rows, added up in micro-batches that fit the memory of the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from router.backends.rows import Row, batches, sent
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError

# Keeps the logarithm finite where a rejected token is certain.
_LEAST = 1e-6
_MAX_POSITIONS = {"cpu": 2048, "cuda": 131_072}
# Padding that costs less than the fixed work of one more forward and backward pass.
_MAX_PADDING = {"cpu": 96, "cuda": 24_576}


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One row of a step, and how much its loss counts. The first of `candidates` is right.

    `rejected` are outputs that are to become less probable, and how much that counts.
    """

    row: Row
    candidates: Sequence[tuple[int, ...]]
    weight: float
    rejected: Sequence[tuple[int, ...]] = ()
    rejected_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class _Gradients:
    """What one forward and one backward pass gave: losses `[B]`, and a gradient a prompt."""

    losses: Tensor
    prompts: Sequence[Tensor]
    of_prompts: Sequence[Tensor]


class MicroBatches:
    """Adds the gradients of rows to their prompts, batch by batch of similar length.

    A batch takes at most `positions` (0: what suits the device). Where the device's memory is full,
    that is halved for good, and `say` is told.
    """

    def __init__(
        self, model: TorchLanguageModel, positions: int, say: Callable[[str], None]
    ) -> None:
        kind = model.device.type
        self._model = model
        self._say = say
        self._positions = positions or _MAX_POSITIONS.get(kind, _MAX_POSITIONS["cuda"])
        self._padding = _MAX_PADDING.get(kind, _MAX_PADDING["cuda"])

    def add(self, rows: Sequence[TrainingRow]) -> list[float]:
        """Add the gradient of each row's weighted loss to its prompt; the losses, unweighted.

        Raises:
            IncompatibleModelError: the device's memory cannot hold a single row.
        """
        losses: dict[int, float] = {}
        found: list[tuple[list[int], _Gradients]] = []
        done: set[int] = set()
        while waiting := [i for i in range(len(rows)) if i not in done]:
            lengths = [len(rows[i].row) for i in waiting]
            for batch in batches(lengths, self._positions, self._padding):
                chosen = [waiting[place] for place in batch]
                gradients = self._gradients_if_they_fit([rows[i] for i in chosen])
                if gradients is None:
                    self._halve(len(chosen) * max(lengths[place] for place in batch), len(chosen))
                    break
                found.append((chosen, gradients))
                done.update(chosen)
        # Looked at last of all: a GPU works on one batch while the next one is prepared.
        for chosen, gradients in found:
            values = self._take([rows[i] for i in chosen], gradients)
            losses.update(zip(chosen, values, strict=True))
        return [losses[i] for i in range(len(rows))]

    def _gradients_if_they_fit(self, rows: Sequence[TrainingRow]) -> _Gradients | None:
        try:
            losses = row_losses(self._model, rows)
            weights = sent(torch.tensor([row.weight for row in rows]), losses.device)
            prompts = {id(p): p for row in rows if (p := row.row.prompt) is not None}
            # Whole or not at all: half a batch's gradient must not stay where memory ran out.
            found = torch.autograd.grad((losses * weights).sum(), list(prompts.values()))
        except torch.OutOfMemoryError:
            return None
        return _Gradients(losses.detach(), list(prompts.values()), found)

    def _take(self, rows: Sequence[TrainingRow], gradients: _Gradients) -> list[float]:
        """Add the gradients of `rows` to their prompts, but for those whose loss is not finite."""
        values: list[float] = gradients.losses.tolist()
        sound = [row for row, value in zip(rows, values, strict=True) if math.isfinite(value)]
        if len(sound) < len(rows):
            # Kernels of some processors spread what is not a number to other rows' gradients.
            again = iter(self.add(sound))
            return [next(again) if math.isfinite(value) else value for value in values]
        for prompt, gradient in zip(gradients.prompts, gradients.of_prompts, strict=True):
            prompt.grad = gradient if prompt.grad is None else prompt.grad + gradient
        return values

    def _halve(self, positions: int, rows: int) -> None:
        torch.cuda.empty_cache()
        if rows == 1:
            raise IncompatibleModelError(
                "memory of the device",
                f"full with one row of {positions} positions",
                "shorten the inputs or the prompt, or take a smaller base model",
            )
        self._positions = positions // 2
        self._say(f"memory is full: micro-batches of {self._positions} positions from here on")


def row_losses(model: TorchLanguageModel, rows: Sequence[TrainingRow]) -> Tensor:
    """Loss per row `[B]`: to write the right output, and to prefer it to the other labels.

    The second term is cross-entropy over the labels' scores, which is what answers are chosen by;
    without it a prompt learns how often labels occur sooner than how to tell them apart. It is
    zero where the outputs are free text. Where a row has rejected outputs, their unlikelihood is
    added: the mean of them of the sum of -log(1 - p(c)) over their tokens c (Welleck et al. 2020,
    section 4), from the first one that the right output does not have there.
    """
    if not any(row.rejected for row in rows):
        return _wanted(
            model.log_likelihoods([row.row for row in rows], [row.candidates for row in rows])
        )
    outputs = [[*row.candidates, *row.rejected] for row in rows]
    tokens = model.output_token_losses([row.row for row in rows], outputs)
    of_rows = list(zip(rows, torch.split(tokens, [len(each) for each in outputs]), strict=True))
    wanted = _wanted([-losses[: len(row.candidates)].sum(1) for row, losses in of_rows])
    return wanted + torch.stack([_unlikelihood(row, losses) for row, losses in of_rows])


def _wanted(scores: Sequence[Tensor]) -> Tensor:
    """The loss `[B]` of right outputs, from the scores `[C_i]` of each row's candidates."""
    # In one tensor: operations on each row alone would cost a GPU more than the model does.
    counts = [len(row) for row in scores]
    width = max(counts)
    places = torch.tensor([i * width + k for i, count in enumerate(counts) for k in range(count)])
    flat = torch.cat(list(scores))
    table = flat.new_full((len(counts) * width,), -math.inf)
    table = table.scatter(0, sent(places, flat.device), flat).view(-1, width)
    return -(table[:, 0] + table.log_softmax(1)[:, 0])


def _unlikelihood(row: TrainingRow, losses: Tensor) -> Tensor:
    """The weighted unlikelihood of a row's rejected outputs, the last of `losses` `[C, T]`."""
    terms = [losses.new_zeros(())]
    for ids, of_output in zip(row.rejected, losses[len(row.candidates) :], strict=True):
        shared = 0
        while shared < len(ids) - 1 and ids[: shared + 1] == row.candidates[0][: shared + 1]:
            shared += 1
        # What comes before the end token is undesired, not the end; unless nothing else differs.
        end = max(len(ids) - 1, shared + 1)
        probabilities = torch.exp(-of_output[shared:end])
        terms.append(-torch.log(1 - probabilities + _LEAST).sum())
    return row.rejected_weight * torch.stack(terms).sum() / max(1, len(row.rejected))
