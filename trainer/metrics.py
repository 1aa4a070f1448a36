"""What evaluation measures: pure functions, each with its formula's source.

Tasks are numbers. A truth of `OUT_OF_SCOPE` is a row that belongs to no task. Shares are fractions.
A figure that is not defined (the recall of a task without rows) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from router.statistics import ExactArray

OUT_OF_SCOPE = -1

Numbers = NDArray[np.int64]

# Two-sided 95 % of the standard normal distribution.
_Z_95 = 1.959963984540054
_TRUE_POSITIVE_RATE = 0.95
_RELIABILITY_BINS = 15


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of a share."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """One task: its own rows, the rows sent to it, and what they have in common.

    `accuracy` is the share of its rows that were sent to it (its recall), `precision` the share of
    the rows sent to it that are its own.
    """

    rows: int
    routed: int
    right: int
    accuracy: float
    precision: float


@dataclass(frozen=True, slots=True)
class Separation:
    """How well a score separates in-scope rows (which should have the higher ones) from others."""

    auroc: float
    fpr_at_95_tpr: float


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Rows whose probability is in [low, high): the mean of it, and the share that is right.

    `interval` is the 95 % Wilson interval of that share.
    """

    low: float
    high: float
    rows: int
    mean_probability: float
    right: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Reliability:
    """How far probabilities are from the shares of right rows; see `reliability`."""

    rows: int
    expected_calibration_error: float
    brier_score: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True, slots=True)
class CoverageRisk:
    """What answering only the best-scored rows costs.

    `risk[k]` is the share of wrong ones among the share `coverage[k]` of rows that score best;
    `area` is the mean risk over all coverages (AURC, Geifman and El-Yaniv 2019, arXiv:1805.08206).
    """

    area: float
    coverage: tuple[float, ...]
    risk: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StreamFigures:
    """What a stream of T tasks comes to; see `stream_figures`."""

    accuracy: float
    backward_transfer: float
    forward_transfer: float
    forgetting: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, standard deviation (of a sample; 0 for one value), least and greatest of values."""

    mean: float
    deviation: float
    least: float
    greatest: float


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of durations, in milliseconds."""

    p50: float
    p90: float
    p99: float
    highest: float


def share(part: int, whole: int) -> float:
    """`part / whole`, NaN where `whole` is 0."""
    return part / whole if whole else math.nan


def wilson_interval(right: float, rows: float, z: float = _Z_95) -> Interval:
    """The score interval of a share (Wilson 1927, JASA 22, 209-212). NaN without rows.

    Unlike the normal approximation it stays within [0, 1] and is sound for few rows and for shares
    near 0 and 1.
    """
    if not rows:
        return Interval(math.nan, math.nan)
    p = right / rows
    center = p + z * z / (2 * rows)
    half = z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return Interval(max((center - half) / scale, 0.0), min((center + half) / scale, 1.0))


def paired_difference_interval(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """The 95 % interval of the share right at B less that at A, of the same rows. NaN without rows.

    Newcombe 1998 (Statistics in Medicine 17, 2635-2650), method 10: from the Wilson intervals of
    the two shares and the correlation of the pairs, with a correction for continuity.
    """
    rows = both + only_a + only_b + neither
    if not rows:
        return Interval(math.nan, math.nan)
    right_a, right_b = both + only_a, both + only_b
    a, b = wilson_interval(right_a, rows), wilson_interval(right_b, rows)
    below_a, above_a = right_a / rows - a.low, a.high - right_a / rows
    below_b, above_b = right_b / rows - b.low, b.high - right_b / rows
    margins = right_a * (rows - right_a) * right_b * (rows - right_b)
    together = float(both * neither - only_a * only_b)
    if together > 0:
        together = max(together - rows / 2, 0)
    correlation = together / math.sqrt(margins) if margins else 0.0
    difference = (right_b - right_a) / rows

    def width(first: float, second: float) -> float:
        return math.sqrt(max(first**2 - 2 * correlation * first * second + second**2, 0.0))

    return Interval(difference - width(below_b, above_a), difference + width(above_b, below_a))


def accuracy(truth: Numbers, predicted: Numbers) -> float:
    """The share of rows `[N]` whose task was found (micro accuracy)."""
    return share(int((truth == predicted).sum()), len(truth))


def confusion(truth: Numbers, predicted: Numbers, tasks: int) -> Numbers:
    """`[K, K]`: how many rows of task i were sent to task j. Both `[N]` hold task numbers."""
    matrix = np.zeros((tasks, tasks), np.int64)
    np.add.at(matrix, (truth, predicted), 1)
    return matrix


def per_task(matrix: Numbers) -> list[TaskFigures]:
    """The figures of each task of a confusion matrix `[K, K]`."""
    right, rows, routed = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    return [
        TaskFigures(n, sent, hit, share(hit, n), share(hit, sent))
        for n, sent, hit in zip(rows.tolist(), routed.tolist(), right.tolist(), strict=True)
    ]


def macro_accuracy(tasks: Sequence[TaskFigures]) -> float:
    """The mean accuracy of the tasks that have rows: every task counts the same."""
    return mean([task.accuracy for task in tasks])


def macro_interval(tasks: Sequence[TaskFigures]) -> Interval:
    """The 95 % interval of the macro accuracy; NaN without rows.

    Wilson's, for as many rows as would give a share the variance that the mean of the tasks has
    (stratified sampling, Cochran 1977, chapter 5), and never for more than there are.
    """
    sizes = [task.rows for task in tasks if task.rows]
    if not sizes:
        return Interval(math.nan, math.nan)
    shares = [task.accuracy for task in tasks if task.rows]
    overall = macro_accuracy(tasks)
    spread = overall * (1 - overall)
    variance = (
        sum(p * (1 - p) / (n - 1) if n > 1 else spread for p, n in zip(shares, sizes, strict=True))
        / len(sizes) ** 2
    )
    rows = min(spread / variance, sum(sizes)) if variance else float(sum(sizes))
    return wilson_interval(overall * rows, rows)


def mean(values: ArrayLike) -> float:
    """The mean of the values that are defined, NaN where there are none."""
    array = np.asarray(values, np.float64)
    known = array[~np.isnan(array)]
    return float(known.mean()) if known.size else math.nan


def spread(values: Sequence[float]) -> Spread:
    """How values lie; NaN where there are none, or one of them is."""
    array = np.asarray(values, np.float64)
    if not array.size:
        return Spread(math.nan, math.nan, math.nan, math.nan)
    deviation = float(array.std(ddof=1)) if array.size > 1 else 0.0
    return Spread(float(array.mean()), deviation, float(array.min()), float(array.max()))


def confused_pairs(matrix: Numbers, most: int) -> list[tuple[int, int, int]]:
    """The (task, taken for, rows) off the diagonal of a confusion matrix, most rows first."""
    pairs = [(int(i), int(j), int(matrix[i, j])) for i, j in np.argwhere(matrix) if i != j]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[0], pair[1]))[:most]


def separation(in_scope: ArrayLike, out_of_scope: ArrayLike) -> Separation:
    """AUROC, and FPR at 95 % TPR, of scores that should be high in scope and low out of it.

    AUROC is the probability that an in-scope row scores above an out-of-scope one, ties counting
    half. The second is the share of out-of-scope rows that are let through by the highest threshold
    that lets at least 95 % of the in-scope rows through (Hendrycks and Gimpel 2017,
    arXiv:1610.02136; Liang et al. 2018, arXiv:1706.02690). NaN where either side has no rows.
    """
    known, unknown = np.asarray(in_scope, np.float64), np.asarray(out_of_scope, np.float64)
    if not len(known) or not len(unknown):
        return Separation(math.nan, math.nan)
    labels = np.repeat([1, 0], [len(known), len(unknown)])
    scores = np.concatenate([known, unknown])
    false_rates, true_rates, _ = roc_curve(labels, scores, drop_intermediate=False)
    enough = int(np.argmax(true_rates >= _TRUE_POSITIVE_RATE))
    return Separation(float(roc_auc_score(labels, scores)), float(false_rates[enough]))


def coverage_and_risk(scores: ArrayLike, right: NDArray[np.bool_]) -> tuple[ExactArray, ExactArray]:
    """What answering only the k best-scored of N rows costs, for k = 1..N.

    Coverage is k / N, risk the share of wrong ones among those k (El-Yaniv and Wiener 2010, JMLR
    11, 1605-1641). Rows of equal score come in their own order.
    """
    best_first = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    answered = np.arange(1, len(best_first) + 1)
    return answered / max(len(best_first), 1), np.cumsum(~right[best_first]) / answered


def reliability(probabilities: ArrayLike, right: NDArray[np.bool_]) -> Reliability:
    """Compare probabilities `[N]` of being right with being `right` `[N]`.

    The expected calibration error is the mean over rows of |share right - mean probability| of the
    row's bin, of 15 bins of equal width (Naeini et al. 2015, AAAI; Guo et al. 2017,
    arXiv:1706.04599); bins without rows are left out. The Brier score is the mean squared error.
    NaN without rows.
    """
    values = np.asarray(probabilities, np.float64)
    if not len(values):
        return Reliability(0, math.nan, math.nan, ())
    number = np.minimum((values * _RELIABILITY_BINS).astype(np.int64), _RELIABILITY_BINS - 1)
    bins = [
        ReliabilityBin(
            low=each / _RELIABILITY_BINS,
            high=(each + 1) / _RELIABILITY_BINS,
            rows=int((number == each).sum()),
            mean_probability=float(values[number == each].mean()),
            right=float(right[number == each].mean()),
            interval=wilson_interval(int(right[number == each].sum()), int((number == each).sum())),
        )
        for each in np.unique(number).tolist()
    ]
    gaps = [abs(each.right - each.mean_probability) * each.rows for each in bins]
    brier = float(((values - right) ** 2).mean())
    return Reliability(len(values), sum(gaps) / len(values), brier, tuple(bins))


def coverage_risk(scores: ArrayLike, right: NDArray[np.bool_]) -> CoverageRisk:
    """The coverage-risk curve of `coverage_and_risk` at every percent, and the area under it."""
    coverage, risk = coverage_and_risk(scores, right)
    if not len(coverage):
        return CoverageRisk(math.nan, (), ())
    at = np.unique(np.maximum(np.ceil(np.arange(1, 101) / 100 * len(coverage)), 1).astype(int)) - 1
    return CoverageRisk(float(risk.mean()), tuple(coverage[at].tolist()), tuple(risk[at].tolist()))


def stream_figures(matrix: ExactArray) -> StreamFigures:
    """ACC, BWT and forgetting of R `[T, T]`: R[i, j] is the score on task j after task i arrived.

    With 1-based numbers (Lopez-Paz and Ranzato 2017, arXiv:1706.08840; Chaudhry et al. 2018,
    arXiv:1801.10112):

        ACC        = mean over j of R[T, j]
        BWT        = mean over i < T of R[T, i] - R[i, i]
        forgetting = mean over j < T of (max over j <= l < T of R[l, j]) - R[T, j]
        FWT        = mean over i > 1 of R[i - 1, i] - b_i

    Forgetting below 0 is a gain. All but ACC are 0 for one task, which has nothing to forget;
    tasks without test rows (NaN columns) count nowhere. b_i is the score on task i of a learner
    that knows no task: 0, as nothing is routed to a task that is not there. What R has above its
    diagonal counts as 0 where it is NaN, so that FWT is 0 for routing, by construction.
    """
    last, earlier = matrix[-1], range(len(matrix) - 1)
    changes = [last[i] - matrix[i, i] for i in earlier]
    losses = [matrix[j:-1, j].max() - last[j] for j in earlier]
    ahead = [matrix[i, i + 1] for i in earlier if not np.isnan(last[i + 1])]
    return StreamFigures(
        mean(last),
        mean(changes) if changes else 0.0,
        mean(np.nan_to_num(ahead)) if ahead else 0.0,
        mean(losses) if losses else 0.0,
    )


def percentiles(seconds: ArrayLike) -> Percentiles:
    """Percentiles of durations given in seconds, NaN where there are none."""
    durations = np.asarray(seconds, np.float64) * 1000
    if not durations.size:
        return Percentiles(math.nan, math.nan, math.nan, math.nan)
    p50, p90, p99, highest = np.percentile(durations, [50, 90, 99, 100]).tolist()
    return Percentiles(p50, p90, p99, highest)
