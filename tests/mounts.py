"""Read-only mounts and full disks, real ones where this user may mount."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

NOBODY = 65534

_DISK_BYTES = 400 << 10


def can_mount() -> bool:
    """Whether this user may mount file systems here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError):
            return False
        _unmount(Path(folder))
        return True


@contextlib.contextmanager
def read_only_mount(folder: Path, at: Path) -> Iterator[Path]:
    """`folder` mounted read-only at `at`; it can still be written at its own place."""
    at.mkdir()
    _mount("--bind", str(folder), str(at))
    try:
        _mount("-o", "remount,bind,ro", str(at))
        yield at
    finally:
        _unmount(at)


class SmallDisk:
    """A folder with little space. `fill` takes all of it, `free` gives it back."""

    def __init__(self, folder: Path, fill: Callable[[], None], free: Callable[[], None]) -> None:
        self.folder = folder
        self.fill = fill
        self.free = free


@contextlib.contextmanager
def small_tmpfs(at: Path) -> Iterator[SmallDisk]:
    """A file system of 400 KiB."""
    at.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(at))
    filler = at / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))

    try:
        yield SmallDisk(at, fill, filler.unlink)
    finally:
        _unmount(at)


@contextlib.contextmanager
def small_files(at: Path) -> Iterator[SmallDisk]:
    """A folder in which, when it is full, no file can grow beyond a few bytes."""
    at.mkdir()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        yield SmallDisk(at, lambda: limit(16), lambda: limit(hard))
    finally:
        limit(hard)


def make_read_only(folder: Path) -> None:
    """Take the permission to write away, for users that are not root."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


def make_writable(folder: Path) -> None:
    """Give it back."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def other_user() -> int | None:
    """A user that owns nothing, where this one may become another."""
    return NOBODY if os.geteuid() == 0 else None


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def _unmount(at: Path) -> None:
    subprocess.run(["umount", "--lazy", str(at)], check=True, capture_output=True)
