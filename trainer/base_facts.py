"""What a base model is, and which of the things that are asked of it work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
import torch

from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, PromptyardError
from router.interfaces import FloatArray, LanguageModel, PromptedInput
from router.tasks import PromptMethod

_TEXT = "The parcel never came, and I want my money back."
_INSTRUCTION = "Is the customer pleased or not?"
_LABELS = ("pleased", "not pleased")
_LENGTHS = (3, 7)
# How far a log-probability may move with its batch, by the bytes of a number.
_ROUNDING = {4: 1e-3, 2: 0.25}


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What a base model is.

    `methods` says for each method of soft prompts the bytes of a virtual token, or why the
    architecture does not allow it.
    """

    name: str
    fingerprint: str
    architecture: str
    reads: str
    parameters: int
    number_type: str
    device: str
    hidden_size: int
    vocabulary: int
    window: int
    methods: Mapping[PromptMethod, int | str]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried, whether it works, and what was seen."""

    what: str
    works: bool
    seen: str


def describe(model: LanguageModel) -> BaseFacts:
    """The facts of a loaded base model.

    Raises:
        IncompatibleModelError: not a Hugging Face model.
    """
    torch_model = _torch_model(model)
    methods: dict[PromptMethod, int | str] = {}
    for method in get_args(PromptMethod):
        try:
            methods[method] = 4 * torch_model.prompt_width(method)
        except IncompatibleModelError as error:
            methods[method] = error.value
    return BaseFacts(
        name=model.name,
        fingerprint=model.fingerprint,
        architecture=type(torch_model.network).__name__,
        reads="prompt, input and output in one window (causal)"
        if torch_model.shares_window
        else "prompt and input in the encoder, output from the decoder (seq2seq)",
        parameters=sum(weights.numel() for weights in torch_model.network.parameters()),
        number_type=str(torch_model.embedding.dtype).removeprefix("torch."),
        device=str(torch_model.device),
        hidden_size=torch_model.hidden_size,
        vocabulary=torch_model.vocabulary_size,
        window=torch_model.window,
        methods=methods,
    )


def check(model: LanguageModel) -> list[Check]:
    """Run prompts through a loaded base model, one check after the other; none stops the rest.

    Raises:
        IncompatibleModelError: not a Hugging Face model.
    """
    torch_model = _torch_model(model)
    allowed = [m for m, size in describe(model).methods.items() if isinstance(size, int)]
    checks = [
        _try("scores labels", partial(_scores, torch_model)),
        _try("writes an answer", partial(_writes, torch_model)),
        _try("cuts what its window cannot hold", partial(_cuts, torch_model)),
    ]
    for method in allowed:
        checks += [
            _try(f"reads a {method}", partial(_reads, torch_model, method)),
            _try(f"tunes a {method}", partial(_tunes, torch_model, method)),
        ]
    return [*checks, _try("mixes them in a batch", partial(_mixes, torch_model, allowed))]


def _torch_model(model: LanguageModel) -> TorchLanguageModel:
    if not isinstance(model, TorchLanguageModel):
        raise IncompatibleModelError("base model", model.name, "give a Hugging Face model")
    return model


def _try(what: str, work: Callable[[], str]) -> Check:
    try:
        return Check(what, True, work())
    # Whatever a model's own code raises is what the user wants to hear of.
    except (PromptyardError, AssertionError, ArithmeticError) as error:
        return Check(what, False, str(error))
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        return Check(what, False, f"{type(error).__name__}: {error}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ArithmeticError(otherwise)


def _row(
    model: TorchLanguageModel, method: PromptMethod | None = None, length: int = _LENGTHS[0]
) -> PromptedInput:
    if method is None:
        return PromptedInput(_TEXT, None)
    return PromptedInput(_TEXT, _prompt(model, method, length).cpu().numpy(), method)


def _prompt(model: TorchLanguageModel, method: PromptMethod, length: int) -> torch.Tensor:
    prompt = model.text_embeddings(_INSTRUCTION, length)
    return prompt if method == "prompt" else model.keys_and_values(prompt)


def _label_scores(model: TorchLanguageModel, rows: list[PromptedInput]) -> list[FloatArray]:
    scores = [found.log_probabilities for found in model.score(rows, [_LABELS] * len(rows))]
    _require(all(np.isfinite(row).all() for row in scores), "scores that are not finite")
    return scores


def _scores(model: TorchLanguageModel) -> str:
    [scores] = _label_scores(model, [_row(model)])
    return ", ".join(f"log p({label}) {p:.2f}" for label, p in zip(_LABELS, scores, strict=True))


def _writes(model: TorchLanguageModel) -> str:
    [answer] = model.generate([_row(model)], 8)
    return f"{answer.text!r} ({answer.output_tokens} tokens, {answer.finish_reason})"


def _cuts(model: TorchLanguageModel) -> str:
    # A word is at least a token.
    [scores] = model.score([PromptedInput("word " * 2 * model.window, None)], [_LABELS])
    _require(scores.truncated, "a text of twice the window was not cut")
    return f"{scores.input_tokens} of {model.window} positions left for the input"


def _reads(model: TorchLanguageModel, method: PromptMethod) -> str:
    bare, prompted = _label_scores(model, [_row(model), _row(model, method)])
    moved = float(np.abs(prompted - bare).max())
    _require(moved > 0, "it changes nothing")
    return f"moves the labels' log p by up to {moved:.2f}"


def _tunes(model: TorchLanguageModel, method: PromptMethod) -> str:
    prompt = _prompt(model, method, _LENGTHS[0]).clone().requires_grad_()
    [tokens] = model.tokenize_inputs([_TEXT], [_LENGTHS[0]], [8])
    row = Row(prompt, tokens.ids, method)
    [scores] = model.log_likelihoods([row], [[model.tokenize_output(text) for text in _LABELS]])
    torch.autograd.backward(-scores[0])
    gradient = prompt.grad
    _require(gradient is not None and bool(gradient.isfinite().all()), "no finite gradient")
    length = 0.0 if gradient is None else float(gradient.norm())
    _require(length > 0, "the gradient is zero")
    changed = any(weights.grad is not None for weights in model.network.parameters())
    _require(not changed, "weights of the base model got a gradient")
    return f"gradient of length {length:.3g}, none for the base model"


def _mixes(model: TorchLanguageModel, methods: list[PromptMethod]) -> str:
    rows = [_row(model), *(_row(model, m, length) for m in methods for length in _LENGTHS)]
    together = _label_scores(model, rows)
    moved = max(
        float(np.abs(_label_scores(model, [row])[0] - scores).max())
        for row, scores in zip(rows, together, strict=True)
    )
    limit = _ROUNDING[model.embedding.element_size()]
    _require(moved <= limit, f"an answer's log p moves by {moved:.2g} with its batch")
    return f"{len(rows)} rows, log p as alone within {moved:.1g}"
