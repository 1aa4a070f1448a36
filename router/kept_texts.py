"""The texts of a task, kept beside its embeddings where the user asked for that.

Nothing of a text is stored otherwise. Kept texts are what another encoder can embed again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from router.artifacts import ArtifactReader
from router.errors import CorruptArtifactError
from router.tasks import TaskRecord


@dataclass(frozen=True, slots=True)
class KeptText:
    """An input, and its output (empty where the task is only routed to)."""

    input: str
    output: str


def kept_texts(artifacts: ArtifactReader, record: TaskRecord) -> list[KeptText]:
    """The texts of a task that keeps them.

    Raises:
        CorruptArtifactError: missing, damaged, or not as many as the task has rows.
    """
    content = artifacts.read(record.texts_sha256)
    try:
        # A text may hold any other character at which lines could be split.
        texts = [KeptText(*json.loads(line)) for line in content.decode().split("\n")[:-1]]
    except (ValueError, TypeError) as error:
        raise CorruptArtifactError(
            f"texts of {record.key}", "not as they are kept", "register the task again"
        ) from error
    if len(texts) != record.data.rows:
        raise CorruptArtifactError(
            f"texts of {record.key}", f"{len(texts)} rows", "register the task again"
        )
    return texts
