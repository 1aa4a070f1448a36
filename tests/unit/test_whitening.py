"""Partial whitening: against the plain formula, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

from router.whitening import DIRECTIONS, whitened, whitening_of


def a_covariance(dimension: int, wide: int) -> np.ndarray:
    """With variance in `wide` directions alone."""
    rng = np.random.default_rng(0)
    directions, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
    variances = np.zeros(dimension)
    variances[:wide] = np.linspace(1, 3, wide)
    return directions * variances @ directions.T


def test_whitening_is_the_inverse_root_of_the_shrunk_covariance_up_to_a_factor() -> None:
    covariance = a_covariance(DIRECTIONS + 40, 20)
    dimension = len(covariance)
    level = np.trace(covariance) / dimension
    values, vectors = np.linalg.eigh(covariance)
    scales = np.sqrt(0.9 * level / (0.1 * values + 0.9 * level))
    scales[:-DIRECTIONS] = 1  # the narrowest are left as they are
    centered = np.random.default_rng(1).normal(size=(5, dimension)).astype(np.float32)
    expected = centered @ (vectors * scales) @ vectors.T
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = whitened(centered, whitening_of(covariance))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_whitened_vectors_are_unit_vectors_and_nothing_stays_nothing() -> None:
    whitening = whitening_of(a_covariance(10, 3))
    points = np.random.default_rng(2).normal(size=(6, 10)).astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(whitened(points, whitening), axis=1), 1, atol=1e-6)
    assert not whitened(np.zeros((1, 10), np.float32), whitening).any()


@pytest.mark.parametrize("covariance", [np.zeros((4, 4)), np.eye(4)])
def test_without_a_wide_direction_hardly_anything_changes(covariance: np.ndarray) -> None:
    points = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
    units = points / np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_allclose(whitened(points, whitening_of(covariance)), units, atol=1e-5)
