"""What can be said of a soft prompt by looking at it: norms, nearest tokens, similar prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import torch
from torch.nn import functional

from router.artifacts import ArtifactReader
from router.backends.torch_model import TorchLanguageModel
from router.errors import CorruptArtifactError
from router.interfaces import FloatArray, LanguageModel
from router.loading import read_prompt
from router.tasks import PromptSummary, TaskKey, TaskRecord

_TOKENS_AT_A_TIME = 8192


@dataclass(frozen=True, slots=True)
class NearToken:
    """A vocabulary token, and the cosine of its embedding with a virtual token."""

    token: str
    cosine: float


@dataclass(frozen=True, slots=True)
class Similar:
    """Another task's prompt, and the cosine of the two."""

    task: TaskKey
    cosine: float


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a soft prompt looks like.

    `norms` are of the virtual tokens `[P]`; of a prefix, `layer_norms` are the mean lengths of the
    keys and the values `[layers, 2]`. `near_tokens` `[P]` and `vocabulary_norm`, the mean length of
    a token's embedding, are None for a prefix and where its base model is not at hand.
    """

    norms: tuple[float, ...]
    layer_norms: tuple[tuple[float, float], ...]
    near_tokens: tuple[tuple[NearToken, ...], ...] | None
    vocabulary_norm: float | None
    similar: tuple[Similar, ...]


def inspect_prompt(
    artifacts: ArtifactReader,
    record: TaskRecord,
    others: Iterable[TaskRecord],
    model: LanguageModel | None,
    near: int = 5,
) -> Inspection:
    """Look at the prompt of `record`; `others` are compared with it, `model` is its base model.

    Raises:
        CorruptArtifactError: the task has no prompt, or its file is damaged.
    """
    values = read_prompt(artifacts, record)
    summary = record.prompt
    layer_norms: tuple[tuple[float, float], ...] = ()
    if summary is not None and summary.method == "prefix":
        parts = values.reshape(len(values), summary.layers, 2, -1)
        means = np.linalg.norm(parts, axis=-1).mean(0)
        layer_norms = tuple((float(keys), float(vectors)) for keys, vectors in means)
    near_tokens = vocabulary_norm = None
    if summary is not None and summary.method == "prompt" and _is_base(model, summary):
        near_tokens, vocabulary_norm = nearest_tokens(model, values, near)
    return Inspection(
        norms=tuple(float(norm) for norm in np.linalg.norm(values, axis=1)),
        layer_norms=layer_norms,
        near_tokens=near_tokens,
        vocabulary_norm=vocabulary_norm,
        similar=tuple(_similar(artifacts, record, values, others)),
    )


def nearest_tokens(
    model: TorchLanguageModel, values: FloatArray, count: int
) -> tuple[tuple[tuple[NearToken, ...], ...], float]:
    """The `count` vocabulary tokens nearest to each vector `[P, H]` by cosine, best first.

    Returns them with the mean length of the vocabulary's embeddings.
    """
    vectors = functional.normalize(torch.tensor(values, device=model.device), dim=1)
    best = torch.full((len(values), 0), 0.0, device=model.device)
    ids = best.long()
    length = 0.0
    for begin in range(0, model.vocabulary_size, _TOKENS_AT_A_TIME):
        some = range(begin, min(begin + _TOKENS_AT_A_TIME, model.vocabulary_size))
        embeddings = model.token_embeddings(some)
        length += float(embeddings.norm(dim=1).sum())
        cosines = vectors @ functional.normalize(embeddings, dim=1).T
        candidates = torch.cat([best, cosines], dim=1)
        numbers = torch.cat([ids, torch.tensor(some, device=ids.device).expand_as(cosines)], dim=1)
        best, places = candidates.topk(min(count, candidates.shape[1]), dim=1)
        ids = numbers.gather(1, places)
    near = tuple(
        tuple(
            NearToken(str(model.tokenizer.convert_ids_to_tokens(number)), round(cosine, 4))
            for number, cosine in zip(row_ids, row_cosines, strict=True)
        )
        for row_ids, row_cosines in zip(ids.tolist(), best.tolist(), strict=True)
    )
    return near, length / model.vocabulary_size


def prompt_similarity(one: FloatArray, other: FloatArray) -> float:
    """The cosine of the mean virtual tokens of two prompts `[P, W]` and `[Q, W]`.

    SPoT, Vu et al. 2022, section 4.1.
    """
    first, second = one.mean(0), other.mean(0)
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / lengths) if lengths else 0.0


def _similar(
    artifacts: ArtifactReader, record: TaskRecord, values: FloatArray, others: Iterable[TaskRecord]
) -> Sequence[Similar]:
    found = []
    for other in others:
        if other.key == record.key or not _comparable(record.prompt, other.prompt):
            continue
        try:
            there = read_prompt(artifacts, other)
        except CorruptArtifactError:
            continue  # `list` and the server say so; it is not this task's
        found.append(Similar(other.key, prompt_similarity(values, there)))
    return sorted(found, key=lambda similar: -similar.cosine)


def _comparable(one: PromptSummary | None, other: PromptSummary | None) -> bool:
    return (
        one is not None
        and other is not None
        and (one.method, one.base_model, one.width) == (other.method, other.base_model, other.width)
    )


def _is_base(model: LanguageModel | None, summary: PromptSummary) -> TypeGuard[TorchLanguageModel]:
    return isinstance(model, TorchLanguageModel) and model.fingerprint == summary.base_model
