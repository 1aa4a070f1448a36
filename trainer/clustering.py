"""Finds a task's sub-centroids: k-means over its embeddings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router.interfaces import FloatArray

MAX_CLUSTERS = 8
ROWS_PER_CLUSTER = 15


def cluster(vectors: FloatArray) -> NDArray[np.int16]:
    """The cluster of each row `[n]` of `vectors` `[n, D]`: one per fifteen rows, at most eight.

    Numbered from 0 without gaps; the same for the same rows.
    """
    wanted = min(max(len(vectors) // ROWS_PER_CLUSTER, 1), MAX_CLUSTERS, len(vectors))
    if wanted == 1:
        return np.zeros(len(vectors), np.int16)
    from sklearn.cluster import KMeans  # here: it takes most of a second to load

    labels = KMeans(wanted, n_init=3, random_state=0).fit_predict(vectors)
    _, numbered = np.unique(labels, return_inverse=True)
    return numbered.astype(np.int16)
