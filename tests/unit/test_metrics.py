"""The figures of evaluation, against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import metrics

NAN = math.nan


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_accuracy_is_the_share_of_rows_whose_task_was_found() -> None:
    assert metrics.accuracy(numbers(0, 0, 1, 2), numbers(0, 1, 1, 2)) == 0.75


def test_accuracy_of_no_rows_is_not_defined() -> None:
    assert math.isnan(metrics.accuracy(numbers(), numbers()))


def test_the_confusion_matrix_counts_truth_by_prediction() -> None:
    matrix = metrics.confusion(numbers(0, 0, 0, 1), numbers(0, 2, 2, 1), 3)
    assert matrix.tolist() == [[1, 0, 2], [0, 1, 0], [0, 0, 0]]


def test_per_task_figures_are_recall_precision_and_volume() -> None:
    matrix = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
    first, second, third = metrics.per_task(matrix)
    assert first == metrics.TaskFigures(rows=4, routed=3, right=3, accuracy=0.75, precision=1.0)
    assert second == metrics.TaskFigures(2, 3, 2, 1.0, 2 / 3)
    assert (third.rows, third.routed) == (0, 0)
    assert math.isnan(third.accuracy)
    assert math.isnan(third.precision)


def test_macro_accuracy_counts_every_task_with_rows_the_same() -> None:
    matrix = np.array([[90, 10, 0], [5, 5, 0], [0, 0, 0]])
    assert metrics.macro_accuracy(metrics.per_task(matrix)) == pytest.approx((0.9 + 0.5) / 2)


def test_confused_pairs_come_with_most_rows_first_and_without_the_diagonal() -> None:
    matrix = np.array([[9, 1, 2], [2, 9, 0], [0, 0, 9]])
    assert metrics.confused_pairs(matrix, 2) == [(0, 2, 2), (1, 0, 2)]


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_wilson_interval_is_the_published_one(
    right: int, rows: int, low: float, high: float
) -> None:
    interval = metrics.wilson_interval(right, rows)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_holds_the_share_and_stays_within_0_and_1(
    case: tuple[int, int],
) -> None:
    right, rows = case
    interval = metrics.wilson_interval(right, rows)
    assert 0 <= interval.low <= right / rows + 1e-12
    assert right / rows - 1e-12 <= interval.high <= 1


def test_the_interval_of_no_rows_is_not_defined() -> None:
    assert math.isnan(metrics.wilson_interval(0, 0).low)


def test_auroc_counts_pairs_and_ties_half() -> None:
    # Pairs: 3 beats 1 and 2; 2 beats 1 and ties with 2.
    assert metrics.separation([3, 2], [1, 2]).auroc == (1 + 1 + 1 + 0.5) / 4


def test_scores_that_separate_perfectly_let_nothing_through() -> None:
    assert metrics.separation([2, 3, 4], [0, 1]) == metrics.Separation(1.0, 0.0)


def test_fpr_at_95_tpr_is_of_the_threshold_that_keeps_19_of_20() -> None:
    in_scope = [*range(1, 21)]  # keeping 95 % lets everything from 2 on through
    assert metrics.separation(in_scope, [0, 1, 1.5, 2, 30]).fpr_at_95_tpr == 2 / 5


def test_rows_of_one_score_cannot_be_told_apart() -> None:
    assert metrics.separation([1, 1], [1, 1, 1]) == metrics.Separation(0.5, 1.0)


def test_without_rows_on_either_side_nothing_is_separated() -> None:
    assert math.isnan(metrics.separation([1.0], []).auroc)
    assert math.isnan(metrics.separation([], [1.0]).fpr_at_95_tpr)


def test_coverage_and_risk_add_rows_from_the_best_score_on() -> None:
    coverage, risk = metrics.coverage_and_risk([1, 3, 2, 0], np.array([False, True, True, False]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == [0, 0, 1 / 3, 0.5]


def test_stream_figures_follow_their_formulas() -> None:
    matrix = np.array([[0.9, NAN, NAN], [1.0, 0.8, NAN], [0.7, 0.85, 0.6]])
    figures = metrics.stream_figures(matrix)
    assert figures.accuracy == pytest.approx((0.7 + 0.85 + 0.6) / 3)
    # Since arrival: 0.7 - 0.9 and 0.85 - 0.8.
    assert figures.backward_transfer == pytest.approx((-0.2 + 0.05) / 2)
    # From the best before the end: 1.0 - 0.7 and 0.8 - 0.85.
    assert figures.forgetting == pytest.approx((0.3 - 0.05) / 2)


def test_one_task_has_nothing_to_forget() -> None:
    assert metrics.stream_figures(np.array([[0.5]])) == metrics.StreamFigures(0.5, 0.0, 0.0, 0.0)


def test_a_task_without_test_rows_counts_nowhere() -> None:
    matrix = np.array([[0.9, NAN, NAN], [0.9, NAN, NAN], [0.8, NAN, 1.0]])
    figures = metrics.stream_figures(matrix)
    assert figures.accuracy == pytest.approx(0.9)
    assert figures.backward_transfer == pytest.approx(-0.1)
    assert figures.forgetting == pytest.approx(0.1)


def test_percentiles_are_in_milliseconds() -> None:
    found = metrics.percentiles([k / 1000 for k in range(101)])
    assert found.p50 == pytest.approx(50)
    assert found.p90 == pytest.approx(90)
    assert found.p99 == pytest.approx(99)
    assert found.highest == pytest.approx(100)


def test_percentiles_of_nothing_are_not_defined() -> None:
    assert math.isnan(metrics.percentiles([]).p50)


def test_reliability_compares_probabilities_with_what_was_right() -> None:
    # Bins of a fifteenth: [0.8, 0.867) has two rows of which one is right, the last bin three.
    probabilities = [0.81, 0.83, 0.95, 0.99, 1.0]
    found = metrics.reliability(probabilities, np.array([True, False, True, True, True]))
    first, last = found.bins
    assert (first.rows, first.right, last.rows, last.right) == (2, 0.5, 3, 1.0)
    assert first.mean_probability == pytest.approx(0.82)
    assert (first.low, last.high) == (pytest.approx(0.8), 1.0)
    gaps = 2 * 0.32 + 3 * (1 - 0.98)
    assert found.expected_calibration_error == pytest.approx(gaps / 5)
    errors = [0.19, 0.83, 0.05, 0.01, 0.0]
    assert found.brier_score == pytest.approx(np.mean(np.square(errors)))


def test_probabilities_that_keep_their_word_have_no_calibration_error() -> None:
    right = np.tile([True, True, True, False], 50)
    assert metrics.reliability([0.75] * 200, right).expected_calibration_error == 0
    assert metrics.reliability([0.25] * 200, right).expected_calibration_error == pytest.approx(0.5)
    nothing = metrics.reliability([], np.zeros(0, np.bool_))
    assert (nothing.rows, nothing.bins) == (0, ())
    assert math.isnan(nothing.expected_calibration_error)


@given(*[st.integers(0, 60)] * 4)
def test_the_interval_of_a_difference_holds_it_and_turns_with_the_sides(
    both: int, only_a: int, only_b: int, neither: int
) -> None:
    rows = both + only_a + only_b + neither
    found = metrics.paired_difference_interval(both, only_a, only_b, neither)
    if not rows:
        assert math.isnan(found.low)
        return
    assert -1 - 1e-9 <= found.low <= (only_b - only_a) / rows <= found.high <= 1 + 1e-9
    turned = metrics.paired_difference_interval(both, only_b, only_a, neither)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_the_interval_of_a_difference_holds_the_true_one_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    shares = np.array([0.85, 0.03, 0.06, 0.06])  # the true difference is 3 points
    held = 0
    for counts in rng.multinomial(400, shares, size=2000).tolist():
        found = metrics.paired_difference_interval(*counts)
        held += found.low <= 0.03 <= found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_pairs_make_the_interval_of_a_difference_narrow() -> None:
    # 900 rows right at both say nothing of the difference, and leave little room for one.
    paired = metrics.paired_difference_interval(900, 4, 16, 80)
    apart = metrics.paired_difference_interval(900 - 80, 84, 96, 0)
    assert paired.low > 0 > apart.low


def test_the_macro_interval_of_tasks_alike_is_that_of_all_rows() -> None:
    alike = metrics.per_task(np.array([[90, 10], [10, 90]], np.int64))
    expected = metrics.wilson_interval(180, 200)
    found = metrics.macro_interval(alike)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=2e-3)


def test_the_macro_interval_is_as_wide_as_its_smallest_task_makes_it() -> None:
    # Half of the mean rests on ten rows.
    uneven = metrics.per_task(np.array([[990, 10], [2, 8]], np.int64))
    found = metrics.macro_interval(uneven)
    assert found.low < 0.99 / 2 + 0.8 / 2 < found.high
    assert found.high - found.low > 0.1
    perfect = metrics.per_task(np.array([[5, 0], [0, 5]], np.int64))
    assert metrics.macro_interval(perfect) == metrics.wilson_interval(10, 10)
    empty = metrics.per_task(np.zeros((2, 2), np.int64))
    assert math.isnan(metrics.macro_interval(empty).low)


def test_the_macro_interval_holds_the_true_one_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    shares, sizes = np.array([0.95, 0.8, 0.9, 0.6, 0.99]), np.array([200, 30, 60, 40, 25])
    held = 0
    for _ in range(1000):
        right = rng.binomial(sizes, shares)
        tasks = [
            metrics.TaskFigures(n, n, hit, hit / n, 1.0)
            for n, hit in zip(sizes.tolist(), right.tolist(), strict=True)
        ]
        found = metrics.macro_interval(tasks)
        held += found.low <= shares.mean() <= found.high
    assert held / 1000 == pytest.approx(0.95, abs=0.025)


def test_forward_transfer_is_what_is_right_before_a_task_arrives() -> None:
    matrix = np.array([[1.0, 0.2, NAN], [0.9, 1.0, 0.4], [0.8, 0.9, 1.0]])
    assert metrics.stream_figures(matrix).forward_transfer == pytest.approx((0.2 + 0.4) / 2)
    # Nothing is routed to a task that is not there.
    nothing = np.where(np.triu(np.ones((3, 3)), 1) == 1, NAN, matrix)
    assert metrics.stream_figures(nothing).forward_transfer == 0


def test_the_spread_of_values_is_their_mean_and_deviation() -> None:
    found = metrics.spread([1.0, 3.0, 2.0])
    assert found == metrics.Spread(2.0, 1.0, 1.0, 3.0)
    assert metrics.spread([0.5]) == metrics.Spread(0.5, 0.0, 0.5, 0.5)
    assert math.isnan(metrics.spread([]).mean)
