"""What this process does with memory that it needs no more."""

from __future__ import annotations

import ctypes

# Of `mallopt`, as in malloc.h of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8


def keep_freed_memory() -> None:
    """From now on, keep the memory of large arrays that are gone for those that come.

    glibc gives it back to the system at once, which clears every page of the next array: a
    twentieth of the time of a process that does little but publish. The process stays as large as
    it ever was. To be called before there are other threads; nothing happens without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)  # the memory of other threads' own arenas comes in small parts
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_TOP_PAD, 64 << 20)
