"""Inverses of positive definite matrices, in place and beside other threads."""

import threading
import time

import numpy as np
import pytest

from router.inverse import inverse


def _positive_definite(size: int, number: type[np.floating]) -> np.ndarray:
    rows = np.random.default_rng(size).standard_normal((3 * size, size))
    return (rows.T @ rows / len(rows)).astype(number)


@pytest.mark.parametrize("number", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 3, 127, 128, 129, 300])
def test_the_inverse_times_the_matrix_is_the_identity(size: int, number: type[np.floating]) -> None:
    matrix = _positive_definite(size, number)

    found = inverse(matrix.copy())

    assert found.dtype == number
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found @ matrix, np.eye(size), atol=2e3 * np.finfo(number).eps)


def test_the_inverse_takes_the_place_of_the_matrix() -> None:
    matrix = _positive_definite(20, np.float64)

    assert inverse(matrix) is matrix


@pytest.mark.parametrize("matrix", [-np.eye(3), np.zeros((3, 3)), np.diag([1.0, -1.0])])
def test_a_matrix_that_is_not_positive_definite_is_refused(matrix: np.ndarray) -> None:
    with pytest.raises(np.linalg.LinAlgError, match="positive definite"):
        inverse(matrix.astype(np.float32))


def test_a_matrix_in_another_order_is_refused_and_not_inverted_beside_its_place() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        inverse(np.asfortranarray(_positive_definite(4, np.float64)))


def test_other_threads_go_on_while_a_matrix_is_inverted() -> None:
    """SciPy's wrappers would keep the interpreter's lock for all the time."""
    matrix = _positive_definite(1500, np.float64)
    inverting, ticks = threading.Event(), []

    def tick() -> None:
        inverting.wait()
        while inverting.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    clock = threading.Thread(target=tick)
    clock.start()
    inverting.set()
    began = time.perf_counter()
    inverse(matrix)
    ended = time.perf_counter()
    inverting.clear()
    clock.join()

    # More than switching in and out of the call would leave time for.
    during = [
        at for at in ticks if began + 0.2 * (ended - began) < at < ended - 0.2 * (ended - began)
    ]
    assert len(during) >= 3
