"""Fits the label classifier of a task: see `router.label_classifier`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from router.interfaces import FloatArray
from router.weighing import weigh

# Prompts that are tuned on few rows are overconfident: their log-probabilities count for less than
# those of the classifier. From rows held out of the training files of the example tasks, where 0.2
# to 0.4 made no difference.
PROMPT_WEIGHT = 0.3

# More rows than that are not fitted: time grows with them, and accuracy hardly.
MAX_ROWS = 4096
_FOLDS = 5
# Unit vectors differ by little in each of their dimensions; an L2 penalty wants larger numbers.
_SCALE = 8.0
_MAX_ITERATIONS = 300


@dataclass(frozen=True, slots=True, eq=False)
class FittedClassifier:
    """Rows `[C, D + 1]` float32, and the share of rows that are right when they are held out."""

    rows: FloatArray
    accuracy: float


def fit_classifier(
    vectors: FloatArray, outputs: Sequence[str], labels: Sequence[str]
) -> FittedClassifier | None:
    """A classifier of embeddings `[N, D]` whose outputs are among the `labels`.

    Multinomial logistic regression, scaled so that its probabilities are right on held-out rows
    (five folds). None where a label has too few rows to be held out, or where the embeddings say
    nothing of the labels.
    """
    number = {label: n for n, label in enumerate(labels)}
    step = -(-len(vectors) // MAX_ROWS)
    vectors = vectors[::step]
    truth = np.array([number[output] for output in outputs[::step]])
    if np.bincount(truth, minlength=len(labels)).min() < 2:
        return None
    held_out = _held_out_scores(vectors, truth, len(labels))
    [scale] = weigh(held_out[None], truth, (1.0,))
    if scale <= 0:
        return None
    rows = np.float32(scale) * _fit(vectors, truth)
    return FittedClassifier(rows, float((held_out.argmax(1) == truth).mean()))


def _held_out_scores(vectors: FloatArray, truth: NDArray[np.int64], labels: int) -> FloatArray:
    """Scores `[N, C]` of each row by a classifier of the other folds.

    The rows of a label are dealt out to the folds in turn, so that none lacks it.
    """
    place = np.empty(len(truth), np.int64)
    order = np.argsort(truth, kind="stable")
    place[order] = np.arange(len(truth))
    fold = place % _FOLDS
    scores = np.empty((len(truth), labels), np.float32)
    for number in range(min(_FOLDS, len(truth))):
        out = fold == number
        rows = _fit(vectors[~out], truth[~out])
        scores[out] = vectors[out] @ rows[:, :-1].T + rows[:, -1]
    return scores


def _fit(vectors: FloatArray, truth: NDArray[np.int64]) -> FloatArray:
    """Rows `[C, D + 1]` of a classifier of rows among which every label is."""
    center = vectors.mean(0)
    regression = LogisticRegression(max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        # Not quite converged is as good here: the scale is measured afterwards.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit((vectors - center) * _SCALE, truth)
    weights, biases = regression.coef_ * _SCALE, regression.intercept_
    if len(weights) == 1:  # two labels have one row between them
        weights, biases = np.stack([-weights[0], weights[0]]) / 2, np.array([-1, 1]) * biases / 2
    rows = np.concatenate([weights, (biases - weights @ center)[:, None]], axis=1)
    return np.asarray(rows, np.float32)
