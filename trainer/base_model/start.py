"""The base model before training: BART's architecture with MiniLM's weights.

BERT's layers map one to one onto BART's encoder, so the encoder computes what MiniLM computes. The
decoder's three layers begin as copies of MiniLM's layers 0, 2 and 5; their cross-attention begins
as the same layer's self-attention. One embedding serves the encoder, the decoder and the output.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertModel,
    BertTokenizer,
    GenerationConfig,
)

PAD, START, END = 0, 101, 102
"""[PAD]; [CLS], which starts inputs and outputs; [SEP], which ends them."""

_DECODER_FROM = (0, 2, 5)
_ATTENTION = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
}
_FEED_FORWARD = {"fc1": "intermediate.dense", "fc2": "output.dense"}


def base_config(dropout: float) -> BartConfig:
    """MiniLM's shape, with a decoder of three layers."""
    return BartConfig(
        vocab_size=30522,
        d_model=384,
        encoder_layers=6,
        decoder_layers=len(_DECODER_FROM),
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        max_position_embeddings=512,
        activation_function="gelu",
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=0.0,
        scale_embedding=False,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
        forced_eos_token_id=None,
    )


def base_from_minilm(minilm: Path, dropout: float = 0.1) -> BartForConditionalGeneration:
    """Build the untrained base model from a folder with MiniLM's weights."""
    source = {name: value.float() for name, value in _weights(minilm).items()}
    model = BartForConditionalGeneration(base_config(dropout))
    target = model.state_dict()

    def copy(to: str, value: Tensor) -> None:
        if target[to].shape != value.shape:
            raise ValueError(f"{to}: {tuple(target[to].shape)} is not {tuple(value.shape)}")
        target[to].copy_(value)

    def copy_module(to: str, start: str) -> None:
        for part in ("weight", "bias"):
            copy(f"{to}.{part}", source[f"{start}.{part}"])

    copy("model.shared.weight", source["embeddings.word_embeddings.weight"])
    positions = source["embeddings.position_embeddings.weight"]
    positions = positions + source["embeddings.token_type_embeddings.weight"][0]
    for side in ("encoder", "decoder"):
        target[f"model.{side}.embed_positions.weight"][2:] = positions  # BART leaves two rows out
        copy_module(f"model.{side}.layernorm_embedding", "embeddings.LayerNorm")
    layers = [("encoder", place, place) for place in range(6)]
    layers += [("decoder", place, start) for place, start in enumerate(_DECODER_FROM)]
    for side, place, start in layers:
        to, base = f"model.{side}.layers.{place}", f"encoder.layer.{start}"
        for attention in ("self_attn", "encoder_attn")[: 1 if side == "encoder" else 2]:
            for part, name in _ATTENTION.items():
                copy_module(f"{to}.{attention}.{part}", f"{base}.{name}")
            copy_module(f"{to}.{attention}_layer_norm", f"{base}.attention.output.LayerNorm")
        for part, name in _FEED_FORWARD.items():
            copy_module(f"{to}.{part}", f"{base}.{name}")
        copy_module(f"{to}.final_layer_norm", f"{base}.output.LayerNorm")
    model.load_state_dict(target)
    model.tie_weights()
    return model


@torch.inference_mode()
def largest_difference_to_minilm(model: BartForConditionalGeneration, minilm: Path) -> float:
    """How far the untrained encoder is from MiniLM, on random tokens with padding.

    The epsilon of layer norms is left out of the comparison: 1e-5 is fixed in BART, MiniLM has
    1e-12, and training starts from there.
    """
    bert = BertModel.from_pretrained(minilm, dtype=torch.float32, layer_norm_eps=1e-5)
    bert.train(False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 30000, (4, 40), generator=generator)
    mask = (torch.arange(40) < torch.tensor([[40], [30], [20], [5]])).long()
    was_training = model.training
    model.train(False)
    mine = model.get_encoder()(input_ids=tokens, attention_mask=mask).last_hidden_state
    model.train(was_training)
    theirs = bert(input_ids=tokens, attention_mask=mask).last_hidden_state
    return float(((mine - theirs).abs() * mask[:, :, None]).max())


@torch.no_grad()
def mix_minilm_in(model: BartForConditionalGeneration, minilm: Path, share: float) -> None:
    """Make encoder and embedding the mean of what they are and of MiniLM, which counts `share`.

    Averaging with the weights that training began from keeps what they know of other inputs
    (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903).
    """
    before = base_from_minilm(minilm).state_dict()
    for name, value in model.named_parameters():  # each tied one once
        if name.startswith("model.encoder.") or name == "model.shared.weight":
            value.lerp_(before[name].to(value), share)


def save_base(model: BartForConditionalGeneration, minilm: Path, out: Path) -> None:
    """Write the standard Hugging Face folder, weights in half precision.

    The tokeniser writes `[CLS] text [SEP]`, and no token types, which BART does not know.
    """
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=PAD,
        decoder_start_token_id=START,
        max_new_tokens=40,
    )
    for module in model.modules():
        module.__dict__.pop("_compiled_call_impl", None)
    torch.nn.Module.to(model, "cpu", torch.float16)
    model.save_pretrained(out)
    tokenizer = BertTokenizer(
        tokenizer_object=Tokenizer.from_file(str(minilm / "tokenizer.json")),
        do_lower_case=True,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(out)


def _weights(minilm: Path) -> dict[str, Tensor]:
    return load_file(minilm / "model.safetensors")
