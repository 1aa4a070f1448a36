"""How many threads matrix products take."""

import numpy  # noqa: F401 - whose BLAS is looked at
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from router.threads import one_blas_thread


def _threads() -> set[int]:
    return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}


def test_products_take_one_thread_while_any_is_open_and_as_many_as_before_afterwards() -> None:
    with threadpool_limits(3, user_api="blas"):
        with one_blas_thread():
            assert _threads() == {1}
            with one_blas_thread():
                assert _threads() == {1}
            assert _threads() == {1}
        assert _threads() == {3}


def test_an_error_inside_gives_the_threads_back() -> None:
    with threadpool_limits(2, user_api="blas"):
        with pytest.raises(RuntimeError), one_blas_thread():
            raise RuntimeError
        assert _threads() == {2}
