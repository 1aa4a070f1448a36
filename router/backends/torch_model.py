"""What seq2seq and causal base models share: tokens, layout of prompts, batches, scoring.

A row is `PROMPT text`: the soft prompt is plainly prepended to the input embeddings of the
tokenizer's own output, so that prompts can be exchanged with PEFT. Rows of one batch may carry
prompts of different tasks and lengths, or none.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    EncoderDecoderCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from router.backends.rows import IGNORED, Row, TextTokens, batches, lay_out, padded, token_losses
from router.backends.text_pieces import BatchStreamer, CancelledRows, Detokenizer, RowWriter
from router.errors import IncompatibleModelError, InvalidInputError
from router.interfaces import FloatArray, Generation, PromptedInput, Scores

# Bound memory: positions that one forward pass may hold, and logits (64 M floats are 256 MB).
_MAX_BATCH_POSITIONS = 8192
_MAX_LOGITS = 64_000_000
# Padding that costs more than one more forward pass.
_MAX_BATCH_PADDING = 1024
_DEFAULT_WINDOW = 512
_NO_LIMIT = 1_000_000


@dataclass(frozen=True, slots=True)
class Started:
    """A batch whose inputs have been read: what continuing it with output tokens needs.

    `next_logits` `[B, V]` are for the first output token; `mask` `[B, S]` covers the inputs;
    `encoded` `[B, S, H]` is the encoder's output, if there is an encoder.
    """

    next_logits: Tensor
    cache: Cache
    mask: Tensor
    encoded: Tensor | None = None

    def select(self, rows: Tensor) -> Started:
        """The rows of these indices `[N]`, repeats allowed."""
        cache = _shallow_copy(self.cache)
        cache.batch_select_indices(rows)
        return Started(
            self.next_logits,
            cache,
            self.mask[rows],
            None if self.encoded is None else self.encoded[rows],
        )


class TorchLanguageModel(ABC):
    """A frozen Hugging Face model behind `router.interfaces.LanguageModel`. Thread-safe.

    `network` is never changed by this class: no weight requires a gradient.
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
        self._detokenizer = Detokenizer(tokenizer)
        self._one_batch_at_a_time = threading.Lock()
        self.end_ids = _end_ids(network, tokenizer)
        tokenizer_end = tokenizer.eos_token_id
        self.end_id = tokenizer_end if tokenizer_end in self.end_ids else self.end_ids[0]
        pad_id = tokenizer.pad_token_id
        self._pad_id = self.end_id if pad_id is None else int(pad_id)
        self.window = _window(network, tokenizer)
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

    # ---- what the two architectures do differently

    @abstractmethod
    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids that stand before and after every text."""

    @abstractmethod
    def tokenize_output(self, text: str) -> tuple[int, ...]:
        """The tokens that the model should write for `text`, the end token last.

        Raises:
            InvalidInputError: more tokens than the model can write.
        """

    @abstractmethod
    def _start(self, rows: Sequence[Row]) -> Started:
        """Read the inputs of `rows`."""

    @abstractmethod
    def _continue(self, started: Started, ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` after each of the output tokens `ids` `[B, T]` (right-padded)."""

    @abstractmethod
    def negative_log_likelihood(
        self, rows: Sequence[Row], outputs: Sequence[Sequence[int]]
    ) -> Tensor:
        """-log p(output | prompt, input) per row `[B]` in nats, differentiable in the prompts.

        One forward pass; padding and memory are the caller's care. `outputs[i]` comes from
        `tokenize_output`.
        """

    def text_states(self, texts: Sequence[str]) -> Tensor | None:  # noqa: ARG002 - overridden
        """The encoder's mean state of each text without a prompt, `[B, H]`, float32.

        None where there is no encoder.
        """
        return None

    def copy_for_gradients(self) -> Self:
        """The model to compute gradients with: on some CPUs a faster copy in bfloat16.

        Where the CPU multiplies bfloat16 itself, a step takes about half the time of float32; the
        attention is then plain matrix products, for which torch's fused kernel is slow. Elsewhere
        it is this model.
        """
        if self.device.type != "cpu" or not _cpu_multiplies_bfloat16():
            return self
        network = copy.deepcopy(self.network).to(torch.bfloat16)
        network.set_attn_implementation("eager")
        return type(self)(network, self.tokenizer, name=self.name, fingerprint=self.fingerprint)

    # ---- tokens and embeddings

    def tokenize_inputs(
        self, texts: Sequence[str], prompt_lengths: Sequence[int], output_tokens: Sequence[int]
    ) -> list[TextTokens]:
        """Token ids of `texts`, cut on the right so that prompt and output still fit the window.

        Raises:
            IncompatibleModelError: the window cannot hold the prompt and one token of the text.
        """
        plain = self.plain_ids(texts)
        tokens = []
        for ids, prompt_length, outputs in zip(plain, prompt_lengths, output_tokens, strict=True):
            taken = prompt_length + (outputs if self.shares_window else 0)
            room = self.window - taken - len(self._before) - len(self._after)
            if room < 1:
                raise IncompatibleModelError(
                    "soft prompt",
                    f"{prompt_length} vectors and {outputs} output tokens",
                    f"use a shorter prompt: {self.name} takes {self.window} positions in all",
                )
            tokens.append(
                TextTokens((*self._before, *ids[:room], *self._after), truncated=len(ids) > room)
            )
        return tokens

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

    # ---- scoring

    def score(
        self, inputs: Sequence[PromptedInput], outputs: Sequence[Sequence[str]]
    ) -> list[Scores]:
        """Log-probability of each candidate output, per row: `outputs[i]` `[C_i]` -> `[C_i]`."""
        ids_of = {text: self.tokenize_output(text) for texts in outputs for text in texts}
        candidates = [[ids_of[text] for text in texts] for texts in outputs]
        longest = [max((len(ids) for ids in row), default=1) for row in candidates]
        rows = self._rows(inputs, longest)
        return [
            Scores(values, len(text.ids), tuple(len(ids) - 1 for ids in labels), text.truncated)
            for values, labels, (_, text) in zip(
                self.score_rows([row for row, _ in rows], candidates), candidates, rows, strict=True
            )
        ]

    def score_rows(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[FloatArray]:
        """`score` for rows and outputs that are token ids already: any number, in batches."""
        scores: list[FloatArray] = [np.zeros(0, np.float32) for _ in rows]
        lengths = [len(row) for row in rows]
        for batch in batches(lengths, _MAX_BATCH_POSITIONS, _MAX_BATCH_PADDING):
            with torch.no_grad(), self._one_batch_at_a_time:
                found = self.log_likelihoods(
                    [rows[i] for i in batch], [candidates[i] for i in batch]
                )
            for i, values in zip(batch, found, strict=True):
                scores[i] = values.cpu().numpy()
        return scores

    def log_likelihoods(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[Sequence[int]]]
    ) -> list[Tensor]:
        """Log p of each row's candidate outputs: `candidates[i]` `[C_i]` -> `[C_i]`, in nats.

        Each input is read once and its cache repeated for its candidates. Differentiable in the
        prompts. One batch; memory is the caller's care.
        """
        row_of = [i for i, row in enumerate(candidates) for _ in row]
        outputs = [ids for row in candidates for ids in row]
        if not outputs:
            return [torch.zeros(0, device=self.device) for _ in rows]
        started = self._start(rows)
        targets = padded(outputs, IGNORED, self.device)
        repeats = torch.tensor(row_of, device=self.device)
        first = started.next_logits.float().log_softmax(-1)
        totals = first[repeats, targets[:, 0]]
        following = targets.shape[1] - 1
        if following:
            # The end token is never fed: nothing is predicted after it.
            fed = targets[:, :-1].clamp(min=0)
            size = max(1, _MAX_LOGITS // (following * first.shape[1]))
            parts = []
            for chunk in torch.split(torch.arange(len(outputs), device=self.device), size):
                logits = self._continue(started.select(repeats[chunk]), fed[chunk])
                parts.append(token_losses(logits, targets[chunk, 1:]).sum(1))
            totals = totals - torch.cat(parts)
        return list(torch.split(totals, [len(row) for row in candidates]))

    # ---- generation

    def generate(
        self,
        inputs: Sequence[PromptedInput],
        max_new_tokens: int,
        on_piece: Callable[[int, str], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> list[Generation]:
        """Greedy answers, one per row; see `LanguageModel.generate`.

        Where the window is short, half of what the prompt leaves of it is kept for the answer.
        """
        if max_new_tokens < 1:
            raise InvalidInputError("max_new_tokens", max_new_tokens, "ask for at least 1")
        limits = [min(max_new_tokens, self._room_for_answer(row)) for row in inputs]
        rows = self._rows(inputs, limits)
        answers: dict[int, Generation] = {}
        # Rows with the same limit share a batch: a row's limit must not depend on its neighbours.
        for limit in sorted(set(limits)):
            members = [i for i, row_limit in enumerate(limits) if row_limit == limit]
            lengths = [len(rows[i][0]) + limit for i in members]
            for batch in batches(lengths, _MAX_BATCH_POSITIONS):
                chosen = [members[k] for k in batch]
                writers = [self._writer(i, on_piece, cancelled) for i in chosen]
                self._generate_batch([rows[i][0] for i in chosen], writers, limit)
                for i, writer in zip(chosen, writers, strict=True):
                    answers[i] = Generation(
                        text=writer.text,
                        finish_reason=writer.finish_reason,
                        input_tokens=len(rows[i][1].ids),
                        output_tokens=writer.output_tokens,
                        truncated=rows[i][1].truncated,
                    )
        return [answers[i] for i in range(len(inputs))]

    def _generate_batch(
        self, rows: Sequence[Row], writers: Sequence[RowWriter], limit: int
    ) -> None:
        with torch.no_grad(), self._one_batch_at_a_time:
            embeddings, mask = self._lay_out(rows)
            self.network.generate(
                inputs_embeds=embeddings,
                attention_mask=mask,
                max_new_tokens=limit,
                streamer=BatchStreamer(writers),
                stopping_criteria=StoppingCriteriaList([CancelledRows(writers)]),
            )

    def _room_for_answer(self, row: PromptedInput) -> int:
        left = self.window - (0 if row.prompt is None else len(row.prompt))
        return max(1, left // 2 if self.shares_window else self.window - 1)

    def _writer(
        self,
        row: int,
        on_piece: Callable[[int, str], None] | None,
        cancelled: Callable[[int], bool] | None,
    ) -> RowWriter:
        return RowWriter(
            self._detokenizer,
            self.end_ids,
            None if on_piece is None else lambda text: on_piece(row, text),
            None if cancelled is None else lambda: cancelled(row),
        )

    def _rows(
        self, inputs: Sequence[PromptedInput], output_tokens: Sequence[int]
    ) -> list[tuple[Row, TextTokens]]:
        tensors: dict[int, Tensor] = {}
        for row in inputs:
            if row.prompt is not None and id(row.prompt) not in tensors:
                tensors[id(row.prompt)] = self._prompt_tensor(row.prompt)
        tokens = self.tokenize_inputs(
            [row.text for row in inputs],
            [0 if row.prompt is None else len(row.prompt) for row in inputs],
            output_tokens,
        )
        return [
            (Row(None if row.prompt is None else tensors[id(row.prompt)], text.ids), text)
            for row, text in zip(inputs, tokens, strict=True)
        ]

    def _prompt_tensor(self, prompt: FloatArray) -> Tensor:
        if prompt.ndim != 2 or prompt.shape[1] != self.hidden_size:
            raise IncompatibleModelError(
                "soft prompt",
                f"shape {prompt.shape}",
                f"{self.name} takes vectors of {self.hidden_size} numbers",
            )
        # A copy: torch cannot wrap the read-only arrays of a snapshot.
        return torch.tensor(prompt, dtype=torch.float32, device=self.device)


def _shallow_copy(cache: Cache) -> Cache:
    """A cache of the same tensors: selecting its rows and adding to it leave `cache` as it is."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(
            _shallow_copy(cache.self_attention_cache), _shallow_copy(cache.cross_attention_cache)
        )
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def _cpu_multiplies_bfloat16() -> bool:
    # Older versions of torch cannot tell.
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _end_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    for found in (
        network.generation_config.eos_token_id,
        network.config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    raise IncompatibleModelError(
        "base model", "no end token", "set eos_token_id in its config.json"
    )


def _window(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Positions that the model can take; T5 and its kin have no limit of their own."""
    limits = [
        getattr(network.config, "max_position_embeddings", None),
        getattr(network.config, "n_positions", None),
        tokenizer.model_max_length,
    ]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _NO_LIMIT]
    return min(known, default=_DEFAULT_WINDOW)
