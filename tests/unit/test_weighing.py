"""Weights of terms: what tells the tasks apart counts, and few rows change little."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from router.weighing import weigh

PRIOR = (2.0, 1.0)


def contest(
    rng: np.random.Generator, rows: int, strengths: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Terms `[J, rows, 5]`; the right task's term j is `strengths[j]` higher on average."""
    own = rng.integers(0, 5, rows)
    terms = rng.normal(size=(len(strengths), rows, 5))
    terms[:, np.arange(rows), own] += np.array(strengths)[:, None]
    return terms.astype(np.float32), own


def test_weights_maximise_the_penalised_likelihood() -> None:
    terms, own = contest(np.random.default_rng(0), 300, (1.5, 0.5))

    def loss(weights: np.ndarray) -> float:
        scores = np.tensordot(weights, terms.astype(np.float64), 1)
        likely = scores[np.arange(300), own] - np.log(np.exp(scores).sum(1))
        return float(-likely.sum() + 0.05 * ((weights - PRIOR) ** 2).sum())

    expected = minimize(loss, np.array(PRIOR)).x
    np.testing.assert_allclose(weigh(terms, own, PRIOR), expected, atol=1e-4)


def test_a_term_that_is_sure_of_what_is_wrong_is_shrunk_as_far_as_the_likelihood_asks() -> None:
    terms, own = contest(np.random.default_rng(4), 60, (0.3,))
    terms *= 8

    def loss(weight: np.ndarray) -> float:
        scores = weight * terms[0].astype(np.float64)
        likely = scores[np.arange(60), own] - np.log(np.exp(scores).sum(1))
        return float(-likely.sum() + 0.05 * ((weight - 1) ** 2).sum())

    [weight] = weigh(terms, own, (1.0,))
    assert weight < 0.2
    assert weight == pytest.approx(minimize(loss, np.array([0.1])).x[0], abs=1e-4)


def test_a_term_of_a_larger_penalty_takes_more_rows_to_count() -> None:
    strengths, shares = (1.5, 0.5), []
    for rows in (20, 3000):
        terms, own = contest(np.random.default_rng(3), rows, strengths)
        free, held = (weigh(terms, own, (2.0, 0.0), penalties) for penalties in (None, (0.1, 30.0)))
        shares.append(held[1] / free[1])
    assert shares[0] < 0.3
    assert shares[1] > 0.9


def test_a_term_that_tells_nothing_or_misleads_gets_no_weight() -> None:
    terms, own = contest(np.random.default_rng(1), 3000, (1.5, -0.5))
    weights = weigh(terms, own, PRIOR)
    assert weights[0] > 1
    assert weights[1] == 0.0
    alone = weigh(terms[:1], own, PRIOR[:1])
    assert weights[0] == pytest.approx(alone[0])


def test_without_rows_the_weights_are_the_prior_and_with_few_they_stay_moderate() -> None:
    terms, own = contest(np.random.default_rng(2), 5, (5.0, 5.0))
    assert weigh(terms[:, :0], own[:0], PRIOR) == PRIOR
    np.testing.assert_allclose(weigh(terms, own, PRIOR), PRIOR, atol=1.0)


def test_one_task_alone_teaches_nothing() -> None:
    terms = np.random.default_rng(3).normal(size=(2, 50, 1)).astype(np.float32)
    assert weigh(terms, np.zeros(50, np.int64), PRIOR) == pytest.approx(PRIOR)


def test_rows_that_are_told_apart_without_error_give_finite_weights() -> None:
    terms, own = contest(np.random.default_rng(4), 4000, (50.0, 50.0))
    assert all(0 <= weight < 100 for weight in weigh(terms, own, PRIOR))
