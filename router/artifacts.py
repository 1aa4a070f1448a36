"""Content-addressed files: a file's name is the SHA-256 of its bytes. Reading only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from router.errors import CorruptArtifactError

MAX_ARTIFACT_BYTES = 1 << 30
_REGISTER_AGAIN = "register the task again with --revise"


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

    def read_tensors(self, sha256: str) -> Tensors:
        """The tensors of the safetensors file `sha256`.

        Raises:
            CorruptArtifactError: not such a file.
        """
        try:
            return Tensors(sha256, load(self.read(sha256)))
        except (SafetensorError, ValueError, KeyError) as error:  # KeyError: a type NumPy lacks
            raise CorruptArtifactError(
                f"artifact {sha256[:12]}", "not a safetensors file", _REGISTER_AGAIN
            ) from error

    def read_tensor(
        self, sha256: str, name: str, dtype: type[np.generic], width: int | None = None
    ) -> NDArray[np.generic]:
        """The two-dimensional tensor `name` of the safetensors file `sha256`.

        Raises:
            CorruptArtifactError: not such a file, or another name, type, shape, or not finite.
        """
        return self.read_tensors(sha256).matrix(name, dtype, width)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of a file, and its digest."""

    sha256: str
    by_name: Mapping[str, NDArray[np.generic]]

    def matrix(
        self, name: str, dtype: type[np.generic], width: int | None = None
    ) -> NDArray[np.generic]:
        """The two-dimensional tensor `name`.

        Raises:
            CorruptArtifactError: another name, type, shape, or not finite.
        """
        of, tensor = f"artifact {self.sha256[:12]}", self.by_name.get(name)
        if tensor is None or tensor.ndim != 2 or tensor.dtype != dtype:
            raise CorruptArtifactError(of, f"no matrix {name!r}", _REGISTER_AGAIN)
        if width is not None and tensor.shape[1] != width:
            raise CorruptArtifactError(
                of, f"{tensor.shape[1]} columns, not {width}", _REGISTER_AGAIN
            )
        if np.issubdtype(dtype, np.floating) and not np.isfinite(tensor).all():
            raise CorruptArtifactError(of, "values not finite", _REGISTER_AGAIN)
        return tensor
