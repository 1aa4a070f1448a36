"""Content-addressed files: a file's name is the SHA-256 of its bytes. Reading only."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from router.errors import CorruptArtifactError

MAX_ARTIFACT_BYTES = 1 << 30


class ArtifactReader:
    """Reads the files under `folder`, and checks every byte against the digest asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, sha256: str) -> Path:
        """Where the file of that digest is (or would be)."""
        return self._folder / sha256[:2] / sha256

    def read(self, sha256: str) -> bytes:
        """The bytes whose digest is `sha256`.

        Raises:
            CorruptArtifactError: the file is missing, unreadable, too large or altered.
        """
        path = self.path(sha256)
        remedy = "restore the file from a backup, or register the task again with --revise"
        try:
            if path.stat().st_size > MAX_ARTIFACT_BYTES:
                raise CorruptArtifactError(str(path), "larger than 1 GiB", remedy)
            content = path.read_bytes()
        except OSError as error:
            raise CorruptArtifactError(
                f"artifact {sha256[:12]}", error.strerror or error, remedy
            ) from error
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise CorruptArtifactError(
                f"artifact {sha256[:12]}", f"has digest {found[:12]}", remedy
            )
        return content

    def read_tensor(
        self, sha256: str, name: str, dtype: type[np.generic], width: int | None = None
    ) -> NDArray[np.generic]:
        """The two-dimensional tensor `name` of the safetensors file `sha256`.

        Raises:
            CorruptArtifactError: not such a file, or another name, type, shape, or not finite.
        """
        remedy = "register the task again with --revise"
        try:
            tensors = load(self.read(sha256))
        except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type NumPy lacks
            raise CorruptArtifactError(
                f"artifact {sha256[:12]}", "not a safetensors file", remedy
            ) from error
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim != 2 or tensor.dtype != dtype:
            raise CorruptArtifactError(f"artifact {sha256[:12]}", f"no matrix {name!r}", remedy)
        if width is not None and tensor.shape[1] != width:
            raise CorruptArtifactError(
                f"artifact {sha256[:12]}", f"{tensor.shape[1]} columns, not {width}", remedy
            )
        if np.issubdtype(dtype, np.floating) and not np.isfinite(tensor).all():
            raise CorruptArtifactError(f"artifact {sha256[:12]}", "values not finite", remedy)
        return tensor
