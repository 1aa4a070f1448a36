"""Inverts positive definite matrices, in several threads at once.

SciPy's wrappers of LAPACK keep the interpreter's lock, so that of the threads that fit the folds of
a head one would invert at a time, and the others wait. The same routines, as SciPy offers them to
compiled code, are called with the lock given back.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import LowLevelCallable
from scipy.linalg import cython_lapack

RealArray = NDArray[np.floating[Any]]

# What of a matrix is mirrored at a time, so that it stays in the processor's cache.
_MIRRORED_ROWS = 128
# LAPACK's letters for the numbers of a matrix.
_LETTER = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}
# uplo, n, a, lda, info
_OF_TRIANGLE = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.POINTER(ctypes.c_int),
)


def inverse(matrix: RealArray) -> RealArray:
    """The inverse of a positive definite matrix, by Cholesky, in the matrix's place and precision.

    `matrix` is of float32 or float64, in the order of C.

    Raises:
        numpy.linalg.LinAlgError: it is not positive definite.
    """
    if not (matrix.flags.c_contiguous and matrix.flags.writeable):
        raise ValueError("a matrix that is inverted in its place is contiguous and can be written")
    size = ctypes.byref(ctypes.c_int(len(matrix)))
    failed = ctypes.c_int(0)
    # A symmetric matrix is its own transpose, and LAPACK counts rows and columns the other way.
    for routine in ("potrf", "potri"):
        call = _routine(_LETTER[matrix.dtype] + routine)
        call(b"L", size, matrix.ctypes.data, size, ctypes.byref(failed))
        if failed.value:
            raise np.linalg.LinAlgError("matrix is not positive definite")
    return _mirrored(matrix)


@functools.cache
def _routine(name: str) -> Callable[..., None]:
    """A routine of LAPACK that works on one triangle of a matrix."""
    capsule = LowLevelCallable.from_cython(cython_lapack, name).function
    signature = ctypes.pythonapi.PyCapsule_GetName
    signature.restype, signature.argtypes = ctypes.c_char_p, (ctypes.py_object,)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return _OF_TRIANGLE(pointer(capsule, signature(capsule)))


def _mirrored(upper: RealArray) -> RealArray:
    """A symmetric matrix, in place, of which what is above the diagonal is there."""
    for start in range(0, len(upper), _MIRRORED_ROWS):
        end = start + _MIRRORED_ROWS
        block = upper[start:end, start:end]
        block[:] = np.triu(block) + np.triu(block, 1).T
        upper[end:, start:end] = upper[start:end, end:].T
    return upper
