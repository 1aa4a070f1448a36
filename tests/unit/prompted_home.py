"""A home with tuned prompts and prefixes of a small base model, made once for several tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from router.backends.language_model import load_language_model
from router.backends.torch_model import TorchLanguageModel
from router.tasks import PromptMethod, TaskRecord
from tests.catalogs import new_workshop, texts_of, write_rows
from tests.unit.small_models import save_small_model
from trainer.commands import RegisterTask
from trainer.register import register
from trainer.tuning_settings import TuningSettings

TASKS: dict[str, PromptMethod] = {"weather": "prompt", "sport": "prompt", "story": "prefix"}
TOKENS = 5


@dataclass(frozen=True, slots=True)
class PromptedHome:
    """The folder, the base model's folder and the model, and the records by task name."""

    folder: Path
    base_folder: Path
    base: TorchLanguageModel
    records: dict[str, TaskRecord]


def make_prompted_home(folder: Path, kind: str = "bart") -> PromptedHome:
    """Register `TASKS` with two tuning steps each."""
    base_folder = save_small_model(kind, folder / kind)
    base = load_language_model(base_folder, device="cpu", precision="float32", threads=1)
    records = {}
    with new_workshop(folder / "home") as workshop:
        for name, method in TASKS.items():
            data = write_rows(folder / f"{name}.jsonl", texts_of(name, 20))
            request = RegisterTask(name, data, instruction=f"good {name}", force="a test")
            settings = replace(
                TuningSettings(), method=method, length=TOKENS, steps=4, validations=2
            )
            result = register(workshop, [request], base, settings)
            [records[name]] = result.records
    return PromptedHome(folder / "home", base_folder, base, records)
