"""What a response of a server may say, by the catalog."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from router.catalog import CatalogReader
from router.v1 import decision_pb2


class CatalogModel:
    """What was live at each revision, read from the catalog once a revision. Thread-safe."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._live: dict[int, frozenset[str]] = {}
        self._lock = threading.Lock()

    def problem(self, revision: int, tasks: str) -> str:
        """Why a response cannot be of this revision; empty where it can.

        `tasks` are those that it names, as `tasks_of` writes them.
        """
        with self._lock:
            if revision not in self._live:
                with CatalogReader(self._home) as catalog:
                    if not 1 <= revision <= catalog.newest_revision():
                        return f"revision {revision} is not in the catalog"
                    live = catalog.live(revision)
                self._live[revision] = frozenset(f"{k.name}@{k.revision}" for k in live)
            wrong = set(tasks.split()) - self._live[revision]
        return f"{', '.join(sorted(wrong))} not live at revision {revision}" if wrong else ""


def tasks_of(decisions: Sequence[decision_pb2.Decision]) -> str:
    """The tasks that were found or are used, each as NAME@REVISION, with spaces between."""
    keys = {(decision.task, decision.task_revision) for decision in decisions}
    keys |= {(decision.used_task, decision.used_task_revision) for decision in decisions}
    return " ".join(f"{name}@{revision}" for name, revision in sorted(keys) if name)
