"""How the linear algebra of this process uses the machine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]


class _Here(threading.local):
    """Whether `one_blas_thread` is open in this thread."""

    one = False


_here = _Here()


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """One thread for each matrix product, in all the process, while this is open.

    The threads of BLAS wait for each other spinning: beside other work on the machine, products
    that take a millisecond alone take many. What is large enough to share out is shared out by
    rows or folds instead. It also makes the bits of a product independent of the number of cores.

    Where it is open already in this thread, it costs nothing: to find the libraries takes some
    milliseconds.
    """
    if _here.one:
        yield
        return
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        _here.one = True
        try:
            yield
        finally:
            _here.one = False
