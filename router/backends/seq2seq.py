"""Encoder-decoder base models: BART, T5 and every other `AutoModelForSeq2SeqLM`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from router.backends.chosen_logits import chosen, logits_only_at
from router.backends.decoder_positions import at_positions
from router.backends.encoder_prefixes import (
    Projections,
    captured,
    key_value_projections,
    prefixes_in,
)
from router.backends.prompted_network import PrefixShape
from router.backends.rows import IGNORED, Row, batches, padded, token_losses
from router.backends.started import Started
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError

_MAX_STATES_POSITIONS = 8192


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
        prefixed = any(row.prefix is not None for row in rows)
        with prefixes_in(self._projections if prefixed else (), rows):
            states: Tensor = self.network.get_encoder()(
                inputs_embeds=embeddings, attention_mask=mask
            ).last_hidden_state
        if prefixed:
            lengths = [0 if row.prefix is None else len(row.prefix) for row in rows]
            columns = torch.arange(mask.shape[1], device=mask.device)
            mask = mask * (columns >= torch.tensor(lengths, device=mask.device)[:, None])
        return states, mask

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

    def _advance(self, started: Started, ids: Tensor) -> Started:
        written = started.decoder_mask
        written = torch.cat([written, written.new_ones(ids.shape)], dim=1)
        with at_positions(self._position_embedding, written.sum(1) - 1):
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


def split_special_tokens(model: TorchLanguageModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe = "a"
    plain = list(model.tokenizer(probe, add_special_tokens=False)["input_ids"])
    full = list(model.tokenizer(probe)["input_ids"])
    for begin in range(len(full) - len(plain) + 1):
        if full[begin : begin + len(plain)] == plain:
            return tuple(full[:begin]), tuple(full[begin + len(plain) :])
    return (), ()
