"""What a checkpoint says of itself, in whichever of its files, and what the processor can do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router.errors import IncompatibleModelError

_DEFAULT_WINDOW = 512
_NO_LIMIT = 1_000_000


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    # Older versions of torch cannot tell.
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def avoid_slow_attention(network: PreTrainedModel) -> None:
    """Let a CPU compute attention in bfloat16 by plain matrix products.

    Torch's fused kernel is slow there, above all its gradient.
    """
    if network.device.type == "cpu" and network.dtype == torch.bfloat16:
        network.set_attn_implementation("eager")


def end_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer.

    Raises:
        IncompatibleModelError: neither configuration nor tokenizer names one.
    """
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


def window(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Positions that the model can take; T5 and its kin have no limit of their own."""
    limits = [
        getattr(network.config, "max_position_embeddings", None),
        getattr(network.config, "n_positions", None),
        tokenizer.model_max_length,
    ]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _NO_LIMIT]
    return min(known, default=_DEFAULT_WINDOW)
