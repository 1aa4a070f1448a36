"""What the tests of a server share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.calls import Serving


@pytest.fixture
def serving() -> Iterator[Serving]:
    with Serving() as running:
        yield running
