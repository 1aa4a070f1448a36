"""Publishing: heads, reports, policies, what is pruned and what a failure leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.catalog import CatalogReader
from router.compiling import changed_decisions, compile_head
from router.errors import (
    CorruptArtifactError,
    IncompatibleModelError,
    InvalidInputError,
    StorageError,
    TaskExistsError,
)
from router.head import Head
from router.loading import SnapshotLoader, read_statistics
from router.pooled_moments import PooledMoments
from router.tasks import Policy, TaskKey
from tests.catalogs import (
    DIMENSION,
    PlaceEncoder,
    artifact_file,
    file_digests,
    flip_byte,
    head_file,
    new_record,
    new_workshop,
    place_background,
    publish,
    served_models,
    texts_of,
)
from trainer import workshop as workshop_module
from trainer.commands import PolicyChange
from trainer.workshop import Workshop


def stored_head(workshop: Workshop, revision: int) -> bytes:
    return head_file(workshop.home, workshop.catalog.revision(revision).head_sha256).read_bytes()


def freshly_compiled(workshop: Workshop, revision: int) -> bytes:
    """The head of a revision as anybody would compile it from the records alone."""
    pool = PooledMoments(DIMENSION)
    pool.update(
        read_statistics(workshop.artifacts, workshop.catalog.record(key))
        for key in workshop.catalog.live(revision)
    )
    head = compile_head(
        pool,
        policy=workshop.catalog.revision(revision).policy,
        encoder=PlaceEncoder.fingerprint,
        dimension=DIMENSION,
        background=place_background(),
    )
    return head.to_bytes()


def load(home: Path, revision: int) -> Head:
    with CatalogReader(home) as catalog:
        return SnapshotLoader(home, served_models()).load(catalog, revision, None).head


def test_every_head_is_a_function_of_the_records_that_are_live(workshop: Workshop) -> None:
    publish(workshop, "weather")
    publish(workshop, "sport", "money")
    publish(workshop, "weather", revision=2, texts=texts_of("weather", 30, start=100))
    workshop.publish("retire", live={"sport": None})
    workshop.publish("rollback", live={"weather": 1})
    workshop.publish("restore", live={"sport": 1})
    for revision in range(1, 7):
        assert stored_head(workshop, revision) == freshly_compiled(workshop, revision)
    # Going back gives the very file of before.
    digests = [workshop.catalog.revision(revision).head_sha256 for revision in range(1, 7)]
    assert digests[1] == digests[5]
    assert len(set(digests)) == 5


def test_another_workshop_on_the_same_home_goes_on_where_the_first_was(home: Path) -> None:
    with new_workshop(home) as first, new_workshop(home) as second:
        publish(first, "weather")
        publish(second, "sport")
        publish(first, "money")
        assert stored_head(second, 3) == freshly_compiled(second, 3)
        assert [key.name for key in second.catalog.live(3)] == ["money", "sport", "weather"]


def test_a_publish_reports_what_it_recorded(workshop: Workshop) -> None:
    published = publish(workshop, "weather", "sport")
    about = workshop.catalog.revision(published.revision)
    assert about.report == {**published.report, "changed_decisions": {}}
    assert published.report["held_out_rows"] == 40
    assert published.report["held_out_accuracy"] == 1.0
    assert published.head.to_bytes() == stored_head(workshop, 1)
    assert about.encoder == PlaceEncoder.fingerprint


def test_decisions_on_old_rows_that_changed_are_counted(workshop: Workshop) -> None:
    before = publish(workshop, "weather", "sport").head
    published = publish(workshop, "thief", texts=[*texts_of("weather", 20, start=500), "thief 1"])
    rows = {TaskKey("weather", 1): 20, TaskKey("sport", 1): 20, TaskKey("thief", 1): 21}
    assert published.changed_decisions == changed_decisions(before, published.head, rows)
    assert published.changed_decisions["weather@1"] > 0
    assert "thief@1" not in published.changed_decisions
    recorded = workshop.catalog.revision(2).report["changed_decisions"]
    assert recorded == dict(published.changed_decisions)


def test_a_workshop_that_was_opened_anew_counts_the_same_changes(home: Path) -> None:
    texts = [*texts_of("weather", 20, start=500), "thief 1"]
    counted = []
    for anew in (False, True):
        folder = home / str(anew)
        with new_workshop(folder) as workshop:
            publish(workshop, "weather", "sport")
            if not anew:
                counted.append(publish(workshop, "thief", texts=texts).changed_decisions)
        if anew:
            with new_workshop(folder) as workshop:
                counted.append(publish(workshop, "thief", texts=texts).changed_decisions)
    assert counted[0] == counted[1]


def test_retiring_everything_leaves_an_empty_head_and_the_files(workshop: Workshop) -> None:
    publish(workshop, "weather", "sport")
    before = file_digests(workshop.home / "artifacts")
    published = workshop.publish("retire", live={"weather": None, "sport": None})
    assert published.head.tasks == ()
    assert file_digests(workshop.home / "artifacts") == before
    assert load(workshop.home, 2).tasks == ()
    assert workshop.publish("restore", live={"sport": 1}).head.tasks == (TaskKey("sport", 1),)


# Policies


def test_a_policy_change_holds_until_it_is_changed_again(workshop: Workshop) -> None:
    def publish_with(name: str, change: PolicyChange | None) -> Policy:
        record = new_record(workshop, name)
        workshop.publish("register", records=(record,), live={name: 1}, change=change)
        return workshop.catalog.revision(workshop.catalog.newest_revision()).policy

    assert publish_with("a", None) == Policy()
    nearest = PolicyChange(head="nearest-mean", false_reject_rate=0.1)
    assert publish_with("b", nearest) == Policy("nearest-mean", 0.1, 0.005)
    assert publish_with("c", PolicyChange()) == Policy("nearest-mean", 0.1, 0.005)
    assert publish_with("d", PolicyChange(ambiguous_rate=0.2)) == Policy("nearest-mean", 0.1, 0.2)
    assert publish_with("e", PolicyChange(head="lda")) == Policy("lda", 0.1, 0.2)
    kinds = [load(workshop.home, revision).kind for revision in range(1, 6)]
    assert kinds == ["auto", "nearest-mean", "nearest-mean", "nearest-mean", "lda"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (PolicyChange(head="ridge"), "head: ridge; choose one of auto, lda, nearest-mean"),
        (PolicyChange(false_reject_rate=-0.1), "false_reject_rate: -0.1; give a share"),
        (PolicyChange(false_reject_rate=0.6), "false_reject_rate: 0.6"),
        (PolicyChange(false_reject_rate=float("nan")), "false_reject_rate: nan"),
        (PolicyChange(ambiguous_rate=1.0), "ambiguous_rate: 1.0"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(
    workshop: Workshop, change: PolicyChange, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        workshop.policy(change)


# Encoders


def test_a_home_of_another_encoder_is_refused(workshop: Workshop, home: Path) -> None:
    publish(workshop, "weather")
    with Workshop(home, PlaceEncoder("places:2")) as other:
        with pytest.raises(
            IncompatibleModelError, match="encoder: places:2; this catalog was made with places:1"
        ):
            other.check_encoder()
        before = file_digests(home)
        record = new_record(workshop, "sport")
        with pytest.raises(IncompatibleModelError):
            other.publish("register", records=(record,), live={"sport": 1})
        assert file_digests(home).keys() >= before.keys()
        assert other.catalog.newest_revision() == 1


def test_an_empty_home_takes_any_encoder(home: Path) -> None:
    with Workshop(home, PlaceEncoder("places:7")) as workshop:
        workshop.check_encoder()
        publish(workshop, "weather")
        assert workshop.catalog.revision(1).encoder == "places:7"


# Failures


def test_what_was_not_published_is_forgotten(workshop: Workshop, home: Path) -> None:
    """The next registration of that name, with other rows, must not find the old ones."""
    publish(workshop, "weather")
    failed = new_record(workshop, "sport", texts=texts_of("sport", 30))
    heads = home / "heads"
    real = workshop._heads
    workshop._heads = FullDisk(heads)
    with pytest.raises(StorageError):
        workshop.publish("register", records=(failed,), live={"sport": 1})
    workshop._heads = real
    publish(workshop, "sport", texts=texts_of("elsewhere", 12))
    assert stored_head(workshop, 2) == freshly_compiled(workshop, 2)


class FullDisk(workshop_module.ArtifactWriter):
    """Nothing can be written here."""

    def write(self, *content: bytes | memoryview) -> str:
        raise StorageError("artifact folder", "No space left on device", "free disk space")


def test_a_name_taken_by_another_process_after_a_failure_is_read_from_its_record(
    workshop: Workshop, home: Path
) -> None:
    failed = new_record(workshop, "sport", texts=texts_of("sport", 30))
    real, workshop._heads = workshop._heads, FullDisk(home / "heads")
    with pytest.raises(StorageError):
        workshop.publish("register", records=(failed,), live={"sport": 1})
    workshop._heads = real
    with new_workshop(home) as other:
        publish(other, "sport", texts=texts_of("elsewhere", 12))
    publish(workshop, "weather")
    assert stored_head(workshop, 2) == freshly_compiled(workshop, 2)


def test_a_registration_that_comes_second_is_refused_and_can_be_revised(
    workshop: Workshop, home: Path
) -> None:
    late = new_record(workshop, "weather", texts=texts_of("elsewhere", 12))
    with new_workshop(home) as other:
        publish(other, "weather")
    with pytest.raises(TaskExistsError, match="run it again with --revise"):
        workshop.publish("register", records=(late,), live={"weather": 1})
    publish(workshop, "weather", revision=2, texts=texts_of("elsewhere", 12))
    assert stored_head(workshop, 2) == freshly_compiled(workshop, 2)


def test_orphan_files_of_killed_registrations_do_no_harm(workshop: Workshop, home: Path) -> None:
    new_record(workshop, "orphan", with_prompt=True)
    for folder in ("artifacts", "heads"):
        (home / folder / "ab").mkdir(parents=True, exist_ok=True)
        (home / folder / "ab" / ".partial-xyz").write_bytes(b"half of it")
        (home / folder / "ab" / ("ab" + "0" * 62)).write_bytes(b"of nobody")
    publish(workshop, "weather")
    assert [key.name for key in load(home, 1).tasks] == ["weather"]
    assert workshop.catalog.task_names() == ["weather"]
    # The very rows of the orphan can be registered now.
    publish(workshop, "orphan", with_prompt=True)
    assert [key.name for key in load(home, 2).tasks] == ["orphan", "weather"]


@pytest.mark.parametrize("way", ["retire", "revise"])
def test_a_task_whose_rows_are_damaged_can_be_retired_or_revised(home: Path, way: str) -> None:
    """What the error itself advises, in a process that has not read the rows before."""
    with new_workshop(home) as workshop:
        publish(workshop, "weather", "sport")
        flip_byte(
            artifact_file(home, workshop.catalog.record(TaskKey("sport", 1)).embeddings_sha256)
        )
    with new_workshop(home) as workshop:
        with pytest.raises(
            CorruptArtifactError,
            match=r"routing rows of sport@1, artifact .* has digest.*with --revise",
        ):
            publish(workshop, "money")
        assert workshop.catalog.newest_revision() == 1
        if way == "retire":
            published = workshop.publish("retire", live={"sport": None})
        else:
            published = publish(workshop, "sport", revision=2, texts=texts_of("sport", 15))
        assert stored_head(workshop, published.revision) == freshly_compiled(workshop, 2)
        assert publish(workshop, "money").revision == 3


def test_a_damaged_old_head_does_not_hinder_the_next_publish(home: Path) -> None:
    with new_workshop(home) as workshop:
        publish(workshop, "weather")
        flip_byte(head_file(workshop.home, workshop.catalog.revision(1).head_sha256))
    # Another process remembers no head, and has none to compare the new one with.
    with new_workshop(home) as workshop:
        published = publish(workshop, "sport")
        assert published.changed_decisions == {}
        assert stored_head(workshop, 2) == freshly_compiled(workshop, 2)


# Pruning


def test_only_the_newest_heads_are_kept_and_the_others_can_be_compiled_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workshop_module, "_KEPT_HEADS", 3)
    with new_workshop(home) as workshop:
        heads = {}
        for number in range(6):
            published = publish(workshop, f"task-{number}", texts=texts_of(f"task-{number}", 6))
            heads[published.revision] = published.head.to_bytes()
        kept = {path.name for path in (home / "heads").rglob("*") if path.is_file()}
        assert kept == {workshop.catalog.revision(revision).head_sha256 for revision in (4, 5, 6)}
    before = file_digests(home)
    for revision, expected in heads.items():
        assert load(home, revision).to_bytes() == expected
    assert file_digests(home) == before


def test_a_head_that_a_newer_revision_uses_again_is_not_pruned(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workshop_module, "_KEPT_HEADS", 3)
    with new_workshop(home) as workshop:
        publish(workshop, "weather", "sport")
        for _ in range(4):
            workshop.publish("retire", live={"sport": None})
            workshop.publish("restore", live={"sport": 1})
        newest = workshop.catalog.newest_revision()
        for revision in range(newest - 2, newest + 1):
            assert stored_head(workshop, revision)
        kept = [path for path in (home / "heads").rglob("*") if path.is_file()]
        assert len(kept) == 2


def test_a_head_that_cannot_be_removed_does_not_make_a_publish_fail(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workshop_module, "_KEPT_HEADS", 1)
    with new_workshop(home) as workshop:
        publish(workshop, "weather")
        old = head_file(home, workshop.catalog.revision(1).head_sha256)
        old.unlink()
        old.mkdir()  # a folder cannot be unlinked, whoever one is
        assert publish(workshop, "sport").revision == 2
