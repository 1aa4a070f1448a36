"""Episodes: training rows whose prompt is made from examples, as a new task's prompt begins.

An episode holds rows of one classification task. Each row is answered under a prompt in which every
label stands beside the mean encoder state of its examples, those of the other rows of the episode
(never the row itself). That trains both sides of it: the encoder, to put examples of a label
together, and the model, to read such a prompt. Prototypical networks (Snell et al. 2017,
arXiv:1703.05175) do the same with distances in place of a prompt.

In most episodes the labels are renamed at random, and what the instruction says of them is cut:
otherwise the model would know the training tasks by heart and not look at the examples (Yin et al.
2020, arXiv:1912.03820).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.base_model.batches import LONGEST_PROMPT, TrainingRows
from trainer.base_model.start import END, PAD, START
from trainer.example_prompt import example_layout

EPISODE_SHARES = {
    "semantics": 0.20,
    "intents": 0.25,
    "opinions": 0.18,
    "written": 0.10,
    "entailment": 0.08,
    "pairs": 0.09,
    "verification": 0.10,
}
"""A family's share of the episodes."""

_ROWS = 64
_WIDTHS = (32, 48, 80, 120)
_LABELS = (2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 10)
_FEWEST_ROWS_OF_LABEL = 8
_RENAMED = 0.75
# Frequent whole words of BERT's vocabulary, to rename labels with.
_WORD_IDS = range(2000, 9000)
# `.`, `:`, `;` and `?`: what stands before the first of them says nothing of the labels.
_STOPS = frozenset((1012, 1024, 1025, 1029))
_PROMPT_LENGTHS = (12, 16, 20, 20, 20, 24)
_OUTPUT_WIDTH = 8
_IGNORED = -100
_SUPPORT_SHARES = (0.25, 0.5, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class EpisodeBatch:
    """Rows of several episodes.

    Attributes:
        text: `[CLS] text [SEP]`, padded on the right [B, L].
        text_mask: 1 where the text is [B, L].
        group: Number of the row's episode [B].
        label: Number of the row's label in its task [B].
        supports: Whether the row counts for its label's mean [B].
        tokens: `PROMPT [CLS] text [SEP]` [B, L + 24]; a place of an example mean holds padding.
        slot_label: The label whose example mean stands at a place, else -1 [B, L + 24].
        mask: 1 where the prompt or the text is [B, L + 24].
        decoder: Decoder input [B, T].
        labels: What the decoder should say, -100 elsewhere [B, T].
        episodes: How many episodes there are.
        most_labels: How many labels an episode has at most.
    """

    text: Tensor
    text_mask: Tensor
    group: Tensor
    label: Tensor
    supports: Tensor
    tokens: Tensor
    slot_label: Tensor
    mask: Tensor
    decoder: Tensor
    labels: Tensor
    episodes: int
    most_labels: int


@dataclass(frozen=True, slots=True)
class _Task:
    """A task that episodes can be made of: the rows and the tokens of each label."""

    rows: list[NDArray[np.int64]]
    label_tokens: list[list[int]]
    instruction: list[int]
    weight: float


@dataclass(frozen=True, slots=True)
class _Episode:
    """The rows of one episode with their labels, what the labels are called, and the prompt.

    `slot_labels` names the label whose mean stands at a place of the prompt, -1 where the token
    of `slot` does.
    """

    rows: NDArray[np.int64]
    label: NDArray[np.int64]
    outputs: list[list[int]]
    slot: list[int]
    slot_labels: list[int]


class Episodes:
    """Draws episodes from the rows of `TrainingRows`."""

    def __init__(self, rows: TrainingRows, prepared: Path, batch_tokens: int, seed: int) -> None:
        self._rows = rows
        self._batch_tokens = batch_tokens
        self._random = Random(seed)
        self._choice = np.random.default_rng(seed)
        described = json.loads((prepared / "tasks.json").read_text())
        with np.load(prepared / "rows.npz") as file:
            stored = {name: file[name] for name in file.files}
        by_width = _tasks(stored, described)
        self._buckets = [(width, tasks) for width, tasks in sorted(by_width.items()) if tasks]
        self._weights = [sum(task.weight for task in tasks) for _, tasks in self._buckets]
        print("episode tasks by width:", {width: len(tasks) for width, tasks in self._buckets})

    def draw(self) -> EpisodeBatch:
        """A batch of random episodes, of tasks whose texts are about equally long."""
        [(width, tasks)] = self._random.choices(self._buckets, self._weights)
        count = max(1, self._batch_tokens // (2 * width + LONGEST_PROMPT) // _ROWS)
        chosen = self._random.choices(tasks, [task.weight for task in tasks], k=count)
        return self._assemble([self._episode(task) for task in chosen], width)

    def _episode(self, task: _Task) -> _Episode:
        known = range(len(task.rows))
        labels = self._random.sample(known, min(len(known), self._random.choice(_LABELS)))
        each = _ROWS // len(labels)
        picked = [self._choice.permutation(task.rows[label])[:each] for label in labels]
        instruction = task.instruction
        outputs = [task.label_tokens[label] for label in labels]
        if self._random.random() < _RENAMED:
            outputs = [[word] for word in self._random.sample(_WORD_IDS, len(labels))]
            instruction = _question(instruction) if self._random.random() < 0.5 else []
        layout = example_layout(outputs, instruction, self._random.choice(_PROMPT_LENGTHS))
        if layout is None:
            layout = example_layout(outputs, instruction, LONGEST_PROMPT) or []
        return _Episode(
            np.concatenate(picked),
            np.repeat(np.arange(len(labels)), [len(rows) for rows in picked]),
            outputs,
            [place.token for place in layout],
            [-1 if place.label is None else place.label for place in layout],
        )

    def _assemble(self, episodes: Sequence[_Episode], width: int) -> EpisodeBatch:
        def put(values: Sequence[Sequence[int]] | NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(np.array(values, np.int64)).to(self._rows.device)

        sizes = [len(episode.rows) for episode in episodes]
        numbers = np.repeat(np.arange(len(episodes)), sizes)
        shares = np.array([self._random.choice(_SUPPORT_SHARES) for _ in episodes])
        group = put(numbers)
        slots = put([_padded(episode.slot, PAD) for episode in episodes])
        slot_labels = put([_padded(episode.slot_labels, -1) for episode in episodes])
        lengths = put(np.array([len(episode.slot) for episode in episodes]))
        text, text_length = self._rows.framed_texts(
            put(np.concatenate([episode.rows for episode in episodes])), width
        )
        slot_length = lengths[group][:, None]
        position = torch.arange(width + LONGEST_PROMPT, device=text.device)[None, :]
        in_slot = position < slot_length
        in_text = (position >= slot_length) & (position < slot_length + text_length)
        at_slot = position.clamp(max=LONGEST_PROMPT - 1).expand(len(numbers), -1)
        at_text = (position - slot_length).clamp(0, width - 1)
        tokens = torch.where(in_text, text.gather(1, at_text), PAD)
        tokens = torch.where(in_slot, slots[group].gather(1, at_slot), tokens)
        said = [episode.outputs[i] for episode in episodes for i in episode.label]
        decoder = [[START, *ids, *[PAD] * (_OUTPUT_WIDTH - 1 - len(ids))] for ids in said]
        wanted = [[*ids, END, *[_IGNORED] * (_OUTPUT_WIDTH - 1 - len(ids))] for ids in said]
        return EpisodeBatch(
            text,
            (position[:, :width] < text_length).long(),
            group,
            put(np.concatenate([episode.label for episode in episodes])),
            put((self._choice.random(len(numbers)) < shares[numbers]).astype(np.int64)).bool(),
            tokens,
            torch.where(in_slot, slot_labels[group].gather(1, at_slot), -1),
            (in_slot | in_text).long(),
            put(decoder),
            put(wanted),
            len(episodes),
            max(len(episode.outputs) for episode in episodes),
        )


def _question(instruction: Sequence[int]) -> list[int]:
    """The instruction up to its first full stop, colon or question mark."""
    stop = next((i for i, token in enumerate(instruction) if token in _STOPS), 0)
    return list(instruction[: stop + 1])


def _padded(values: Sequence[int], fill: int) -> list[int]:
    return [*values, *[fill] * (LONGEST_PROMPT - len(values))]


def example_means(states: Tensor, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
    """Per row, the mean state of each label's other supporting rows.

    `states` `[B, H]` -> means `[B, C, H]` and whether a label has any `[B, C]`.
    """
    labels = batch.most_labels
    one_hot = torch.nn.functional.one_hot(batch.label, labels).to(states.dtype)
    own = one_hot * batch.supports[:, None]
    sums = states.new_zeros(batch.episodes, labels, states.shape[1])
    sums = sums.index_add(0, batch.group, own[:, :, None] * states[:, None, :])
    counts = states.new_zeros(batch.episodes, labels).index_add(0, batch.group, own)
    others = sums[batch.group] - own[:, :, None] * states[:, None, :]
    other_counts = counts[batch.group] - own
    return others / other_counts.clamp(min=1)[:, :, None], other_counts > 0


def _tasks(
    stored: dict[str, NDArray[np.generic]], described: Sequence[dict[str, object]]
) -> dict[int, list[_Task]]:
    """The tasks with a closed set of outputs, by the width that most of their texts fit into."""
    found = list(_candidates(stored, described))
    of_family: dict[str, float] = {}
    for family, *_ in found:
        of_family[family] = of_family.get(family, 0.0) + 1.0
    by_width: dict[int, list[_Task]] = {width: [] for width in _WIDTHS}
    for family, width, rows, label_tokens, instruction in found:
        weight = EPISODE_SHARES[family] / of_family[family]
        by_width[width].append(_Task(rows, label_tokens, instruction, weight))
    return by_width


_Found = tuple[str, int, list[NDArray[np.int64]], list[list[int]], list[int]]


def _candidates(
    stored: dict[str, NDArray[np.generic]], described: Sequence[dict[str, object]]
) -> Iterator[_Found]:
    lengths = stored["lengths"].astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    tasks = stored["task"].astype(np.int64)
    order = np.argsort(tasks, kind="stable")
    bounds = np.searchsorted(tasks[order], np.arange(len(described) + 1))
    tokens = stored["tokens"]
    for number, about in enumerate(described):
        family = str(about["family"])
        if family not in EPISODE_SHARES:
            continue
        places = order[bounds[number] : bounds[number + 1]]
        input_lengths = lengths[stored["input"][places].astype(np.int64)] + 2
        width = next((w for w in _WIDTHS if (input_lengths <= w).mean() >= 0.7), None)
        if width is None:
            continue
        places = places[input_lengths <= width]
        outputs = stored["output"][places].astype(np.int64)
        labels, counts = np.unique(outputs, return_counts=True)
        labels = labels[(counts >= _FEWEST_ROWS_OF_LABEL) & (lengths[labels] < _OUTPUT_WIDTH)]
        if len(labels) < 2 or np.isin(outputs, labels).mean() < 0.9:
            continue
        yield (
            family,
            width,
            [places[outputs == label] for label in labels],
            [[int(t) for t in tokens[starts[i] : starts[i] + lengths[i]]] for i in labels],
            list(about["instruction"]),  # type: ignore[call-overload]
        )
