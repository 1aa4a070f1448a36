"""Writes compiled heads, of a large one only what the heads before it do not have.

A row of nearest means is a matter of its own task, so that one more task leaves the others' rows as
they are. They are stored in blocks of some hundred tasks that follow one another in canonical
order. Where a block begins is told by digests of the tasks' keys: the same tasks make the same
blocks in any order of arrival, and one more task changes one of them, or cuts it in two.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from router.head import ROWS_TENSOR, Head, row_blocks
from router.head_files import HeadReader
from router.interfaces import FloatArray
from router.sampling import key_digest
from router.tasks import TaskKey
from router.tensor_file import tensor_file
from trainer.artifact_writer import ArtifactWriter

LEAST_TASKS = 1024
"""Heads of fewer are one file."""
_SIZE_BYTES = 8
_DIGEST = re.compile("[0-9a-f]{64}")
# On average: a task whose digest is a multiple of it begins a block.
_TASKS_PER_BLOCK = 256


class HeadWriter(HeadReader):
    """A `HeadReader` that can also add heads, and remove them. Not thread-safe.

    It remembers which blocks the head has that it wrote or read last.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._files: ArtifactWriter = ArtifactWriter(folder)
        # By the task that begins it, a block's rows and its digest.
        self._known: dict[TaskKey, tuple[FloatArray, str]] = {}
        self._blocks_of: dict[str, frozenset[str]] = {}

    def read(self, sha256: str) -> Head:
        content = self._files.read(sha256)
        head = Head.from_bytes(content, self._block)
        self._know(head, _block_starts(head), row_blocks(content))
        return head

    def write(self, head: Head) -> tuple[str, int]:
        """Store `head`; returns its digest, and how many bytes its files have.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        starts = _block_starts(head)
        blocks = [
            self._write_block(head.tasks[begin], head.rows[begin:end])
            for begin, end in itertools.pairwise([*starts, len(head.rows)])
        ]
        if blocks:
            self._know(head, starts, blocks)
        file = head.to_file(blocks)
        sha256 = self._files.write(*file)
        self._blocks_of[sha256] = frozenset(blocks)
        return sha256, sum(part.nbytes for part in file) + (head.rows.nbytes if blocks else 0)

    def remove(self, old: Collection[str], kept: Iterable[str]) -> None:
        """Remove the `old` heads, and blocks of theirs that none of those that are `kept` has.

        What cannot be removed stays.
        """
        going = set().union(*(self._blocks(sha256) for sha256 in old))
        if going:
            going -= set().union(*(self._blocks(sha256) for sha256 in kept))
        for sha256 in (*old, *going):
            self._blocks_of.pop(sha256, None)
            with contextlib.suppress(OSError):
                self._files.path(sha256).unlink()

    def _write_block(self, first: TaskKey, rows: FloatArray) -> str:
        known = self._known.get(first)
        if known is not None and _same_bits(known[0], rows) and self._files.path(known[1]).exists():
            return known[1]
        return self._files.write(*tensor_file({ROWS_TENSOR: rows}, {}))

    def _know(self, head: Head, starts: Sequence[int], blocks: Sequence[str]) -> None:
        if len(blocks) == len(starts):  # else it was one file
            pieces = itertools.pairwise([*starts, len(head.rows)])
            self._known = {
                head.tasks[begin]: (head.rows[begin:end], block)
                for (begin, end), block in zip(pieces, blocks, strict=True)
            }

    def _blocks(self, sha256: str) -> frozenset[str]:
        """The digests of a head's blocks, from the header of its file; none where that is damaged.

        Rows, which are most of other heads, are not read.
        """
        if sha256 not in self._blocks_of:
            found: list[str] = []
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                path = self._files.path(sha256)
                most = path.stat().st_size
                with path.open("rb") as file:
                    size = file.read(_SIZE_BYTES)
                    header = file.read(min(int.from_bytes(size, "little"), most))
                found = row_blocks(size + header)
                # Whatever stands there becomes the name of a file that may go.
                found = [block for block in found if _DIGEST.fullmatch(block)]
            self._blocks_of[sha256] = frozenset(found)
        return self._blocks_of[sha256]


def block_starts(tasks: Sequence[TaskKey]) -> list[int]:
    """The places of those of `tasks`, in canonical order, that begin a block; the first does."""
    digests = np.array([*map(key_digest, tasks)], np.uint64)
    return sorted({0, *np.flatnonzero(digests % _TASKS_PER_BLOCK == 0).tolist()})


def _block_starts(head: Head) -> list[int]:
    """The rows of a head that begin a block; none where it is one file."""
    if head.kind != "nearest-mean" or len(head.tasks) < LEAST_TASKS:
        return []
    return block_starts(head.tasks)


def _same_bits(some: FloatArray, others: FloatArray) -> bool:
    return some.shape == others.shape and bool(
        np.array_equal(some.view(np.int32), others.view(np.int32))
    )
