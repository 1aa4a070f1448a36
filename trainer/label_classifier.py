"""Fits the label classifier of a task: see `router.label_classifier`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from router.interfaces import FloatArray, HalfArray
from router.weighing import weigh

# Prompts that are tuned on few rows are overconfident: their log-probabilities count for less than
# those of the classifier. From rows held out of the training files of the example tasks, where 0.2
# to 0.4 made no difference.
PROMPT_WEIGHT = 0.3
# Beside an encoder prompt they count for less still: of 0 to 0.5, there, on other tasks of 80 rows,
# and on 14 tasks of which six are about how two texts relate, which embeddings hardly tell.
_WEIGHT_BESIDE_ENCODER_PROMPT = 0.1

# More rows than that are not fitted: time grows with them, and accuracy hardly.
MAX_ROWS = 4096
_FOLDS = 5
# With fewer rows, those that an encoder prompt would be judged by are worth more for tuning it.
_ROWS_TO_COMPARE = 400
# Unit vectors differ by little in each of their dimensions; an L2 penalty wants larger numbers.
_SPREAD = 8.0
# How far a text goes towards the words of a label says more than any other direction does: it may
# count for more at the same penalty. On held-out rows as above, 8 to 16 were alike.
_SPREAD_TOWARDS_LABELS = 12.0
# What dimensions count under an encoder prompt that is not tuned by them: 0 to 0.5 were alike on
# held-out rows, and better than 1.
_OTHERS_COUNT = 0.5
_MAX_ITERATIONS = 300
_LEAST_NORM = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class FittedClassifier:
    """Rows `[C, D + 1]` float32, for embeddings under the `encoder_prompt` `[P, W]` or plain ones.

    `accuracy` is the share of rows that are right when they are held out; by plain embeddings,
    where rows are too few to hold some out of tuning the encoder prompt.
    """

    rows: FloatArray
    accuracy: float
    encoder_prompt: HalfArray | None = None

    @property
    def prompt_weight(self) -> float:
        """What the base model's log-probabilities count beside this."""
        return PROMPT_WEIGHT if self.encoder_prompt is None else _WEIGHT_BESIDE_ENCODER_PROMPT


class Prompting(Protocol):
    """Tunes encoder prompts for a task, and embeds the task's rows under them."""

    @property
    def tuned_dimensions(self) -> slice:
        """Those of the embeddings that hold what prompts are tuned by."""

    def tune(self, rows: NDArray[np.int64]) -> HalfArray:
        """An encoder prompt `[P, W]`, tuned on the rows of these numbers."""

    def embed(self, prompt: HalfArray, rows: NDArray[np.int64]) -> FloatArray:
        """The embeddings `[n, D]` of the rows of these numbers under a prompt."""

    def embed_labels(self, prompt: HalfArray) -> FloatArray:
        """The embeddings `[C, D]` of the labels' words under a prompt."""


def fit_classifier(
    vectors: FloatArray,
    outputs: Sequence[str],
    labels: Sequence[str],
    label_vectors: FloatArray,
    prompting: Prompting | None = None,
) -> FittedClassifier | None:
    """A classifier of embeddings `[N, D]` whose outputs are among the `labels`.

    `label_vectors` `[C, D]` are the embeddings of the labels' own words. Multinomial logistic
    regression, scaled so that its probabilities are right on held-out rows
    (five folds). None where a label has too few rows to be held out, or where the embeddings say
    nothing of the labels. With `prompting`, an encoder prompt is tuned, and the classifier is one
    of embeddings under it. Where there are rows enough to see, only if that is better.
    """
    number = {label: n for n, label in enumerate(labels)}
    chosen = np.arange(0, len(vectors), -(-len(vectors) // MAX_ROWS))
    vectors = vectors[chosen]
    truth = np.array([number[outputs[row]] for row in chosen.tolist()])
    if np.bincount(truth, minlength=len(labels)).min() < 2:
        return None
    held_out = _held_out_scores(vectors, truth, label_vectors)
    [scale] = weigh(held_out[None], truth, (1.0,))
    if scale <= 0:
        return None
    rows = np.float32(scale) * _fit(vectors, truth, label_vectors)
    fitted = FittedClassifier(rows, float((held_out.argmax(1) == truth).mean()))
    if prompting is None:
        return fitted
    if len(chosen) < _ROWS_TO_COMPARE:
        prompt = prompting.tune(chosen)
        vectors = prompting.embed(prompt, chosen)
        label_vectors = prompting.embed_labels(prompt)
        rows = _fit_under_prompt(vectors, truth, label_vectors, prompting.tuned_dimensions)
        # No row is left to scale them by: they count as plain embeddings would. Where those tell
        # little of the labels, as of how two sentences relate, the rows are learned by heart.
        return FittedClassifier(np.float32(scale) * rows, fitted.accuracy, prompt)
    return _better(fitted, scale * held_out, truth, chosen, prompting)


def _better(
    fitted: FittedClassifier,
    held_out: FloatArray,
    truth: NDArray[np.int64],
    chosen: NDArray[np.int64],
    prompting: Prompting,
) -> FittedClassifier:
    """`fitted`, or the classifier under an encoder prompt where that makes rows more likely.

    They are those of the last fold, which the prompt is not tuned on; `held_out` `[N, C]` are the
    scores of plain embeddings. Rows are the numbers `chosen` `[N]` of the task's.
    """
    out = _folds(truth, _FOLDS) == _FOLDS - 1
    prompt = prompting.tune(chosen[~out])
    vectors = prompting.embed(prompt, chosen)
    label_vectors = prompting.embed_labels(prompt)
    tuned = prompting.tuned_dimensions
    rows = _fit_under_prompt(vectors[~out], truth[~out], label_vectors, tuned)
    scores = vectors[out] @ rows[:, :-1].T + rows[:, -1]
    [scale] = weigh(scores[None], truth[out], (1.0,))
    if _loss(scale * scores, truth[out]) >= _loss(held_out[out], truth[out]):
        return fitted
    return FittedClassifier(
        np.float32(scale) * _fit_under_prompt(vectors, truth, label_vectors, tuned),
        float((scores.argmax(1) == truth[out]).mean()),
        prompt,
    )


def _loss(scores: FloatArray, truth: NDArray[np.int64]) -> float:
    """The mean cross-entropy of scores `[N, C]`."""
    return float((logsumexp(scores, axis=1) - scores[np.arange(len(truth)), truth]).mean())


def _held_out_scores(
    vectors: FloatArray, truth: NDArray[np.int64], label_vectors: FloatArray
) -> FloatArray:
    """Scores `[N, C]` of each row by a classifier of the other folds."""
    fold = _folds(truth, _FOLDS)
    scores = np.empty((len(truth), len(label_vectors)), np.float32)
    for number in range(min(_FOLDS, len(truth))):
        out = fold == number
        rows = _fit(vectors[~out], truth[~out], label_vectors)
        scores[out] = vectors[out] @ rows[:, :-1].T + rows[:, -1]
    return scores


def _folds(truth: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """The fold of each row: those of a label are dealt out in turn, so that no fold lacks it."""
    place = np.empty(len(truth), np.int64)
    order = np.argsort(truth, kind="stable")
    place[order] = np.arange(len(truth))
    return place % folds


def _fit_under_prompt(
    vectors: FloatArray, truth: NDArray[np.int64], label_vectors: FloatArray, tuned: slice
) -> FloatArray:
    """Rows as of `_fit`, which go by the `tuned` dimensions more than by the others."""
    counts = np.full(vectors.shape[1], _OTHERS_COUNT, np.float32)
    counts[tuned] = 1
    rows = _fit(vectors * counts, truth, label_vectors * counts)
    rows[:, :-1] *= counts
    return rows


def _fit(vectors: FloatArray, truth: NDArray[np.int64], label_vectors: FloatArray) -> FloatArray:
    """Rows `[C, D + 1]` of a classifier of rows among which every label is.

    Embeddings are stretched by `_SPREAD` for the penalty to be of one kind with them, and once more
    along the directions in which the labels' words differ from each other.
    """
    # Here: who registers for routing alone need not wait for them.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    center = vectors.mean(0)
    directions = label_vectors - label_vectors.mean(0)
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), _LEAST_NORM)
    directions *= _SPREAD_TOWARDS_LABELS
    centered = vectors - center
    regression = LogisticRegression(max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        # Not quite converged is as good here: the scale is measured afterwards.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(np.hstack([_SPREAD * centered, centered @ directions.T]), truth)
    plain, towards_labels = np.split(regression.coef_, [len(center)], axis=1)
    weights, biases = _SPREAD * plain + towards_labels @ directions, regression.intercept_
    if len(weights) == 1:  # two labels have one row between them
        weights, biases = np.stack([-weights[0], weights[0]]) / 2, np.array([-1, 1]) * biases / 2
    rows = np.concatenate([weights, (biases - weights @ center)[:, None]], axis=1)
    return np.asarray(rows, np.float32)
