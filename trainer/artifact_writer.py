"""Writes content-addressed files: once, whole, and on disk before anybody hears of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from router.artifacts import ArtifactReader
from router.errors import StorageError


class ArtifactWriter(ArtifactReader):
    """An `ArtifactReader` that can also add files. No file is ever overwritten."""

    def write(self, *content: bytes | memoryview) -> str:
        """Store `content`, of which there may be several parts, and return its digest.

        Temporary file in the same folder, write, fsync, rename, fsync of the folder: a crash at
        any point leaves at most an orphan. Content that is stored already is left alone.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        digest = hashlib.sha256()
        for part in content:
            digest.update(part)
        sha256 = digest.hexdigest()
        path = self.path(sha256)
        try:
            if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                sync_folder(path.parent)  # whoever wrote it may not have come that far
                return sha256
            _make_folder(path.parent)
            write_durably(path, *content)
        except OSError as error:
            raise StorageError(
                f"artifact folder {path.parent}",
                error.strerror or error,
                "free disk space or fix the folder's permissions; nothing was published",
            ) from error
        return sha256

    def write_tensors(self, tensors: Mapping[str, NDArray[np.generic]]) -> str:
        """Store `tensors` as one safetensors file and return its digest."""
        return self.write(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))


def write_durably(path: Path, *content: bytes | memoryview) -> None:
    """Write the parts of `content` to `path`: a reader sees all or nothing, also after a crash."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        # A catalog may be served by another user than the one who registers.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
