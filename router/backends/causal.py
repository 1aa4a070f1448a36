"""Decoder-only base models: GPT-2, Llama, Qwen and every other `AutoModelForCausalLM`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import DynamicCache

from router.backends.cached_prefixes import cache_of_prefixes, check_cache, prefix_of_cache
from router.backends.chosen_logits import chosen, logits_only_at
from router.backends.prompt_memory import ReadPrompt
from router.backends.prompted_network import PrefixShape
from router.backends.rows import IGNORED, Row, token_losses
from router.backends.seq2seq import split_special_tokens
from router.backends.started import Started
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError

# Stands between the text and the output, as the end of the text's line.
_SEPARATOR = "\n"


class CausalLanguageModel(TorchLanguageModel):
    r"""`pad | PROMPT text \n output`: padded on the left, positions counted from the mask.

    The prompt follows the padding directly; `prompt | pad | text` would put a hole into the
    positions of the shorter rows. A prefix is what the cache holds before the text is read; all
    rows have it in front of their padding, which counts for no position there.
    """

    shares_window = True

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        before, _ = split_special_tokens(self)
        after = tuple(self.plain_ids([_SEPARATOR])[0])
        if not before and not after:
            before = (self.end_id,)  # an empty text must still be one token long
        return before, after

    def _tokenize_output(self, text: str) -> tuple[int, ...]:
        return (*self.plain_ids([text])[0], self.end_id)

    @cached_property
    def prefix_shape(self) -> PrefixShape:
        with torch.no_grad():
            cache = self.network(
                inputs_embeds=self.embedding[:1][None], use_cache=True
            ).past_key_values
        check_cache(cache, takes_positions="position_ids" in self._parameters)
        _, heads, _, size = cache.layers[0].keys.shape
        return PrefixShape(len(cache.layers), heads, size)

    def keys_and_values(self, prompt: Tensor) -> Tensor:
        # Asked for its shape first, which refuses what has none.
        shape = self.prefix_shape
        with torch.no_grad():
            cache = self.network(
                inputs_embeds=prompt.detach()[None].to(self.embedding.dtype), use_cache=True
            ).past_key_values
        return prefix_of_cache(cache, shape)

    @cached_property
    def _takes_prefixes(self) -> bool:
        try:
            return self.prefix_shape.layers > 0
        except IncompatibleModelError:
            return False

    def _share(self, prompt: ReadPrompt) -> ReadPrompt:
        # Nothing before a token depends on what follows it: the keys and values of the prompt are
        # the same for all texts, and are computed once for all rows of a task.
        if prompt.method == "prefix" or not self._takes_prefixes:
            return prompt
        return ReadPrompt(self.keys_and_values(prompt.tensor), "prefix")

    def _read(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, DynamicCache | None]:
        """Embeddings `[B, S, H]` of what follows the prefixes, the whole mask, the prefixes."""
        texts = [row if row.prefix is None else Row(None, row.ids) for row in rows]
        embeddings, mask = self._lay_out(texts)
        if len(texts) == sum(row.prefix is None for row in rows):
            return embeddings, mask, None
        cache, covered = cache_of_prefixes(
            [row.prefix for row in rows], self.prefix_shape, self.network.config, embeddings.dtype
        )
        return embeddings, torch.cat([covered.to(mask.dtype), mask], dim=1), cache

    def _start(self, rows: Sequence[Row]) -> Started:
        embeddings, mask, cache = self._read(rows)
        out = self.network(
            inputs_embeds=embeddings,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **self._positions(mask, embeddings.shape[1]),
            **self._only_last_logits(1),
        )
        return Started(out.logits[:, -1], out.past_key_values, mask)

    def _continue(self, started: Started, ids: Tensor, positions: Tensor) -> Tensor:
        with logits_only_at(self.network, positions):
            logits, _ = self._feed(started, ids)
        return chosen(logits, positions, ids.shape)

    def _advance(self, started: Started, ids: Tensor) -> Started:
        logits, mask = self._feed(started, ids)
        return Started(logits[:, -1], started.cache, mask)

    def _feed(self, started: Started, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The logits after each of the tokens `ids` `[B, T]`, and the mask with them."""
        mask = torch.cat([started.mask, started.mask.new_ones(ids.shape)], dim=1)
        out = self.network(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=started.cache,
            use_cache=True,
            **self._positions(mask, ids.shape[1]),
        )
        return out.logits, mask

    def negative_log_likelihood(
        self, rows: Sequence[Row], outputs: Sequence[Sequence[int]]
    ) -> Tensor:
        # The last output token is predicted but not fed.
        whole = [
            Row(row.prompt, (*row.ids, *ids[:-1]), row.method)
            for row, ids in zip(rows, outputs, strict=True)
        ]
        embeddings, mask, cache = self._read(whole)
        width = max(len(ids) for ids in outputs)
        logits = self.network(
            inputs_embeds=embeddings,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **self._positions(mask, embeddings.shape[1]),
            **self._only_last_logits(width),
        ).logits[:, -width:]
        # Left padding ends all rows at the same position, and so their outputs.
        targets = torch.tensor(
            [[*[IGNORED] * (width - len(ids)), *ids] for ids in outputs], device=self.device
        )
        return token_losses(logits, targets).sum(1)

    def _positions(self, mask: Tensor, last: int) -> dict[str, Tensor]:
        """Position ids of the last columns of `mask`; none where the model takes none (ALiBi)."""
        if "position_ids" not in self._parameters:
            return {}
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -last:]}

    def _only_last_logits(self, count: int) -> dict[str, int]:
        return {"logits_to_keep": count} if "logits_to_keep" in self._parameters else {}

    @property
    def _parameters(self) -> set[str]:
        return set(inspect.signature(self.network.forward).parameters)
