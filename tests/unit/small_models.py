"""Small base models with random weights and a tokenizer of their own, saved as real folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.normalizers import BertNormalizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

KINDS = ("bart", "t5", "gpt2", "llama")

_TEXTS = [
    "the quick brown fox jumps over the lazy dog and runs away from the river",
    "a good film with a bad end, a bad book with a good start, isn't it?",
    "positive negative neutral urgent routine news sport café naïve 日本語 🙂",
]
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def save_small_model(kind: str, folder: Path, *, window: int = 64) -> Path:
    """Write a model of that kind (about 50,000 random weights) and its tokenizer to `folder`."""
    torch.manual_seed(7)
    tokenizer = _word_pieces() if kind == "bart" else _byte_pairs(kind)
    _network(kind, len(tokenizer), window).save_pretrained(folder)
    tokenizer.model_max_length = window
    tokenizer.save_pretrained(folder)
    return folder


def _network(kind: str, vocabulary: int, window: int) -> PreTrainedModel:
    # Weights far from zero: the greedy answers of rows differ, and so do their scores.
    if kind == "bart":
        return BartForConditionalGeneration(
            BartConfig(
                vocab_size=vocabulary,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_position_embeddings=window,
                init_std=0.3,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                forced_eos_token_id=None,
            )
        )
    if kind == "t5":
        return T5ForConditionalGeneration(
            T5Config(  # type: ignore[call-arg]
                vocab_size=vocabulary,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                initializer_factor=3.0,
                pad_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=0,
            )
        )
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=window,
                n_embd=32,
                n_layer=2,
                n_head=4,
                initializer_range=0.3,
                bos_token_id=2,
                eos_token_id=2,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=window,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _byte_pairs(kind: str) -> PreTrainedTokenizerFast:
    # Written out, not trained: training breaks ties in another way in every process.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merges: dict[tuple[str, str], None] = {}
    for text in _TEXTS:
        for piece, _ in splitter.pre_tokenize_str(text):
            merges |= {(piece[:end], piece[end]): None for end in range(1, len(piece))}
    pieces = dict.fromkeys([*_SPECIAL, *alphabet, *("".join(pair) for pair in merges)])
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=list(merges))
    )
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    layout = {"t5": "$A </s>", "llama": "<s> $A"}.get(kind)
    if layout is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=layout, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    named = {} if kind == "gpt2" else {"pad_token": "<pad>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="</s>", **named
    )


def _word_pieces() -> PreTrainedTokenizerFast:
    normalizer, splitter = BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = [
        word
        for text in _TEXTS
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    ]
    letters = sorted({letter for word in words for letter in word})
    pieces = dict.fromkeys([*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = Tokenizer(
        models.WordPiece(vocab={piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
    )
