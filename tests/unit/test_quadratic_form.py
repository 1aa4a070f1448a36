"""The quadratic form: against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from router.quadratic_form import QuadraticForm


@pytest.mark.parametrize("dimension", [1, 2, 5, 6, 7, 64, 101])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_form_is_the_double_sum_over_its_matrix(dimension: int, symmetric: bool) -> None:
    rng = np.random.default_rng(dimension)
    matrix = rng.normal(size=(dimension, dimension)).astype(np.float32)
    if symmetric:
        matrix += matrix.T
    vectors = rng.normal(size=(3, dimension)).astype(np.float32)
    expected = [row @ matrix.astype(np.float64) @ row for row in vectors.astype(np.float64)]
    found = QuadraticForm(matrix).of(vectors)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_a_form_does_not_follow_its_matrix() -> None:
    matrix = np.eye(8, dtype=np.float32)
    form = QuadraticForm(matrix)
    matrix[:] = 0
    assert form.of(np.ones((1, 8), np.float32)).tolist() == [8.0]
