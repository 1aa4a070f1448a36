"""Keeps the sums over all rows of a large catalog, so that a new process need not read them.

Derived, and safe to lose: where anything of it is missing, damaged or not of the records, the rows
are read. Sums are those of the stored rows whose digest stands beside them. They are in blocks of
tasks that follow one another (`trainer.head_writer` cuts the rows of heads at the same places), of
which one more task changes one; only the newest are kept.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from router.artifacts import Tensors
from router.errors import PromptyardError
from router.pooled_moments import KnownSums
from router.statistics import ExactArray, TaskStatistics
from router.tasks import TaskKey
from trainer.artifact_writer import ArtifactWriter, write_durably

FOLDER = "sums"
_NEWEST = "newest"
_FORMAT = 1
_MOST_INT32 = float(1 << 31)


class KeptSums:
    """Reads and writes the sums that a home keeps. Not thread-safe; to be used by one writer."""

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER
        self._files = ArtifactWriter(self._folder)
        # By the task that begins it, the tasks of a block and its digest.
        self._known: dict[TaskKey, tuple[Sequence[TaskStatistics], str]] = {}

    def read(
        self, dimension: int, statistics: Callable[[TaskKey, str], TaskStatistics]
    ) -> KnownSums | None:
        """The sums that are kept; None where there are none that can be used.

        `statistics` gives a task by its key and the digest of its stored rows, and raises a
        `PromptyardError` where there is none of both.
        """
        try:
            newest = (self._folder / _NEWEST).read_text(encoding="ascii")
            index = json.loads(self._files.read(newest))
            if index["format"] != _FORMAT:
                return None
            tasks = [statistics(TaskKey(*key), digest) for *key, digest in index["tasks"]]
            read = [_block(self._files.read_tensors(block)) for block, _ in index["blocks"]]
            gram = self._files.read_tensor(index["gram"], "gram", np.float64, dimension)
            sizes, counts, sums = (np.concatenate(parts) for parts in zip(*read, strict=True))
            if not (
                len(sizes) == len(tasks) == sum(size for _, size in index["blocks"])
                and int(sizes.sum()) == len(counts) == len(sums)
                and sums.shape[1] == len(gram) == dimension
            ):
                return None
        except (OSError, ValueError, KeyError, TypeError, PromptyardError):
            return None
        ends = [0, *itertools.accumulate(size for _, size in index["blocks"])]
        self._know(tasks, ends, [block for block, _ in index["blocks"]])
        first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return KnownSums(tasks, first, counts, sums, gram.astype(np.float64))

    def write(
        self, sums: KnownSums, starts: Sequence[int], digest_of: Callable[[TaskKey], str]
    ) -> None:
        """Keep `sums` instead of what was kept. `starts` number the tasks that begin a block.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
            OSError: as well.
        """
        ends = [*starts, len(sums.tasks)]
        blocks = [self._write_block(sums, begin, end) for begin, end in itertools.pairwise(ends)]
        gram = self._files.write_tensors({"gram": sums.gram})
        keys = map(operator.attrgetter("key"), sums.tasks)
        index = {
            "format": _FORMAT,
            "tasks": [(*key, digest_of(key)) for key in keys],
            "blocks": list(zip(blocks, np.diff(ends).tolist(), strict=True)),
            "gram": gram,
        }
        newest = self._files.write(json.dumps(index).encode())
        write_durably(self._folder / _NEWEST, newest.encode())
        self._know(sums.tasks, ends, blocks)
        self._sweep({newest, gram, *blocks})

    def _write_block(self, sums: KnownSums, begin: int, end: int) -> str:
        tasks = sums.tasks[begin:end]
        known = self._known.get(tasks[0].key)
        if (
            known is not None
            and len(known[0]) == len(tasks)
            and all(map(operator.is_, known[0], tasks))
            and self._files.path(known[1]).exists()
        ):
            return known[1]
        mine = slice(sums.first[begin], sums.first[end])
        fits = float(np.abs(sums.sums[mine]).max(initial=0)) < _MOST_INT32
        return self._files.write_tensors(
            {
                "clusters": np.diff(sums.first[begin : end + 1])[:, None],
                "counts": sums.counts[mine, None].astype(np.int64),
                "sums": sums.sums[mine].astype(np.int32 if fits else np.int64),
            }
        )

    def _know(
        self, tasks: Sequence[TaskStatistics], ends: Sequence[int], blocks: Sequence[str]
    ) -> None:
        self._known = {
            tasks[begin].key: (tasks[begin:end], block)
            for (begin, end), block in zip(itertools.pairwise(ends), blocks, strict=True)
        }

    def _sweep(self, kept: Iterable[str]) -> None:
        """Remove what belongs to no sums any more."""
        names = {_NEWEST, *kept}
        for path in self._folder.rglob("*"):
            if path.name not in names and path.is_file():
                with contextlib.suppress(OSError):
                    path.unlink()


def _block(tensors: Tensors) -> tuple[ExactArray, ExactArray, ExactArray]:
    """How many clusters each task of a block has, and counts and sums of these."""
    kind = np.int32 if tensors.by_name["sums"].dtype == np.int32 else np.int64
    return (
        tensors.matrix("clusters", np.int64, 1)[:, 0].astype(np.float64),
        tensors.matrix("counts", np.int64, 1)[:, 0].astype(np.float64),
        tensors.matrix("sums", kind).astype(np.float64),
    )
