"""Heads as files: content-addressed, and checked byte by byte. Reading only.

The rows of a large head of nearest means are in files of their own, blocks, which it shares with
the heads before and after it (`trainer.head_writer`); all other heads are one file.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np

from router.artifacts import ArtifactReader
from router.head import ROWS_TENSOR, Head
from router.interfaces import FloatArray


class HeadReader:
    """Reads the heads under `folder`."""

    def __init__(self, folder: Path) -> None:
        self._files = ArtifactReader(folder)

    def read(self, sha256: str) -> Head:
        """The head whose file has the digest `sha256`.

        Raises:
            CorruptArtifactError: a file of it is missing or altered, or it is of another format.
        """
        return Head.from_bytes(self._files.read(sha256), self._block)

    def _block(self, sha256: str) -> FloatArray:
        return cast("FloatArray", self._files.read_tensor(sha256, ROWS_TENSOR, np.float32))
