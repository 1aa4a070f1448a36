"""A prompt made from examples: every label beside the mean encoder state of its examples.

A base model that was trained to read such prompts (`trainer.base_model.episodes`) answers under
them before any tuning; for others they are one more place to start from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from router.backends.torch_model import TorchLanguageModel

# BERT's first unused token: its embedding marks an example mean.
MARKER = 1
_MARKER_WORD = "[unused0]"
_LABEL_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Place:
    """One vector of a prompt: the example mean of a label, or the embedding of a token."""

    token: int
    label: int | None = None


def example_layout(
    labels: Sequence[Sequence[int]], instruction: Sequence[int], length: int
) -> list[Place] | None:
    """What stands where in a prompt of at most `length` vectors.

    The instruction, repeated or cut, then each label followed by its mean. `labels` and
    `instruction` are token ids; a label has two tokens where there is room for that and one
    otherwise. None where the labels do not fit.
    """
    for kept in range(_LABEL_TOKENS, 0, -1):
        pairs = [
            place
            for number, ids in enumerate(labels)
            for place in (*(Place(token) for token in ids[:kept]), Place(MARKER, number))
        ]
        room = length - len(pairs)
        if room >= 0:
            said = (list(instruction) * (room // max(1, len(instruction)) + 1))[:room]
            return [*(Place(token) for token in said), *pairs]
    return None


def example_vectors(means: Tensor, known: Tensor, embedding: Tensor) -> Tensor:
    """What stands in a prompt for each label's examples, before the marker is added.

    means `[..., C, H]` of states, known `[..., C]` (labels that have examples), embedding `[V, H]`
    -> `[..., C, H]`: the direction in which a label's examples differ from those of the others,
    as long as a usual token embedding.
    """
    present = known[..., None].to(means.dtype)
    units = functional.normalize(means, dim=-1) * present
    centre = units.sum(-2, keepdim=True) / present.sum(-2, keepdim=True).clamp(min=1)
    directions = functional.normalize((units - centre) * present, dim=-1)
    vectors: Tensor = directions * embedding.detach().float().norm(dim=1).mean()
    return vectors


def mean_states(states: Tensor, mask: Tensor) -> Tensor:
    """Unit vectors `[B, H]`: the mean of states `[B, L, H]` over the places of `mask` `[B, L]`."""
    weights = mask[:, :, None].to(states.dtype)
    means = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return functional.normalize(means, dim=-1)


def example_prompt(
    model: TorchLanguageModel,
    length: int,
    instruction: str,
    labels: Sequence[str],
    rows: Sequence[tuple[str, str]],
) -> Tensor | None:
    """The prompt `[P, H]`, float32, P <= `length`, that the rows (input, output) of a task make.

    None where the model has no encoder, or the labels do not fit.
    """
    states = model.text_states([text for text, _ in rows])
    instruction_ids, *label_ids = model.plain_ids([instruction, *labels])
    layout = example_layout(label_ids, instruction_ids, length)
    if states is None or layout is None:
        return None
    label_of = torch.tensor([labels.index(output) for _, output in rows], device=model.device)
    one_hot = functional.one_hot(label_of, len(labels)).to(states.dtype)
    counts = one_hot.sum(0)
    means = one_hot.T @ functional.normalize(states, dim=-1) / counts.clamp(min=1)[:, None]
    tokens = model.token_embeddings([place.token for place in layout])
    vectors = example_vectors(means, counts > 0, model.embedding)
    if _MARKER_WORD in model.tokenizer.get_vocab():
        vectors = vectors + model.token_embeddings([MARKER])
    return torch.stack(
        [
            token if place.label is None else vectors[place.label]
            for place, token in zip(layout, tokens, strict=True)
        ]
    )
