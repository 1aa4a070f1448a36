"""Keeps the texts of a task (`router.kept_texts`), where the user asked for that."""

from __future__ import annotations

import json
from collections.abc import Sequence

from trainer.artifact_writer import ArtifactWriter
from trainer.data import Example


def keep_texts(artifacts: ArtifactWriter, examples: Sequence[Example]) -> str:
    """Store inputs and outputs, in the order of the task's stored rows; returns their digest."""
    lines = (json.dumps([each.input, each.output], ensure_ascii=False) for each in examples)
    return artifacts.write("".join(f"{line}\n" for line in lines).encode())
