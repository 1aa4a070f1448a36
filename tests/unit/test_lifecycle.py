"""Retire, restore and roll back: events in the catalog, and nothing is deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router.errors import InvalidInputError, TaskNotFoundError
from router.loading import SnapshotLoader
from router.tasks import TaskKey
from tests.catalogs import (
    PlaceEncoder,
    file_digests,
    new_workshop,
    publish,
    served_models,
    texts_of,
)
from trainer.gate import InterferenceError
from trainer.lifecycle import live_revision, restore, retire, rollback
from trainer.workshop import Workshop


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, "weather", "sport")
        yield workshop


def routed(workshop: Workshop, place: str) -> set[str]:
    """Where fresh texts near a place go now."""
    newest = workshop.catalog.newest_revision()
    snapshot = SnapshotLoader(workshop.home, served_models()).load(workshop.catalog, newest, None)
    decisions = snapshot.decide(PlaceEncoder().encode(texts_of(place, 20, start=900)))
    return {str(decision.task) for decision in decisions}


def test_a_retired_task_is_out_of_routing_and_its_record_stays(workshop: Workshop) -> None:
    before = file_digests(workshop.home / "artifacts")
    record = workshop.catalog.record(TaskKey("sport", 1))
    published = retire(workshop, "sport")
    assert published.revision == 2
    assert workshop.catalog.live(2) == [TaskKey("weather", 1)]
    assert live_revision(workshop, "sport") is None
    assert workshop.catalog.record(TaskKey("sport", 1)) == record
    assert file_digests(workshop.home / "artifacts") == before
    assert "sport@1" not in routed(workshop, "sport")
    assert workshop.catalog.revision(2).action == "retire"


def test_a_restored_task_is_what_it_was(workshop: Workshop) -> None:
    head = workshop.catalog.revision(1).head_sha256
    retire(workshop, "sport")
    published = restore(workshop, "sport")
    assert workshop.catalog.live(published.revision) == workshop.catalog.live(1)
    assert workshop.catalog.revision(published.revision).head_sha256 == head
    assert "sport@1" in routed(workshop, "sport")


def test_a_task_is_restored_at_the_revision_that_was_live_last(workshop: Workshop) -> None:
    publish(workshop, "sport", revision=2, texts=texts_of("sport", 15, start=50))
    publish(workshop, "sport", revision=3, texts=texts_of("sport", 15, start=90))
    rollback(workshop, "sport", to=2)
    retire(workshop, "sport")
    restore(workshop, "sport")
    assert live_revision(workshop, "sport") == 2


def test_a_rollback_goes_to_the_revision_that_was_live_before(workshop: Workshop) -> None:
    publish(workshop, "sport", revision=2, texts=texts_of("elsewhere", 15))
    assert routed(workshop, "elsewhere") == {"sport@2"}
    rollback(workshop, "sport")
    assert live_revision(workshop, "sport") == 1
    assert "sport@1" in routed(workshop, "sport")
    assert workshop.catalog.revision(3).head_sha256 == workshop.catalog.revision(1).head_sha256
    # Once more: the other way round.
    rollback(workshop, "sport")
    assert live_revision(workshop, "sport") == 2


def test_a_rollback_can_name_any_revision_also_a_newer_one(workshop: Workshop) -> None:
    for revision in (2, 3):
        publish(workshop, "sport", revision=revision, texts=texts_of("sport", 9, start=revision))
    for revision in (1, 3, 2):
        rollback(workshop, "sport", to=revision)
        assert live_revision(workshop, "sport") == revision
    assert workshop.catalog.history("sport") == [(1, 1), (2, 2), (3, 3), (4, 1), (5, 3), (6, 2)]


def test_a_rollback_of_a_retired_task_brings_it_back(workshop: Workshop) -> None:
    retire(workshop, "sport")
    rollback(workshop, "sport")
    assert live_revision(workshop, "sport") == 1


def test_the_next_revision_counts_on_after_a_rollback(workshop: Workshop) -> None:
    publish(workshop, "sport", revision=2)
    rollback(workshop, "sport", to=1)
    assert workshop.catalog.newest_record("sport") == 2
    publish(workshop, "sport", revision=3)
    assert live_revision(workshop, "sport") == 3


def test_a_task_that_comes_back_passes_the_gate_as_a_new_one_does(workshop: Workshop) -> None:
    retire(workshop, "sport")
    # Meanwhile another task has taken its place.
    publish(workshop, "games", texts=texts_of("sport", 20, start=500))
    with pytest.raises(InterferenceError) as refused:
        restore(workshop, "sport")
    assert refused.value.tasks == (TaskKey("sport", 1),)
    assert refused.value.report.taken[0].task == TaskKey("games", 1)
    assert live_revision(workshop, "sport") is None
    assert workshop.catalog.newest_revision() == 3
    published = restore(workshop, "sport", force="games goes next week")
    report = workshop.catalog.revision(published.revision).report
    assert report["forced"] == "games goes next week"
    assert published.gate is not None
    assert report["gate"] == published.gate.document()


def test_a_rollback_passes_the_gate_too(workshop: Workshop) -> None:
    publish(workshop, "sport", revision=2, texts=texts_of("elsewhere", 20))
    publish(workshop, "games", texts=texts_of("sport", 20, start=500))
    with pytest.raises(InterferenceError, match="sport@1 on the other tasks: takes"):
        rollback(workshop, "sport")
    assert live_revision(workshop, "sport") == 2
    published = rollback(workshop, "sport", gate_limit=1.0)
    assert live_revision(workshop, "sport") == 1
    assert "forced" not in workshop.catalog.revision(published.revision).report


def test_all_tasks_can_be_retired_and_everything_is_unknown_then(workshop: Workshop) -> None:
    retire(workshop, "sport")
    retire(workshop, "weather")
    assert routed(workshop, "sport") == {"None"}
    restore(workshop, "sport")
    assert "sport@1" in routed(workshop, "sport")


@pytest.mark.parametrize("action", [retire, restore, rollback])
def test_a_task_that_never_was_is_not_found(workshop: Workshop, action) -> None:
    with pytest.raises(TaskNotFoundError, match="task: wether"):
        action(workshop, "wether")
    assert workshop.catalog.newest_revision() == 1


def test_what_makes_no_sense_is_refused_and_changes_nothing(workshop: Workshop) -> None:
    with pytest.raises(InvalidInputError, match="task: sport; it is live already"):
        restore(workshop, "sport")
    with pytest.raises(InvalidInputError, match="no other revision to go back to"):
        rollback(workshop, "sport")
    with pytest.raises(InvalidInputError, match="--to: 1; that revision is live already"):
        rollback(workshop, "sport", to=1)
    for revision in (0, -1, 2):
        with pytest.raises(TaskNotFoundError, match=f"--to: sport@{revision}; give 1 to 1"):
            rollback(workshop, "sport", to=revision)
    assert workshop.catalog.newest_revision() == 1
    retire(workshop, "sport")
    with pytest.raises(TaskNotFoundError, match="it is not live"):
        retire(workshop, "sport")
    assert workshop.catalog.newest_revision() == 2


def test_a_task_that_never_was_has_no_live_revision(workshop: Workshop) -> None:
    assert live_revision(workshop, "wether") is None
    assert live_revision(workshop, "sport") == 1
