"""Encoder-decoder base models: BART, T5 and every other `AutoModelForSeq2SeqLM`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from router.backends.chosen_logits import chosen, logits_only_at
from router.backends.decoder_positions import at_positions, takes_positions
from router.backends.encoder_prefixes import (
    Projections,
    captured,
    key_value_projections,
    prefixes_in,
)
from router.backends.output_tree import TreeBatch, tree_batches
from router.backends.prompted_network import PrefixShape
from router.backends.rows import IGNORED, Row, batches, padded, sent, token_losses
from router.backends.running_batch import equal_but_for_rounding
from router.backends.started import Started
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError

_MAX_STATES_POSITIONS = 8192
# An output, to see whether a decoder can read several as a tree.
_TRIED_TEXT = "one two three four"


class Seq2SeqLanguageModel(TorchLanguageModel):
    """`PROMPT text | pad` into the encoder, the output from the decoder.

    The encoder is padded on the right: absolute positions of a row then do not depend on its
    neighbours. A prefix belongs to the encoder's self-attention; the decoder does not see it.
    """

    shares_window = False

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return split_special_tokens(self)

    @property
    def _start_id(self) -> int:
        start = self.network.generation_config.decoder_start_token_id
        if start is None:
            raise IncompatibleModelError(
                "base model", self.name, "set decoder_start_token_id in its config.json"
            )
        return int(start)

    def _tokenize_output(self, text: str) -> tuple[int, ...]:
        encoded = self.tokenizer(text_target=text, verbose=False)["input_ids"]
        ids = [int(token) for token in encoded]
        # BERT's tokenizer opens with [CLS], which is what our decoder starts from anyway; BART's
        # opens with <s>, which its decoder does write first.
        if ids and ids[0] == self._start_id:
            ids = ids[1:]
        if not ids or ids[-1] not in self.end_ids:
            ids.append(self.end_id)
        if len(ids) > self.window:
            raise InvalidInputError(
                "output", text, f"{self.name} can write at most {self.window} tokens"
            )
        return tuple(ids)

    @cached_property
    def _projections(self) -> list[Projections]:
        encoder = self.network.get_encoder()
        return key_value_projections(encoder, encoder.config)

    @property
    def prefix_shape(self) -> PrefixShape:
        layers = self._projections
        size = layers[0][0].out_features
        heads = int(self.network.get_encoder().config.num_attention_heads)
        return PrefixShape(len(layers), heads, size // heads)

    def keys_and_values(self, prompt: Tensor) -> Tensor:
        layers = self._projections
        embeddings = prompt.detach()[None].to(self.embedding.dtype)
        with torch.no_grad(), captured(layers) as seen:
            self.network.get_encoder()(inputs_embeds=embeddings)
        return torch.cat([vectors[0].float() for vectors in seen], dim=1)

    def _encode(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """The encoder's output `[B, S, H]`, and the mask `[B, S]` of what the decoder may read."""
        embeddings, mask = self._lay_out(rows)
        return self._encoded(rows, embeddings, mask), self._without_prefixes(mask, rows)

    def _encoded(self, rows: Sequence[Row], embeddings: Tensor, mask: Tensor | None) -> Tensor:
        prefixed = any(row.prefix is not None for row in rows)
        with prefixes_in(self._projections if prefixed else (), rows):
            states: Tensor = self.network.get_encoder()(
                inputs_embeds=embeddings, attention_mask=mask
            ).last_hidden_state
        return states

    def _without_prefixes(self, mask: Tensor, rows: Sequence[Row]) -> Tensor:
        """`mask` `[B, S]` where prefixes, which belong to the encoder, are hidden."""
        lengths = [0 if row.prefix is None else len(row.prefix) for row in rows]
        if not any(lengths):
            return mask
        columns = torch.arange(mask.shape[1], device=mask.device)
        return mask * (columns >= self._numbers(lengths)[:, None])

    def _start(self, rows: Sequence[Row]) -> Started:
        states, mask = self._encode(rows)
        first = torch.full((len(rows), 1), self._start_id, device=self.device)
        out = self.network(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=first,
            use_cache=True,
        )
        written = torch.ones_like(first)
        return Started(out.logits[:, -1], out.past_key_values, mask, states, written)

    def _continue(self, started: Started, ids: Tensor, positions: Tensor) -> Tensor:
        with logits_only_at(self.network, positions):
            out = self.network(
                encoder_outputs=BaseModelOutput(last_hidden_state=started.encoded),
                attention_mask=started.mask,
                decoder_input_ids=ids,
                past_key_values=started.cache,
                use_cache=True,
            )
        return chosen(out.logits, positions, ids.shape)

    def output_token_losses(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[tuple[int, ...]]]
    ) -> Tensor:
        if self.reads_trees and any(candidates):
            return self._losses_in_trees(rows, candidates)
        return super().output_token_losses(rows, candidates)

    @cached_property
    def reads_trees(self) -> bool:
        """Whether the decoder can read the outputs of a row as one tree: it is tried.

        It must let itself be told where a token stands, and what it sees.
        """
        if not takes_positions(self._position_embedding):
            return False
        [text] = self.tokenize_inputs([_TRIED_TEXT], [0], [1])
        rows = [Row(None, text.ids[: 1 + i]) for i in range(2)]
        # The last one stands behind all others, and yet begins where they do.
        candidates = [[text.ids, text.ids[:2], text.ids[::-1]], [text.ids[1:]]]
        # Autocast, where it is on, would round more than is allowed here.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = self._losses_in_trees(rows, candidates)
            expected = super().output_token_losses(rows, candidates)
        return equal_but_for_rounding(found, expected, self.embedding.dtype)

    def _losses_in_trees(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[tuple[int, ...]]]
    ) -> Tensor:
        embeddings, mask = self._lay_out(rows)
        # A network that is given the mask itself looks at it, and so waits for the GPU.
        hidden = None if len({len(row) for row in rows}) == 1 else self._hidden(mask)
        states = self._encoded(rows, embeddings, hidden)
        if any(row.prefix is not None for row in rows):
            hidden = self._hidden(self._without_prefixes(mask, rows))
        shape = sum(map(len, candidates)), max(len(ids) for row in candidates for ids in row)
        places, found = [], []
        for batch in tree_batches(candidates, self._start_id, *self._most_outputs):
            logits = self._read_trees(states, hidden, batch)
            each = -logits.float().log_softmax(-1).flatten()
            of_targets = batch.nodes * logits.shape[1] + batch.targets
            found.append(each.index_select(0, sent(of_targets, self.device)))
            places.append(batch.places)
        losses = states.new_zeros(shape, dtype=torch.float32).flatten()
        of_outputs = sent(torch.cat(places), self.device)
        return losses.scatter(0, of_outputs, torch.cat(found)).view(shape)

    def _hidden(self, mask: Tensor) -> Tensor:
        """What attention adds for `mask` `[B, S]`: `[B, 1, 1, S]`."""
        return _added(mask, self.embedding.dtype)[:, None, None]

    def _read_trees(self, states: Tensor, hidden: Tensor | None, batch: TreeBatch) -> Tensor:
        """Logits `[n, V]` after each of the real nodes."""
        device = self.device
        if list(batch.rows) != list(range(len(states))):
            chosen_rows = self._numbers(batch.rows)
            states = states.index_select(0, chosen_rows)
            hidden = None if hidden is None else hidden.index_select(0, chosen_rows)
        seen = sent(_added(batch.ancestors, self.embedding.dtype)[:, None], device)
        real = sent(batch.real, device)
        with (
            at_positions(self._position_embedding, batch.depths),
            logits_only_at(self.network, real),
        ):
            logits = self.network(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=hidden,
                decoder_input_ids=sent(batch.ids, device),
                decoder_attention_mask=seen,
                use_cache=False,
            ).logits
        return chosen(logits, real, batch.ids.shape)

    def _advance(self, started: Started, ids: Tensor) -> Started:
        written = started.decoder_mask
        written = torch.cat([written, written.new_ones(ids.shape)], dim=1)
        with at_positions(self._position_embedding, written.sum(1, keepdim=True) - 1):
            out = self.network(
                encoder_outputs=BaseModelOutput(last_hidden_state=started.encoded),
                attention_mask=started.mask,
                decoder_input_ids=ids,
                decoder_attention_mask=written,
                past_key_values=started.cache,
                use_cache=True,
            )
        return Started(out.logits[:, -1], started.cache, started.mask, started.encoded, written)

    @property
    def _position_embedding(self) -> nn.Module | None:
        """What adds absolute positions to the decoder's tokens, if anything does."""
        found = getattr(self.network.get_decoder(), "embed_positions", None)
        return found if isinstance(found, nn.Module) else None

    def text_states(self, texts: Sequence[str]) -> Tensor | None:
        tokens = self.tokenize_inputs(texts, [0] * len(texts), [1] * len(texts))
        means = torch.zeros(len(texts), self.hidden_size, device=self.device)
        for batch in batches([len(text.ids) for text in tokens], _MAX_STATES_POSITIONS):
            with torch.no_grad():
                states, mask = self._encode([Row(None, tokens[i].ids) for i in batch])
            weights = mask[:, :, None]
            means[batch] = (states.float() * weights).sum(1) / weights.sum(1)
        return means

    def negative_log_likelihood(
        self, rows: Sequence[Row], outputs: Sequence[Sequence[int]]
    ) -> Tensor:
        states, mask = self._encode(rows)
        targets = padded(outputs, IGNORED, self.device)
        fed = targets.roll(1, dims=1).clamp(min=0)
        fed[:, 0] = self._start_id
        logits = self.network(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=fed,
            use_cache=False,
        ).logits
        return token_losses(logits, targets).sum(1)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` allows, and next to minus infinity elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask == 0, torch.finfo(dtype).min)


def split_special_tokens(model: TorchLanguageModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe = "a"
    plain = list(model.tokenizer(probe, add_special_tokens=False)["input_ids"])
    full = list(model.tokenizer(probe)["input_ids"])
    for begin in range(len(full) - len(plain) + 1):
        if full[begin : begin + len(plain)] == plain:
            return tuple(full[:begin]), tuple(full[begin + len(plain) :])
    return (), ()
