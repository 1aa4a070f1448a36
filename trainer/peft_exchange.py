"""Folders of PEFT: prompt tuning and prefix tuning, written and read. Nothing is unpickled.

A folder holds `adapter_config.json` and `adapter_model.safetensors` with one matrix,
`prompt_embeddings`. Ours also hold `promptyard.json`, which names the base model by its
fingerprint; PEFT leaves it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from router.artifacts import MAX_ARTIFACT_BYTES
from router.backends.torch_model import TorchLanguageModel
from router.errors import IncompatibleModelError, InvalidInputError, StorageError
from router.interfaces import FloatArray, LanguageModel
from router.tasks import PromptMethod, TaskRecord
from trainer.artifact_writer import write_durably

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
OWN_FILE = "promptyard.json"

_TENSOR = "prompt_embeddings"
_TYPES: Mapping[PromptMethod, str] = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}
_METHODS = {name: method for method, name in _TYPES.items()}
_MAX_JSON_BYTES = 1 << 20
# Those that become float32 without loss, as NumPy knows them.
_DTYPES = ("F32", "F16")


@dataclass(frozen=True, slots=True)
class ForeignPrompt:
    """A soft prompt `[P, W]` float32 that PEFT made."""

    values: FloatArray
    method: PromptMethod


def write_peft(
    folder: Path, record: TaskRecord, values: FloatArray, model: LanguageModel, base_name: str
) -> None:
    """Write the prompt `values` `[P, W]` of `record` as a folder that PEFT loads.

    `base_name` is what the folder calls the base model.

    Raises:
        InvalidInputError: the folder exists and is not empty.
        IncompatibleModelError: `model` is not the prompt's base model, or PEFT has no such prompt.
        StorageError: the folder cannot be written.
    """
    summary = record.prompt
    if summary is None or summary.base_model != model.fingerprint:
        raise IncompatibleModelError(
            "base model",
            base_name,
            f"give {summary.base_model_name if summary else 'the one'} that the prompt belongs to"
            " with --base-model",
        )
    network = _check_method(model, summary.method)
    config = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(values),
        "peft_type": _TYPES[summary.method],
        "task_type": "CAUSAL_LM" if network.shares_window else "SEQ_2_SEQ_LM",
    }
    if summary.method == "prefix":
        shape = network.prefix_shape
        config |= {
            "encoder_hidden_size": shape.size,
            "num_attention_heads": shape.heads,
            "num_layers": shape.layers,
            "prefix_projection": False,
            "token_dim": shape.size,
        }
    else:
        # PEFT wants the two numbers and does not use them here.
        config |= {
            "num_attention_heads": 1,
            "num_layers": 1,
            "prompt_tuning_init": "RANDOM",
            "token_dim": network.hidden_size,
        }
    own = {
        "base_model": model.fingerprint,
        "method": summary.method,
        "prompt": summary.sha256,
        "task": record.name,
        "task_revision": record.revision,
    }
    _write(
        folder,
        {
            PEFT_WEIGHTS: save({_TENSOR: np.ascontiguousarray(values)}, {"format": "pt"}),
            OWN_FILE: _json(own),
            PEFT_CONFIG: _json(config),
        },
    )


def read_peft(folder: Path, model: LanguageModel) -> ForeignPrompt:
    """The prompt in a folder of PEFT, if it is one for `model`.

    Raises:
        InvalidInputError: no such folder, or files that cannot be used: of another method, with
            other tensors, not float32 or float16, not finite.
        IncompatibleModelError: made for another base model, or of a shape or method that this one
            does not take.
    """
    config = _read_json(folder / PEFT_CONFIG)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in _METHODS:
        raise InvalidInputError(
            f"{folder / PEFT_CONFIG}, peft_type", kind, f"give one of {', '.join(_METHODS)}"
        )
    method = _METHODS[kind]
    _check_base(folder, config, model)
    network = _check_method(model, method)
    values = _read_matrix(folder / PEFT_WEIGHTS)
    tokens = config.get("num_virtual_tokens")
    # PEFT doubles the prompts of encoder-decoders, and uses the first half.
    halves = 1 if network.shares_window else config.get("num_transformer_submodules") or 2
    width = network.prompt_width(method)
    if not isinstance(tokens, int) or values.shape not in (
        (tokens, width),
        (tokens * (halves if method == "prompt" else 1), width),
    ):
        raise IncompatibleModelError(
            f"{folder / PEFT_WEIGHTS}, {_TENSOR}",
            f"shape {list(values.shape)} for {tokens} virtual tokens",
            f"{model.name} takes vectors of {width} numbers for the method {method}",
        )
    return ForeignPrompt(values[:tokens].astype(np.float32), method)


def _check_method(model: LanguageModel, method: PromptMethod) -> TorchLanguageModel:
    if not isinstance(model, TorchLanguageModel):
        raise IncompatibleModelError(
            "base model", model.name, "prompts are exchanged for Hugging Face models"
        )
    if method == "prefix" and not model.shares_window:
        raise IncompatibleModelError(
            "method prefix",
            f"{model.name} is an encoder-decoder",
            "PEFT puts such a prefix into the decoder and Promptyard into the encoder: "
            "exchange prompts of the method prompt",
        )
    model.prompt_width(method)
    return model


def _check_base(folder: Path, config: Mapping[str, Any], model: LanguageModel) -> None:
    if (folder / OWN_FILE).exists():
        fingerprint = _read_json(folder / OWN_FILE).get("base_model")
        if fingerprint != model.fingerprint:
            raise IncompatibleModelError(
                f"{folder / OWN_FILE}, base_model",
                fingerprint,
                f"{model.name} has the fingerprint {model.fingerprint}; give the other one with"
                " --base-model",
            )
        return
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InvalidInputError(
            f"{folder / PEFT_CONFIG}, base_model_name_or_path",
            named,
            "name the base model that the prompt was tuned on",
        )
    # Names are all that PEFT says; folders may have moved.
    if PurePosixPath(named).name.casefold() != model.name.casefold():
        raise IncompatibleModelError(
            f"{folder / PEFT_CONFIG}, base_model_name_or_path",
            named,
            f"the base model is {model.name}; give the other one with --base-model",
        )


def _read_matrix(path: Path) -> FloatArray:
    if not path.exists():
        pickled = (path.parent / "adapter_model.bin").exists()
        raise InvalidInputError(
            f"{path}",
            "only adapter_model.bin, a pickle, which can run code" if pickled else "missing",
            "save the adapter again, as safetensors",
        )
    try:
        if path.stat().st_size > MAX_ARTIFACT_BYTES:
            raise InvalidInputError(f"{path}", "larger than 1 GiB", "give a soft prompt")
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            if names != [_TENSOR]:
                raise InvalidInputError(
                    f"{path}, tensors",
                    ", ".join(names) or "none",
                    f"give a file with {_TENSOR} and nothing else: the base model stays as it is",
                )
            dtype = file.get_slice(_TENSOR).get_dtype()
            if dtype not in _DTYPES:
                raise InvalidInputError(
                    f"{path}, {_TENSOR}", dtype, f"save it as one of {', '.join(_DTYPES)}"
                )
            values = file.get_tensor(_TENSOR)
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"{path}", error, "give a safetensors file") from error
    if not np.isfinite(values).all():
        raise InvalidInputError(f"{path}, {_TENSOR}", "not finite", "tune the prompt again")
    return cast("FloatArray", values)


def _read_json(path: Path) -> Mapping[str, Any]:
    remedy = "give a folder that PEFT or `promptyard export` wrote"
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise InvalidInputError(f"{path}", "larger than 1 MiB", remedy)
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}", error, remedy) from error
    if not isinstance(document, dict):
        raise InvalidInputError(f"{path}", "not a JSON object", remedy)
    return document


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InvalidInputError("DIR", folder, "give a new folder, or an empty one")
        for name, content in files.items():
            write_durably(folder / name, content)
    except FileExistsError as error:
        raise InvalidInputError("DIR", folder, "give a folder, not a file") from error
    except OSError as error:
        raise StorageError(
            f"folder {folder}", error.strerror or error, "free disk space or fix its permissions"
        ) from error


def _json(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
