"""The live catalog: what is served while tasks come and go and files break."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from router.catalog import CATALOG_FILE, CatalogReader
from router.decision import Outcome
from router.errors import CatalogError, CorruptArtifactError, IncompatibleModelError
from router.live import LiveCatalog
from router.loading import ServedModels, SnapshotLoader
from router.snapshot import Snapshot
from router.tasks import TaskKey
from tests.catalogs import (
    BASE_MODEL,
    DIMENSION,
    PlaceEncoder,
    artifact_file,
    file_digests,
    flip_byte,
    head_file,
    new_workshop,
    place_background,
    prompt_values,
    publish,
    served_models,
    texts_of,
)
from trainer.lifecycle import retire, rollback
from trainer.workshop import Workshop


@pytest.fixture
def workshop(home: Path) -> Iterator[Workshop]:
    with new_workshop(home) as workshop:
        publish(workshop, "weather", "sport", with_prompt=True)
        yield workshop


@contextlib.contextmanager
def serving(
    home: Path, models: ServedModels | None = None, poll_seconds: float = 60.0
) -> Iterator[LiveCatalog]:
    """A started live catalog; it looks for news only when asked, unless `poll_seconds` is short."""
    live = LiveCatalog(home, models or served_models(), poll_seconds)
    live.start()
    try:
        yield live
    finally:
        live.close()


def routed(snapshot: Snapshot, place: str) -> set[str]:
    decisions = snapshot.decide(PlaceEncoder().encode(texts_of(place, 20)))
    return {str(decision.task) for decision in decisions if decision.outcome is Outcome.MATCHED}


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def damage_rows(workshop: Workshop, name: str, revision: int = 1) -> None:
    record = workshop.catalog.record(TaskKey(name, revision))
    flip_byte(artifact_file(workshop.home, record.embeddings_sha256))


def prompt_file(workshop: Workshop, name: str, revision: int = 1) -> Path:
    prompt = workshop.catalog.record(TaskKey(name, revision)).prompt
    assert prompt is not None
    return artifact_file(workshop.home, prompt.sha256)


def damage_head(workshop: Workshop, revision: int) -> None:
    flip_byte(head_file(workshop.home, workshop.catalog.revision(revision).head_sha256))


# News


def test_a_registration_is_served_within_two_seconds(workshop: Workshop, home: Path) -> None:
    with serving(home, poll_seconds=0.25) as live:
        assert live.snapshot.revision == 1
        publish(workshop, "money", with_prompt=True)
        assert wait_for(lambda: live.snapshot.revision == 2, 2)
        assert "money@1" in routed(live.snapshot, "money")
        assert live.snapshot.task("money").prompt is not None
        assert (live.newest_revision, live.problem) == (2, "")
        retire(workshop, "weather")
        assert wait_for(lambda: live.snapshot.revision == 3, 2)
        assert "weather" not in live.snapshot.tasks
        rollback(workshop, "weather")
        assert wait_for(lambda: live.snapshot.revision == 4, 2)
        assert "weather@1" in routed(live.snapshot, "weather")


def test_a_server_can_start_before_the_first_registration(home: Path) -> None:
    with serving(home, poll_seconds=0.05) as live:
        assert live.snapshot.revision == 0
        assert "holds no catalog; register a task first" in live.problem
        assert routed(live.snapshot, "weather") == set()
        with new_workshop(home) as workshop:
            assert wait_for(lambda: live.problem == "", 2)
            publish(workshop, "weather")
        assert wait_for(lambda: live.snapshot.revision == 1, 2)
        assert routed(live.snapshot, "weather") == {"weather@1"}
        assert live.problem == ""


def test_requests_that_took_the_old_snapshot_can_use_it_to_the_end(
    workshop: Workshop, home: Path
) -> None:
    with serving(home) as live:
        old = live.snapshot
        before = old.decide(PlaceEncoder().encode(texts_of("weather", 20)))
        workshop.publish("retire", live={"weather": None, "sport": None})
        live.refresh()
        assert live.snapshot is not old
        assert old.decide(PlaceEncoder().encode(texts_of("weather", 20))) == before
        assert old.task("weather").prompt is not None
    assert old.decide(PlaceEncoder().encode(texts_of("weather", 20))) == before


def test_without_news_the_snapshot_stays_the_same_object(workshop: Workshop, home: Path) -> None:
    with serving(home) as live:
        snapshot = live.snapshot
        live.refresh()
        assert live.snapshot is snapshot


def test_tasks_that_did_not_change_are_taken_over_and_not_read_again(
    workshop: Workshop, home: Path
) -> None:
    with serving(home) as live:
        weather = live.snapshot.task("weather")
        prompt_file(workshop, "weather").unlink()
        publish(workshop, "money")
        live.refresh()
        assert live.snapshot.revision == 2
        assert live.snapshot.task("weather") is weather


def test_several_revisions_at_once_are_one_step(workshop: Workshop, home: Path) -> None:
    with serving(home) as live:
        for name in ("a", "b", "c"):
            publish(workshop, name)
        live.refresh()
        assert live.snapshot.revision == 4


def test_a_snapshot_is_a_function_of_the_revision(workshop: Workshop, home: Path) -> None:
    with serving(home) as followed:
        publish(workshop, "money", with_prompt=True)
        publish(workshop, "sport", revision=2, with_prompt=True)
        followed.refresh()
        with serving(home) as fresh:
            first, second = followed.snapshot, fresh.snapshot
            assert first.head.to_bytes() == second.head.to_bytes()
            assert first.tasks.keys() == second.tasks.keys()
            for name in first.tasks:
                assert first.task(name).record == second.task(name).record
                assert _prompt_bytes(first, name) == _prompt_bytes(second, name)


def _prompt_bytes(snapshot: Snapshot, name: str) -> bytes:
    prompt = snapshot.task(name).prompt
    assert prompt is not None
    return prompt.values.tobytes()


# Damaged and missing files


@pytest.mark.parametrize("damage", ["flipped", "missing", "empty"])
def test_a_damaged_prompt_takes_its_own_task_out_of_service_only(
    workshop: Workshop, home: Path, damage: str
) -> None:
    path = prompt_file(workshop, "sport")
    whole = path.read_bytes()
    if damage == "flipped":
        flip_byte(path)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    with capture_logs() as logs, serving(home) as live:
        assert (live.snapshot.revision, live.problem) == (1, "")
        sport = live.snapshot.task("sport")
        assert sport.prompt is None
        assert "artifact" in sport.problem
        assert live.snapshot.task("weather").problem == ""
        assert _prompt_bytes(live.snapshot, "weather") == prompt_values("weather").tobytes()
        assert "sport@1" in routed(live.snapshot, "sport")
        assert [log["task"] for log in logs if log["event"] == "task out of service"] == ["sport@1"]
        # When the file is back, the next revision takes the task back into service.
        path.write_bytes(whole)
        publish(workshop, "money")
        live.refresh()
        assert live.snapshot.task("sport").problem == ""
        assert _prompt_bytes(live.snapshot, "sport") == prompt_values("sport").tobytes()


def test_a_prompt_for_another_base_model_takes_its_task_out_of_service(
    workshop: Workshop, home: Path
) -> None:
    publish(workshop, "money", with_prompt=True, base_model="another-base:1")
    with serving(home) as live:
        assert live.snapshot.task("weather").prompt is not None
        money = live.snapshot.task("money")
        assert money.prompt is None
        assert "base model of money@1: small-base" in money.problem
        assert "tune the task again with --revise" in money.problem
        assert live.problem == ""


def test_without_a_base_model_tasks_are_routed_to_and_have_no_prompts(
    workshop: Workshop, home: Path
) -> None:
    prompt_file(workshop, "sport").unlink()
    with serving(home, served_models(base_model=None)) as live:
        for name in ("weather", "sport"):
            assert live.snapshot.task(name).prompt is None
            assert live.snapshot.task(name).problem == ""
        assert routed(live.snapshot, "sport") == {"sport@1"}


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_head_is_compiled_again(workshop: Workshop, home: Path, damage: str) -> None:
    with serving(home) as live:
        expected = publish(workshop, "money").head.to_bytes()
        if damage == "flipped":
            damage_head(workshop, 2)
        else:
            shutil.rmtree(home / "heads")
        before = file_digests(home)
        with capture_logs() as logs:
            live.refresh()
        assert (live.snapshot.revision, live.problem) == (2, "")
        assert live.snapshot.head.to_bytes() == expected
        assert any(log["event"] == "compiling the head again" for log in logs)
        assert file_digests(home) == before


def test_a_head_of_other_tasks_is_compiled_again(workshop: Workshop, home: Path) -> None:
    """As after a catalog was restored from a backup, but its heads were not."""
    expected = publish(workshop, "money").head.to_bytes()
    first = workshop.catalog.revision(1).head_sha256
    with contextlib.closing(sqlite3.connect(home / CATALOG_FILE)) as connection:
        connection.execute("DROP TRIGGER catalog_revisions_refuses_update")
        connection.execute("UPDATE catalog_revisions SET head_sha256 = ?", (first,))
        connection.commit()
    with serving(home) as live:
        assert live.snapshot.revision == 2
        assert live.snapshot.head.to_bytes() == expected


def test_damaged_rows_beside_a_good_head_are_not_even_noticed(
    workshop: Workshop, home: Path
) -> None:
    damage_rows(workshop, "sport")
    with serving(home) as live:
        assert (live.snapshot.revision, live.problem) == (1, "")
        assert live.snapshot.task("sport").problem == ""


def test_damaged_rows_with_a_damaged_head_keep_the_last_good_revision(
    workshop: Workshop, home: Path
) -> None:
    with serving(home) as live:
        good = live.snapshot
        publish(workshop, "money")
        damage_head(workshop, 2)
        damage_rows(workshop, "money")
        with capture_logs() as logs:
            live.refresh()
            live.refresh()
        assert live.snapshot is good
        assert live.newest_revision == 2
        assert "routing rows of money@1" in live.problem
        assert [log["event"] for log in logs].count("revision not loaded") == 1
        # Whoever is told so retires the task, and all is well.
        retire(workshop, "money")
        live.refresh()
        assert (live.snapshot.revision, live.problem) == (3, "")


def test_a_server_that_starts_then_serves_the_newest_good_revision_and_says_so(
    workshop: Workshop, home: Path
) -> None:
    publish(workshop, "money")
    publish(workshop, "travel")
    damage_rows(workshop, "money")
    damage_head(workshop, 2)
    damage_head(workshop, 3)
    with capture_logs() as logs, serving(home) as live:
        assert live.snapshot.revision == 1
        assert live.newest_revision == 3
        assert "routing rows of money@1" in live.problem
        assert any(log["event"] == "serving an older revision" for log in logs)


def test_a_server_with_nothing_that_can_be_served_does_not_start(
    workshop: Workshop, home: Path
) -> None:
    damage_rows(workshop, "sport")
    damage_head(workshop, 1)
    with pytest.raises(CatalogError, match="routing rows of sport@1"):
        LiveCatalog(home, served_models()).start()


def test_a_server_for_another_encoder_does_not_start(workshop: Workshop, home: Path) -> None:
    models = ServedModels("places:2", DIMENSION, place_background, BASE_MODEL)
    with pytest.raises(CatalogError, match="this catalog was made with places:1"):
        LiveCatalog(home, models).start()


def test_a_damaged_catalog_does_not_start_as_an_empty_one(workshop: Workshop, home: Path) -> None:
    path = home / CATALOG_FILE
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))
    with pytest.raises(CatalogError, match=r"malformed|not a database"):
        LiveCatalog(home, served_models()).start()
    path.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(CatalogError, match="not a database"):
        LiveCatalog(home, served_models()).start()


def test_a_catalog_that_cannot_be_read_for_a_moment_is_no_problem_for_long(
    workshop: Workshop, home: Path
) -> None:
    with serving(home) as live:
        good = live.snapshot
        path = home / CATALOG_FILE
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.write(b"\xa5" * len(content))
        live.refresh()
        assert live.snapshot is good
        assert live.problem != ""
        with path.open("r+b") as file:
            file.write(content)
        live.refresh()
        assert (live.snapshot, live.problem) == (good, "")


def test_a_damaged_record_of_a_new_task_keeps_the_last_good_revision(
    workshop: Workshop, home: Path
) -> None:
    with serving(home) as live:
        good = live.snapshot
        publish(workshop, "money")
        with contextlib.closing(sqlite3.connect(home / CATALOG_FILE)) as connection:
            connection.execute("DROP TRIGGER task_records_refuses_update")
            connection.execute("UPDATE task_records SET record = '{' WHERE task = 'money'")
            connection.commit()
        live.refresh()
        assert live.snapshot is good
        assert "record of money@1" in live.problem


def test_the_watcher_survives_what_nobody_thought_of(
    workshop: Workshop, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(home) as live:
        good = live.snapshot
        publish(workshop, "money")

        def broken(*_: object) -> Snapshot:
            raise ZeroDivisionError("nobody thought of it")

        with monkeypatch.context() as patch, capture_logs() as logs:
            patch.setattr(SnapshotLoader, "load", broken)
            live.refresh()
        assert live.snapshot is good
        assert live.problem == "nobody thought of it"
        assert any("unexpected" in log["event"] for log in logs)
        publish(workshop, "travel")
        live.refresh()
        assert (live.snapshot.revision, live.problem) == (3, "")


def test_closing_stops_the_thread_also_when_it_never_started(home: Path) -> None:
    LiveCatalog(home, served_models()).close()
    with serving(home, poll_seconds=0.01) as live:
        pass
    assert not live._thread.is_alive()


# The loader by itself


def test_the_loader_reads_any_revision_of_the_past(workshop: Workshop, home: Path) -> None:
    publish(workshop, "sport", revision=2, with_prompt=True)
    retire(workshop, "weather")
    loader = SnapshotLoader(home, served_models())
    with CatalogReader(home) as catalog:
        seen = [
            {str(task.record.key) for task in loader.load(catalog, revision, None).tasks.values()}
            for revision in range(4)
        ]
        with pytest.raises(CatalogError, match="catalog revision: 9"):
            loader.load(catalog, 9, None)
    assert seen == [
        set(),
        {"weather@1", "sport@1"},
        {"weather@1", "sport@2"},
        {"sport@2"},
    ]


def test_the_loader_refuses_another_encoder_and_compiles_nothing(
    workshop: Workshop, home: Path
) -> None:
    models = ServedModels("places:2", DIMENSION, place_background, None)
    with CatalogReader(home) as catalog, pytest.raises(IncompatibleModelError):
        SnapshotLoader(home, models).load(catalog, 1, None)


def test_rows_that_are_damaged_are_named_when_a_head_must_be_compiled(
    workshop: Workshop, home: Path
) -> None:
    shutil.rmtree(home / "heads")
    damage_rows(workshop, "weather")
    with (
        CatalogReader(home) as catalog,
        pytest.raises(CorruptArtifactError, match="routing rows of weather@1"),
    ):
        SnapshotLoader(home, served_models()).load(catalog, 1, None)


def test_loading_writes_nothing(workshop: Workshop, home: Path) -> None:
    damage_head(workshop, 1)
    before = file_digests(home)
    with serving(home, poll_seconds=0.01) as live:
        live.refresh()
    assert file_digests(home) == before
    assert np.isfinite(live.snapshot.head.rows).all()
