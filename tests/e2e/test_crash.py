"""kill -9 of a registering process, at every step and at random moments: nothing is lost.

`make chaos` kills many more; PROMPTYARD_KILLS sets how many random moments there are here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.catalogs import new_workshop, publish, texts_of
from tests.crashes import POINTS, History, kill_at_point, kill_at_random
from tests.forks import ForkServer

RANDOM_KILLS = int(os.environ.get("PROMPTYARD_KILLS", "16"))


@pytest.mark.parametrize(("point", "passage"), POINTS)
def test_a_registration_that_is_killed_at_this_point_is_there_or_not_but_never_half(
    tmp_path: Path, forks: ForkServer, point: str, passage: int
) -> None:
    kill_at_point(tmp_path, forks, point, passage)


def test_registrations_that_are_killed_at_random_moments_lose_nothing(
    tmp_path: Path, forks: ForkServer
) -> None:
    kill_at_random(tmp_path / "home", forks, RANDOM_KILLS, RANDOM_KILLS)


def test_the_check_finds_what_is_lost_and_what_nobody_registered(tmp_path: Path) -> None:
    with new_workshop(tmp_path) as workshop:
        published = publish(workshop, "there", texts=texts_of("there", 8))
        sha256 = workshop.catalog.record(published.head.tasks[0]).sha256
    there = ("there", sha256, 1)
    assert History([there]).check(tmp_path) == 1
    with pytest.raises(AssertionError, match="lost was acknowledged and is lost"):
        History([there, ("lost", sha256, 2)]).check(tmp_path)
    with pytest.raises(AssertionError, match="there is at another revision"):
        History([("there", sha256, 2)]).check(tmp_path)
    with pytest.raises(AssertionError, match="1 were published that nobody waited for"):
        History().check(tmp_path)
