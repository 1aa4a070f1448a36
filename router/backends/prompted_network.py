"""A frozen network with its tokenizer: tokens, input embeddings, and soft prompts before them.

A row is `PROMPT text`. A soft prompt of the method `prompt` is plainly prepended to the input
embeddings of the tokenizer's own output, so that prompts can be exchanged with PEFT; one of the
method `prefix` gives every layer keys and values for positions before the text. Rows of one batch
may carry prompts of different tasks, methods and lengths, or none.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from router.backends.checkpoint import (
    avoid_slow_attention,
    cpu_multiplies_bfloat16,
    end_ids,
    window,
)
from router.backends.prompt_memory import PromptMemory, ReadPrompt
from router.backends.rows import Row, TextTokens, lay_out
from router.errors import IncompatibleModelError, InvalidInputError
from router.interfaces import FloatArray, PromptedInput
from router.tasks import PromptMethod
from router.templates import FilledTemplate

# Bounds the memory for prompts of served tasks, as the network reads them.
_MAX_PROMPT_BYTES = 256 * 2**20
# Outputs whose tokens are kept.
_MAX_OUTPUTS = 4096


@dataclass(frozen=True, slots=True)
class PrefixShape:
    """What a prefix holds for each virtual token: keys and values of every layer.

    They are ordered as PEFT orders them: by layer, keys before values, by head.
    """

    layers: int
    heads: int
    head_size: int

    @property
    def size(self) -> int:
        """Numbers of the keys (or of the values) of one layer."""
        return self.heads * self.head_size

    @property
    def width(self) -> int:
        """W, numbers for each virtual token."""
        return self.layers * 2 * self.size


class PromptedNetwork(ABC):
    """A frozen Hugging Face network, its tokens, and its rows `PROMPT text` as input embeddings.

    `network` is never changed: no weight requires a gradient.
    """

    # Whether input and output stand in one window, as they do without an encoder; rows are then
    # padded on the left, so that every input ends where its output begins.
    shares_window: ClassVar[bool]

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        fingerprint: str,
    ) -> None:
        self.network = network.requires_grad_(False).train(False)
        self.tokenizer = tokenizer
        self._name = name
        self._fingerprint = fingerprint
        self._embed = cast(nn.Embedding, network.get_input_embeddings())
        self.end_ids = end_ids(network, tokenizer)
        tokenizer_end = tokenizer.eos_token_id
        self.end_id = tokenizer_end if tokenizer_end in self.end_ids else self.end_ids[0]
        pad_id = tokenizer.pad_token_id
        self._pad_id = self.end_id if pad_id is None else int(pad_id)
        self.window = window(network, tokenizer)
        # A checkpoint's own habits (beams, forced tokens, penalties) would make `generate`
        # disagree with `score`.
        network.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            bos_token_id=network.generation_config.bos_token_id,
            decoder_start_token_id=network.generation_config.decoder_start_token_id,
            eos_token_id=list(self.end_ids),
            pad_token_id=self._pad_id,
            do_sample=False,
            num_beams=1,
        )
        self._before, self._after = self._affixes()
        self._prompts = PromptMemory(_MAX_PROMPT_BYTES)

    @property
    def name(self) -> str:
        """What a person calls it: the folder's or the hub's name."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Digest of configuration, weights and tokenizer."""
        return self._fingerprint

    @property
    def hidden_size(self) -> int:
        """H, the width of the input embeddings and so of a soft prompt."""
        return int(self._embed.weight.shape[1])

    @property
    @abstractmethod
    def prefix_shape(self) -> PrefixShape:
        """What a prefix of this model is made of.

        Raises:
            IncompatibleModelError: the architecture does not allow one.
        """

    @abstractmethod
    def keys_and_values(self, prompt: Tensor) -> Tensor:
        """The prefix `[P, W]`, float32, of what the layers compute for input embeddings `[P, H]`.

        Raises:
            IncompatibleModelError: the architecture does not allow prefixes.
        """

    def prompt_width(self, method: PromptMethod) -> int:
        """W, the numbers that a virtual token of a soft prompt of that method has.

        Raises:
            IncompatibleModelError: the architecture does not allow the method.
        """
        return self.hidden_size if method == "prompt" else self.prefix_shape.width

    @property
    def vocabulary_size(self) -> int:
        """Rows of the input embedding."""
        return int(self._embed.weight.shape[0])

    @property
    def embedding(self) -> Tensor:
        """The input embeddings `[V, H]`."""
        return self._embed.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are; every tensor given to the model must be there too."""
        return self._embed.weight.device

    @abstractmethod
    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids that stand before and after every text."""

    def tokenize_output(self, text: str) -> tuple[int, ...]:
        """The tokens that the model should write for `text`, the end token last.

        Raises:
            InvalidInputError: more tokens than the model can write.
        """
        return self._output_tokens(text)

    @cached_property
    def _output_tokens(self) -> Callable[[str], tuple[int, ...]]:
        """`_tokenize_output`, of which many are kept: labels come with every row."""
        return lru_cache(_MAX_OUTPUTS)(self._tokenize_output)

    @abstractmethod
    def _tokenize_output(self, text: str) -> tuple[int, ...]: ...

    def copy_for_gradients(self, precision: str = "auto") -> Self:
        """The model to compute gradients with, in `float32` or `bfloat16`; this one if it is that.

        `auto` is bfloat16 where a CPU multiplies it itself, where a step then takes about half the
        time of float32. Elsewhere it is this model as it was loaded.
        """
        if precision == "auto":
            faster = self.device.type == "cpu" and cpu_multiplies_bfloat16()
            dtype = torch.bfloat16 if faster else self.embedding.dtype
        else:
            dtype = torch.float32 if precision == "float32" else torch.bfloat16
        if dtype == self.embedding.dtype:
            return self
        network = copy.deepcopy(self.network).to(dtype)
        avoid_slow_attention(network)
        return type(self)(network, self.tokenizer, name=self.name, fingerprint=self.fingerprint)

    def tokenize_inputs(
        self, texts: Sequence[str], prompt_lengths: Sequence[int], output_tokens: Sequence[int]
    ) -> list[TextTokens]:
        """Token ids of `texts`, cut so that prompt and output still fit the window.

        They are cut on the right; a filled template loses the end of its passages instead.

        Raises:
            IncompatibleModelError: the window cannot hold the prompt and one token of the text.
        """
        plain = self.plain_ids(texts)
        tokens = []
        for text, ids, prompt_length, outputs in zip(
            texts, plain, prompt_lengths, output_tokens, strict=True
        ):
            taken = prompt_length + (outputs if self.shares_window else 0)
            room = self.window - taken - len(self._before) - len(self._after)
            if room < 1:
                raise IncompatibleModelError(
                    "soft prompt",
                    f"{prompt_length} vectors and {outputs} output tokens",
                    f"use a shorter prompt: {self.name} takes {self.window} positions in all",
                )
            kept = ids
            if len(ids) > room and isinstance(text, FilledTemplate):
                kept = self._with_fewer_passages(text, room)
            tokens.append(
                TextTokens((*self._before, *kept[:room], *self._after), truncated=len(ids) > room)
            )
        return tokens

    def _with_fewer_passages(self, text: FilledTemplate, room: int) -> list[int]:
        """Token ids of `text` without the end of its passages, which would not fit `room`."""
        before, passages, after = self.plain_ids([text.before, text.passages, text.after])
        return [*before, *passages[: max(0, room - len(before) - len(after))], *after]

    def text_embeddings(self, text: str, length: int | None = None) -> Tensor:
        """Input embeddings `[P, H]` of a text without special tokens, float32.

        With `length`, the tokens are repeated or cut to that many.

        Raises:
            InvalidInputError: the text has no tokens.
        """
        ids = self.plain_ids([text])[0]
        if not ids:
            raise InvalidInputError("prompt text", repr(text), "give a text with words in it")
        if length is not None:
            ids = (ids * (length // len(ids) + 1))[:length]
        return self.token_embeddings(ids)

    def token_embeddings(self, ids: Sequence[int]) -> Tensor:
        """Input embeddings `[P, H]` of token ids, float32."""
        found: Tensor = self._embed(torch.tensor(list(ids), device=self.device))
        return found.float()

    def plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, whole and without special tokens."""
        if not texts:
            return []
        # No truncation or padding here: both are state of a fast tokenizer, shared by threads.
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _lay_out(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        return lay_out(rows, self._embed, self._pad_id, pad_left=self.shares_window)

    def rows_of(
        self, inputs: Sequence[PromptedInput], output_tokens: Sequence[int]
    ) -> list[tuple[Row, TextTokens]]:
        """The rows of `inputs`, whose outputs have at most so many tokens, and their texts.

        Raises:
            IncompatibleModelError: a prompt is of another width, or too long for the window.
        """
        prompts: dict[int, ReadPrompt] = {}
        for item in inputs:
            if item.prompt is not None and id(item.prompt) not in prompts:
                prompts[id(item.prompt)] = self._read_prompt(item.prompt, item.method)
        tokens = self.tokenize_inputs(
            [item.text for item in inputs],
            [0 if item.prompt is None else len(item.prompt) for item in inputs],
            output_tokens,
        )
        rows = []
        for item, text in zip(inputs, tokens, strict=True):
            row = Row(None, text.ids)
            if item.prompt is not None:
                prompt = prompts[id(item.prompt)]
                row = Row(prompt.tensor, text.ids, prompt.method)
            rows.append((row, text))
        return rows

    def _read_prompt(self, prompt: FloatArray, method: PromptMethod) -> ReadPrompt:
        width = self.prompt_width(method)
        if prompt.ndim != 2 or prompt.shape[1] != width:
            raise IncompatibleModelError(
                f"soft prompt, method {method}",
                f"shape {prompt.shape}",
                f"{self.name} takes vectors of {width} numbers",
            )

        def read() -> ReadPrompt:
            # A copy: torch cannot wrap arrays that cannot be written to.
            return ReadPrompt(torch.tensor(prompt, dtype=torch.float32, device=self.device), method)

        if prompt.flags.writeable:  # it may be another prompt by the next time
            return read()
        return self._prompts.get(prompt, lambda: self._share(read()))

    def _share(self, prompt: ReadPrompt) -> ReadPrompt:
        """A prompt as it is kept for many rows, whatever their texts."""
        return prompt
