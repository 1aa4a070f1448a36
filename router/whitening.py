"""Partial whitening: what most texts differ in says little of what they have in common.

The embeddings of any texts spread widely in a few directions (length, register, a question or not)
and hardly in the others, so that a plain cosine is mostly about those few. Whitening with the
covariance of text in general evens that out. It is shrunk strongly towards a multiple of the
identity, as few texts say little of the narrow directions, and so hardly changes these: the widest
R directions are all that is kept. It depends on the encoder alone.
"""

from __future__ import annotations

import numpy as np

from router.interfaces import FloatArray
from router.statistics import ExactArray

DIRECTIONS = 64
"""R, where an embedding has as many dimensions."""

# The share of the identity. Of 0.3 to 0.95, chosen on training rows of public data sets and of the
# example tasks: where tasks are told apart, and from rows of tasks that were left out.
_SHRINKAGE = 0.9
_LEAST = 1e-9


def whitening_of(covariance: ExactArray) -> FloatArray:
    """The directions V `[D, R]` of a covariance `[D, D]`, each as long as `whitened` wants it."""
    from scipy.linalg import eigh  # here: a server need not wait for it

    dimension = len(covariance)
    level = max(float(np.trace(covariance)) / dimension, _LEAST)
    kept = min(DIRECTIONS, dimension)
    variances, directions = eigh(covariance, subset_by_index=[dimension - kept, dimension - 1])
    shrunk = (1 - _SHRINKAGE) * np.maximum(variances, 0) + _SHRINKAGE * level
    taken = 1 - np.sqrt(_SHRINKAGE * level / shrunk)
    return np.ascontiguousarray(directions * np.sqrt(taken), np.float32)


def whitened(centered: FloatArray, whitening: FloatArray) -> FloatArray:
    """Centred embeddings `[B, D]` to whitened unit vectors `[B, D]`: those of x - V V' x."""
    flat = centered - (centered @ whitening) @ whitening.T
    norms = np.sqrt(np.vecdot(flat, flat))[:, None]
    unit: FloatArray = flat / np.maximum(norms, np.float32(_LEAST))
    return unit
