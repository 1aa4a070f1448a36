"""Trains the embedded base model and writes it as a standard Hugging Face folder.

    python -m trainer.base_model.train PREPARED_DIR OUT_DIR --minutes 5

What makes the model steerable is that the prompt slot is trained as one: in most rows it holds
vectors that belong to the row's training task and are learned with the weights, in the others the
task's instruction as text, or nothing. The vectors are thrown away afterwards. Other steps are
spent on episodes, in which the slot is made from examples, as the prompt of a new task begins.

In episodes, texts without a prompt should be read as MiniLM reads them: tasks of few rows live on
what it knows, and training on other tasks wears it away.

At the end, a share of MiniLM's weights is mixed back into the encoder: it then keeps more of what
MiniLM knows, which tasks of few rows live on.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import BartForConditionalGeneration
from transformers.models.bart.modeling_bart import BartEncoder

from trainer.base_model.batches import LONGEST_PROMPT, Batch, SlotShares, TrainingRows
from trainer.base_model.episodes import EpisodeBatch, Episodes, example_means
from trainer.base_model.start import (
    PAD,
    base_from_minilm,
    largest_difference_to_minilm,
    mix_minilm_in,
    save_base,
)
from trainer.example_prompt import MARKER, example_vectors, mean_states

FAMILY_SHARES = {
    "written": 0.18,
    "verification": 0.14,
    "choice": 0.10,
    "entailment": 0.17,
    "intents": 0.08,
    "pairs": 0.10,
    "semantics": 0.07,
    "opinions": 0.08,
    "copying": 0.05,
    "rewriting": 0.03,
}
"""A family's share of the training rows outside of episodes."""

_LEARNING_RATES = {"encoder": 2e-4, "decoder": 8e-4, "prompts": 5e-3}
_WARM_UP_STEPS = 300
_UNTIMED_STEPS = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What a training run can be told."""

    minutes: float
    learning_rate: float = 1.0
    """A factor on all learning rates."""
    compiled: bool = False
    most_steps: int | None = None
    episode_share: float = 0.45
    """Which share of the steps is spent on episodes."""
    encoder_rate: float = 1.0
    """A factor on the encoder's learning rate."""


class PromptedModel(nn.Module):
    """The base model together with the training tasks' prompt vectors.

    Args:
        model: The base model.
        instructions: A task's instruction as token ids; its vectors begin as these embeddings.
        teacher: MiniLM's encoder, which texts without a prompt should be read like, or None.
    """

    def __init__(
        self,
        model: BartForConditionalGeneration,
        instructions: list[list[int]],
        teacher: BartEncoder | None = None,
    ) -> None:
        super().__init__()
        self.base = model
        # Not a submodule: it is neither trained nor saved.
        self._teacher = [teacher] if teacher is not None else []
        first = [((ids or [PAD]) * LONGEST_PROMPT)[:LONGEST_PROMPT] for ids in instructions]
        embedded = model.model.shared.weight.detach()[torch.tensor(first).flatten()]
        self.prompts = nn.Embedding(len(embedded), embedded.shape[1], _weight=embedded.clone())

    def forward(self, batch: Batch | EpisodeBatch) -> Tensor:
        """The mean loss of the batch's output tokens; in episodes, also that of what was kept."""
        if isinstance(batch, EpisodeBatch):
            embedded, texts = self._embed_episodes(batch)
            return self._loss(embedded, batch) + self._distance_to_teacher(texts, batch)
        vectors = self.prompts(batch.vectors.clamp(min=0))
        is_vector = (batch.vectors >= 0)[:, :, None]
        embedded = torch.where(is_vector, vectors, self.base.model.shared(batch.tokens))
        return self._loss(embedded, batch)

    def _embed_episodes(self, batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """Read the texts without a prompt, and put the labels' mean states into the prompts.

        Returns the embedded rows, and the mean states of their texts.
        """
        shared = self.base.model.shared
        states = self.base.model.encoder(
            inputs_embeds=shared(batch.text), attention_mask=batch.text_mask
        ).last_hidden_state
        with torch.autocast(states.device.type, enabled=False):
            texts = mean_states(states.float(), batch.text_mask)
            means, known = example_means(texts, batch)
            vectors = example_vectors(means, known, shared.weight) + shared.weight[MARKER]
        slot = batch.slot_label
        places = slot.clamp(min=0)[:, :, None].expand(-1, -1, vectors.shape[-1])
        embedded = torch.where(
            (slot >= 0)[:, :, None], vectors.gather(1, places), shared(batch.tokens)
        )
        return embedded, texts

    def _distance_to_teacher(self, texts: Tensor, batch: EpisodeBatch) -> Tensor:
        """One minus the cosine of the texts' mean states `[B, H]` to MiniLM's, averaged."""
        distance = texts.new_zeros(())
        for teacher in self._teacher:
            with torch.no_grad():
                states = teacher(
                    input_ids=batch.text, attention_mask=batch.text_mask
                ).last_hidden_state
                wanted = mean_states(states.float(), batch.text_mask)
            distance = 1 - (texts * wanted).sum(1).mean()
        return distance

    def _loss(self, embedded: Tensor, batch: Batch | EpisodeBatch) -> Tensor:
        states = self.base.model(
            inputs_embeds=embedded,
            attention_mask=batch.mask,
            decoder_input_ids=batch.decoder,
            use_cache=False,
        ).last_hidden_state
        # most output positions are padding: the vocabulary is only scored where a token is wanted
        wanted = batch.labels >= 0
        logits = functional.linear(states[wanted], self.base.model.shared.weight)
        return functional.cross_entropy(logits.float(), batch.labels[wanted])


def train(
    model: BartForConditionalGeneration,
    rows: TrainingRows,
    episodes: Episodes,
    settings: Settings,
    device: torch.device,
    teacher: BartEncoder | None = None,
) -> None:
    """Train all weights for the given time; the learning rate falls to 0 as the time runs out."""
    prompted = PromptedModel(model, rows.instructions, teacher).to(device).train()
    if settings.compiled:
        torch._dynamo.config.recompile_limit = 32
        for layer in [*model.model.encoder.layers, *model.model.decoder.layers]:
            layer.compile()
    optimizer = _optimizer(prompted, device, settings.encoder_rate)
    rates = [group["lr"] * settings.learning_rate for group in optimizer.param_groups]
    losses: dict[str, list[Tensor]] = {"rows": [], "episodes": []}
    draw = random.Random(0)
    step, tokens, started = 0, 0, time.monotonic()
    while True:
        if step == _UNTIMED_STEPS:  # until here, kernels are compiled
            _wait_for(device)
            started = time.monotonic()
        seconds = time.monotonic() - started if step >= _UNTIMED_STEPS else 0.0
        done = seconds / (60 * settings.minutes)
        if settings.most_steps:
            done = max(done, step / settings.most_steps)
        if done >= 1:
            break
        scale = min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - done)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        kind = "episodes" if draw.random() < settings.episode_share else "rows"
        batch = episodes.draw() if kind == "episodes" else rows.draw()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = prompted(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(prompted.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses[kind].append(loss.detach())
        step, tokens = step + 1, tokens + batch.tokens.numel()
        if step % 250 == 0:
            recent = {kind: _recent_mean(values) for kind, values in losses.items()}
            print(f"step {step} {seconds:.0f} s loss {recent} {tokens / 1e6:.0f} M", flush=True)
    print(f"trained {step} steps, {tokens / 1e6:.0f} M positions, padding included", flush=True)
    model.train(False)


def _recent_mean(losses: list[Tensor]) -> float:
    return round(float(torch.stack(losses[-100:]).mean()), 3) if losses else 0.0


def _optimizer(
    prompted: PromptedModel, device: torch.device, encoder_rate: float
) -> torch.optim.AdamW:
    """MiniLM's weights move slowly, the decoder faster, the prompt vectors fastest."""
    rates = _LEARNING_RATES | {"encoder": _LEARNING_RATES["encoder"] * encoder_rate}
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in _LEARNING_RATES}
    for name, parameter in prompted.named_parameters():
        part = "decoder" if ".decoder." in name else "encoder"
        groups["prompts" if name.startswith("prompts.") else part].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[name], "lr": rate, "weight_decay": 0.0 if name == "prompts" else 0.02}
            for name, rate in rates.items()
        ],
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prepared", type=Path, help="folder that `prepare` wrote")
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=5.0, help="training time (default 5)")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--learning-rate", type=float, default=1.0, help="factor on all rates")
    parser.add_argument("--encoder-rate", type=float, default=1.0, help="factor on the encoder's")
    parser.add_argument("--start", type=Path, help="go on from this folder instead of MiniLM")
    parser.add_argument("--batch-tokens", type=int, default=49152)
    parser.add_argument("--learned-share", type=float, default=SlotShares().learned)
    parser.add_argument("--episode-share", type=float, default=Settings(0).episode_share)
    parser.add_argument(
        "--kept", type=float, default=0.25, help="share of MiniLM's weights that is mixed back in"
    )
    parser.add_argument("--shares", type=json.loads, default={}, help="JSON, over FAMILY_SHARES")
    parser.add_argument("--compile", action="store_true", help="compile the layers (GPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="a few steps, to try the script out")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    minilm = options.prepared / "minilm"
    model = base_from_minilm(minilm, options.dropout)
    difference = largest_difference_to_minilm(model, minilm)
    print(f"parameters {model.num_parameters()}, encoder differs from MiniLM by {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("the encoder does not start as MiniLM")
    teacher = copy.deepcopy(model.get_encoder()).to(device).train(False).requires_grad_(False)
    if options.start:
        model = BartForConditionalGeneration.from_pretrained(
            options.start,
            dtype=torch.float32,
            dropout=options.dropout,
            attention_dropout=options.dropout,
        )
    torch.nn.Module.to(model, device)
    shares = {name: share for name, share in (FAMILY_SHARES | options.shares).items() if share}
    slots = SlotShares(options.learned_share, 0.95 - options.learned_share)
    batch_tokens = 512 if options.toy else options.batch_tokens
    rows = TrainingRows(options.prepared, shares, batch_tokens, device, slots, options.seed)
    settings = Settings(
        minutes=options.minutes,
        learning_rate=options.learning_rate,
        compiled=options.compile,
        most_steps=30 if options.toy else None,
        episode_share=options.episode_share,
        encoder_rate=options.encoder_rate,
    )
    episodes = Episodes(rows, options.prepared, batch_tokens, options.seed)
    train(model, rows, episodes, settings, device, teacher)
    torch.nn.Module.to(model, "cpu")
    mix_minilm_in(model, minilm, options.kept)
    save_base(model, minilm, options.out)


if __name__ == "__main__":
    main()
