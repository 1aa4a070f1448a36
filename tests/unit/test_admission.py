"""What is refused before a model is loaded: names, files and homes that cannot be used."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from router.errors import InvalidInputError, StorageError, TaskExistsError, TaskNotFoundError
from tests.catalogs import new_workshop, publish
from tests.mounts import can_mount, make_read_only, make_writable, other_user, read_only_mount
from trainer.admission import check_writable, refused_at_once
from trainer.commands import RegisterTask


def rows(path: Path) -> Path:
    path.write_text('{"input": "a", "output": "x"}\n')
    return path


def test_what_can_be_told_at_once_is_told_of_every_request(tmp_path: Path) -> None:
    home, data = tmp_path / "home", rows(tmp_path / "rows.jsonl")
    with new_workshop(home) as workshop:
        publish(workshop, "weather")
    refused = refused_at_once(
        home,
        [
            RegisterTask("good", data),
            RegisterTask("weather", data, revise=True),
            RegisterTask("weather", data),
            RegisterTask("none", data, revise=True),
            RegisterTask("b@d", data),
            RegisterTask("missing", tmp_path / "missing.jsonl"),
        ],
    )
    assert {name: type(error) for name, error in refused.items()} == {
        "weather": TaskExistsError,
        "none": TaskNotFoundError,
        "b@d": InvalidInputError,
        "missing": InvalidInputError,
    }


def test_a_home_that_does_not_exist_yet_is_no_hindrance(tmp_path: Path) -> None:
    home = tmp_path / "not" / "yet"
    assert refused_at_once(home, [RegisterTask("new", rows(tmp_path / "rows.jsonl"))]) == {}
    check_writable(home)
    assert not home.exists()


def test_a_home_that_may_not_be_written_is_refused(public_folder: Path) -> None:
    home = public_folder / "home"
    home.mkdir()
    with contextlib.ExitStack() as closing:
        if can_mount():
            home = closing.enter_context(read_only_mount(home, public_folder / "mounted"))
        elif other_user() is None:
            make_read_only(home)
            closing.callback(make_writable, home)
        else:
            home = Path("/proc")
        for place in (home, home / "below"):
            with pytest.raises(StorageError, match=r"home .*: may not be written"):
                check_writable(place)


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path) -> None:
    check_writable(tmp_path, least_free_bytes=1)
    with pytest.raises(StorageError, match=r"home .*: \d+ bytes free; free disk space"):
        check_writable(tmp_path, least_free_bytes=1 << 60)
