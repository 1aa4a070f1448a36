"""Where a soft prompt starts from, before it is tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from router.backends.torch_model import TorchLanguageModel
from router.errors import InvalidInputError
from router.interfaces import FloatArray
from router.tasks import PromptMethod
from trainer.commands import Initialisation
from trainer.example_prompt import example_prompt
from trainer.prompt_quality import LabelledRow, Trial, measure


class TaskTexts(Protocol):
    """What of a task its prompt may start from. Rows are (input, output)."""

    @property
    def instruction(self) -> str:
        """What the model should do."""

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed set of outputs; None where they are free text."""

    @property
    def train(self) -> Sequence[LabelledRow]:
        """The training rows."""

    @property
    def validation(self) -> Sequence[LabelledRow]:
        """The validation rows."""


@dataclass(frozen=True, slots=True)
class Start:
    """A prompt `[P, W]` that exists and may be started from, and what to call it."""

    name: str
    values: FloatArray


def choose_start(
    model: TorchLanguageModel,
    kind: Initialisation,
    about: TaskTexts,
    length: int,
    seed: int,
    method: PromptMethod = "prompt",
    starts: Sequence[Start] = (),
) -> tuple[str, Tensor]:
    """What a prompt starts from, and the prompt.

    `nearest` is the one of `starts` with the least loss on the validation rows (SPoT, Vu et al.
    2022, section 4.2, with the router in place of their task embeddings), or `text` where there are
    none. `best` is whatever has the least loss of those, `examples`, `text` and `vocabulary`.
    A start that is too long is cut, one that is too short is followed by the text.

    Raises:
        InvalidInputError: there is nothing to start from, such as a text without words.
    """
    if kind not in ("best", "nearest"):
        return kind, initial_prompt(model, kind, about, length, seed, method)
    kinds: tuple[Initialisation, ...] = ("text",)
    if kind == "best":
        kinds = ("text", "examples", "vocabulary")
    elif starts:
        kinds = ()
    candidates = [(start.name, _fitted(model, start, about, length, method)) for start in starts]
    problem: InvalidInputError | None = None
    for other in kinds:
        try:
            candidates.append((other, initial_prompt(model, other, about, length, seed, method)))
        except InvalidInputError as error:
            problem = error
    if problem is not None and not candidates:
        raise problem
    qualities = measure(
        model, [Trial(prompt, about.labels, about.validation, method) for _, prompt in candidates]
    )
    losses = [-quality.minus_loss for quality in qualities]
    return candidates[losses.index(min(losses))]


def initial_prompt(
    model: TorchLanguageModel,
    kind: Initialisation,
    about: TaskTexts,
    length: int,
    seed: int,
    method: PromptMethod = "prompt",
) -> Tensor:
    """A prompt `[P, W]`, float32, on the model's device.

    A prefix starts as the keys and values that the layers compute for what a prompt would be.
    `examples` puts every label beside the mean encoder state of its rows (see
    `trainer.example_prompt`), and is `text` where that cannot be made; `text` repeats the
    embeddings of the instruction and the labels up to the length; `vocabulary` takes the embeddings
    of random tokens (Lester et al. 2021, section 3.2); `random` draws a normal distribution as wide
    as the vocabulary. The last two are known to learn slower.

    Raises:
        InvalidInputError: a text without words.
    """
    prompt = _embedded(model, kind, about, length, seed)
    return prompt if method == "prompt" else model.keys_and_values(prompt)


def _fitted(
    model: TorchLanguageModel, start: Start, about: TaskTexts, length: int, method: PromptMethod
) -> Tensor:
    values = torch.tensor(start.values[:length], device=model.device)
    if len(values) == length:
        return values
    try:
        rest = initial_prompt(model, "text", about, length, 0, method)
    except InvalidInputError:
        return values
    return torch.cat([values, rest[len(values) :]])


def _embedded(
    model: TorchLanguageModel,
    kind: Initialisation,
    about: TaskTexts,
    length: int,
    seed: int,
) -> Tensor:
    """The prompt `[P, H]` as input embeddings."""
    instruction, labels = about.instruction, about.labels
    if kind == "examples" and labels is not None:
        made = example_prompt(model, length, instruction, labels, about.train)
        if made is not None:
            return made.detach()
    if kind in ("examples", "text"):
        return model.text_embeddings(" ".join([instruction, *(labels or ())]).strip(), length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocabulary_size, (length,), generator=generator)
    sampled = model.token_embeddings(tokens.tolist())
    if kind == "vocabulary":
        return sampled
    noise = torch.randn(sampled.shape, generator=generator).to(sampled.device)
    return noise * sampled.std() + sampled.mean()
