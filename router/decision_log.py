"""A bounded file of sampled decisions, for `promptyard drift`. It holds no text."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import random
import secrets
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import structlog

from router.decision import Decision
from router.errors import InvalidInputError

_log = structlog.get_logger(__name__)


class DecisionLog:
    """JSON lines, one a decision; the file and an older one beside it stay under a bound.

    A text is noted as a digest with a salt that no file holds: equal ones can be told while one
    server runs, and nobody can look a text up. Thread-safe, and several processes may write to one
    file; a full disk costs lines and no call.
    """

    def __init__(
        self,
        path: Path,
        share: float = 1.0,
        max_bytes: int = 64 << 20,
        salt: bytes | None = None,
    ) -> None:
        """Note each decision with the probability `share`.

        Processes that write to one file are given the same `salt`; it is drawn where none is.

        Raises:
            InvalidInputError: the file cannot be written.
        """
        self._path = path
        self._share = share
        self._file_bytes = max(max_bytes // 2, 1)
        self._salt = salt or new_salt()
        self._lock = threading.Lock()
        self._problem = ""
        try:
            path.open("ab").close()
        except OSError as error:
            raise InvalidInputError(
                "decision-log", f"{path} ({error.strerror})", "name a file that can be written"
            ) from error

    def note(self, decided: Iterable[tuple[str, Decision]], tenant: str = "") -> None:
        """Note decisions on texts, those that are sampled; each lists its best candidate."""
        lines = [
            self._line(text, decision, tenant)
            for text, decision in decided
            if random.random() < self._share
        ]
        if lines:
            self._write(b"".join(lines))

    def _line(self, text: str, decision: Decision, tenant: str) -> bytes:
        salted = f"{tenant}\0{text}".encode(errors="surrogatepass")
        best = decision.candidates[0].task if decision.candidates else decision.task
        line = {
            "time": round(time.time(), 3),
            "tenant": tenant,
            "revision": decision.revision,
            "text": hashlib.blake2b(salted, digest_size=8, key=self._salt).hexdigest(),
            "outcome": decision.outcome.value,
            "task": None if decision.task is None else decision.task.name,
            "best": None if best is None else str(best),
            "score": decision.score if math.isfinite(decision.score) else None,
            "probability": decision.probability,
        }
        return json.dumps(line).encode() + b"\n"

    def _write(self, lines: bytes) -> None:
        with self._lock:
            try:
                while not self._append(lines):
                    pass
                self._problem = ""
            except OSError as error:
                if str(error) != self._problem:
                    _log.error("decisions are not noted", problem=str(error))
                self._problem = str(error)

    def _append(self, lines: bytes) -> bool:
        """Append to the file; False where it had to make room or did so for another process."""
        with self._path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            found = os.fstat(file.fileno())
            if not (self._path.exists() and os.path.samestat(found, self._path.stat())):
                return False
            if found.st_size and found.st_size + len(lines) > self._file_bytes:
                self._path.replace(older(self._path))
                return False
            file.write(lines)
            return True


def new_salt() -> bytes:
    """A salt for the digests of texts."""
    return secrets.token_bytes(32)


def older(path: Path) -> Path:
    """The file that a decision log was moved to when it was full."""
    return path.with_name(f"{path.name}.1")
