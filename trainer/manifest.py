"""Reads a manifest: a YAML file that lists several tasks to register together.

tasks:
  - name: review-sentiment
    data: review-sentiment.jsonl      # relative to the manifest
    instruction: Is the review positive or negative?
    metric: macro-f1                  # optional
    template: "{context} question: {input}"   # optional
tuning:                               # optional, and the same for all: fields of TuningSettings
  length: 40
  clip_norm: 1.0
  search: {learning_rate: [0.003, 0.01, 0.03]}   # optional: see trainer.search
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from router.errors import InvalidInputError
from router.yaml_file import read_yaml
from trainer.commands import RegisterTask
from trainer.data import Fields

_MOST_MIB = 16
_TEXTS = (
    *("name", "data", "description", "instruction", "input_field", "output_field", "force"),
    *("context_field", "metric", "template"),
)
# Paths, relative to the manifest.
_FOLDERS = ("prompt_from",)
_FLAGS = (
    *("with_prompt", "with_classifier", "free_text", "drop_duplicates", "revise"),
    *("keep_text", "statistics_only", "encoder_prompt"),
)


def read_manifest(path: Path) -> list[RegisterTask]:
    """The tasks of a manifest.

    Raises:
        InvalidInputError: missing, not such a file, an entry with unknown or missing keys, or a
            name that is given twice.
    """
    document = read_yaml(path, _MOST_MIB)
    entries = document.get("tasks") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InvalidInputError(
            f"{path}", "no list 'tasks'", "list the tasks under the key 'tasks'"
        )
    requests = [_request(path, number, entry) for number, entry in enumerate(entries, start=1)]
    _check_names(path, requests)
    return requests


def read_tuning(path: Path) -> Mapping[str, object]:
    """What a manifest says of tuning, unchecked: see `trainer.tuning_options`.

    What it says of a search is under `search`: see `trainer.search`.

    Raises:
        InvalidInputError: it is no mapping.
    """
    document = read_yaml(path, _MOST_MIB)
    tuning = document.get("tuning", {}) if isinstance(document, dict) else {}
    if not isinstance(tuning, dict) or not all(isinstance(key, str) for key in tuning):
        raise InvalidInputError(f"{path}: tuning", tuning, "give a mapping of settings")
    return tuning


def _check_names(path: Path, requests: Sequence[RegisterTask]) -> None:
    numbers: dict[str, int] = {}
    for number, request in enumerate(requests, start=1):
        first = numbers.setdefault(request.name, number)
        if first != number:
            raise InvalidInputError(
                f"{path}: task {number}, name",
                f"{request.name} (as task {first})",
                "name every task once",
            )


def _request(path: Path, number: int, entry: object) -> RegisterTask:
    where = f"{path}: task {number}"
    if not isinstance(entry, dict):
        raise InvalidInputError(where, entry, "give a mapping with 'name' and 'data'")
    known = (*_TEXTS, *_FOLDERS, *_FLAGS)
    unknown = set(entry) - set(known)
    if unknown:
        raise InvalidInputError(
            where, ", ".join(map(str, unknown)), f"the keys are {', '.join(known)}"
        )
    for key in (*_TEXTS, *_FOLDERS):
        if not isinstance(entry.get(key, ""), str):
            raise InvalidInputError(f"{where}, {key}", entry[key], "give a text")
    for key in _FLAGS:
        if not isinstance(entry.get(key, False), bool):
            raise InvalidInputError(f"{where}, {key}", entry[key], "give true or false")
    if not entry.get("name") or not entry.get("data"):
        raise InvalidInputError(where, entry, "give at least 'name' and 'data'")
    flags = {key: entry[key] for key in _FLAGS if key in entry}
    return RegisterTask(
        name=entry["name"],
        data=path.parent / entry["data"],
        description=entry.get("description", ""),
        instruction=entry.get("instruction", ""),
        fields=Fields(
            entry.get("input_field", "input"),
            entry.get("output_field", "output"),
            entry.get("context_field", "context"),
        ),
        force=entry.get("force", ""),
        metric=entry.get("metric", ""),
        template=entry.get("template", ""),
        prompt_from=path.parent / entry["prompt_from"] if entry.get("prompt_from") else None,
        **flags,
    )
