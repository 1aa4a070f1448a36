"""Loads any Hugging Face seq2seq or causal model, by folder or hub name, as a frozen base model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.utils import logging as transformers_logging

from router.backends.causal import CausalLanguageModel
from router.backends.checkpoint import avoid_slow_attention, cpu_multiplies_bfloat16
from router.backends.seq2seq import Seq2SeqLanguageModel
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError

Precision = Literal["auto", "float32", "bfloat16"]

_WEIGHTS = "*.safetensors"
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "*.model",
)
# What saving and loading again changes in a config.json without changing the model.
_VOLATILE_CONFIG_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}
_READ_BYTES = 1 << 20


def load_language_model(
    name_or_folder: str | Path,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    threads: int | None = None,
) -> TorchLanguageModel:
    """The base model in a folder, or of that name on the Hugging Face hub (downloaded once).

    `device` is `auto` (a GPU if there is one), `cpu`, `cuda`, ...; `precision` `auto` is bfloat16
    where the processor multiplies that itself, as GPUs and some CPUs do, and float32 elsewhere,
    whatever the file holds. `threads` sets torch's threads for the whole process; None leaves them.
    On a GPU cuDNN's attention is switched off, also for the whole process. Only safetensors are
    read: other formats can run code.

    Raises:
        InvalidInputError: no such folder or hub name, or no files that can be read.
        IncompatibleModelError: not a whole seq2seq or causal language model.
    """
    if threads is not None:
        use_threads(threads)
    folder = _folder(str(name_or_folder))
    target = _device(device)
    if target.type == "cuda":
        # cuDNN's attention builds a plan for every shape of a batch that it has not met, which can
        # take up to a second (torch 2.11), and rows of any length make new shapes all the time.
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # A bar that flashes by for every load would end up in logs and between a command's lines.
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = loader.from_pretrained(
            folder,
            config=config,
            dtype=_dtype(precision, target),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise IncompatibleModelError(
            f"base model {name_or_folder}",
            error,
            "give a seq2seq or causal language model saved with save_pretrained",
        ) from error
    network, report = loaded
    if report["missing_keys"]:
        raise IncompatibleModelError(
            f"base model {name_or_folder}",
            f"lacks the weights {', '.join(sorted(report['missing_keys']))}",
            "give a model with its language-model head, saved with save_pretrained",
        )
    kind = Seq2SeqLanguageModel if config.is_encoder_decoder else CausalLanguageModel
    network = network.to(target)
    avoid_slow_attention(network)
    return kind(
        network,
        tokenizer,
        name=Path(name_or_folder).name,
        fingerprint=fingerprint(folder),
    )


def use_threads(threads: int) -> None:
    """Let torch use so many threads, in the whole process."""
    torch.set_num_threads(threads)


def fingerprint(folder: Path) -> str:
    """SHA-256 (hex) over the canonical config, every weights file and the tokenizer's files."""
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    digest.update(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
    files = {path for pattern in (_WEIGHTS, *_TOKENIZER_FILES) for path in folder.glob(pattern)}
    for path in sorted(files, key=lambda path: path.name):
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _folder(name_or_folder: str) -> Path:
    folder = Path(name_or_folder).expanduser()
    remedy = "give a folder that holds config.json and model.safetensors, or a hub name"
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not any(folder.glob(_WEIGHTS)):
            raise InvalidInputError(f"base model {name_or_folder}", "no model files", remedy)
        return folder
    patterns = ["config.json", "generation_config.json", _WEIGHTS, *_TOKENIZER_FILES]
    try:
        downloaded = Path(snapshot_download(name_or_folder, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every error of the hub client is one of the two
        raise InvalidInputError(f"base model {name_or_folder}", error, remedy) from error
    if not any(downloaded.glob(_WEIGHTS)):
        raise InvalidInputError(
            f"base model {name_or_folder}", "no safetensors", "convert it to safetensors first"
        )
    return downloaded


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError("device", device, "use cpu, cuda or auto") from error


def _dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision == "auto":
        slow = device.type == "cpu" and not cpu_multiplies_bfloat16()
        return torch.float32 if slow else torch.bfloat16
    return torch.float32 if precision == "float32" else torch.bfloat16
