"""A catalog goes over to another encoder as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from router.catalog import CatalogReader
from router.errors import (
    CorruptArtifactError,
    IncompatibleModelError,
    InvalidInputError,
    RefusedError,
)
from router.interfaces import Embeddings
from router.kept_texts import KeptText, kept_texts
from router.loading import SnapshotLoader, read_statistics
from router.statistics import to_fixed_point
from router.tasks import TaskKey, TaskRecord
from tests.catalogs import (
    DIMENSION,
    PlaceEncoder,
    artifact_file,
    file_digests,
    flip_byte,
    new_workshop,
    served_models,
    texts_of,
    write_rows,
)
from trainer import lifecycle
from trainer.challenges import start_challenge
from trainer.commands import RegisterTask
from trainer.data import read_labelled
from trainer.register import register
from trainer.switching import switch_encoder
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

PLACES = ("weather", "sport", "music")
ODD = ["\u2028 line", "\x85 line", '"quoted"\ttab', "天気 🙂"]


class HalfEncoder(PlaceEncoder):
    """The same places in half the dimensions."""

    name = "half"
    dimension = DIMENSION // 2

    def __init__(self) -> None:
        super().__init__("half:1:own:window-64:numpy")

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Unit vectors `[B, 12]`."""
        whole = super().encode(texts)
        half = whole.vectors[:, : self.dimension]
        norms = (half**2).sum(1, keepdims=True) ** 0.5
        return Embeddings(half / norms, whole.truncated)


def register_places(home: Path, *names: str, **options: object) -> tuple[TaskRecord, ...]:
    requests = [
        RegisterTask(
            name,
            write_rows(
                home.parent / f"{name}.jsonl",
                [*texts_of(name, 12), *(f"{name} {odd}" for odd in ODD)],
            ),
            with_prompt=False,
            **options,  # type: ignore[arg-type]
        )
        for name in names
    ]
    with new_workshop(home) as workshop:
        result = register(workshop, requests, None, TuningSettings())
        assert not result.failures
        return result.records


def switch(home: Path) -> None:
    with Workshop(home, HalfEncoder()) as workshop:
        switch_encoder(workshop)


def test_kept_texts_are_the_rows_as_they_were_in_the_stored_order(home: Path) -> None:
    [record] = register_places(home, "weather", keep_text=True)
    with new_workshop(home) as workshop:
        found = kept_texts(workshop.artifacts, record)
    file = read_labelled(home.parent / "weather.jsonl", with_output=False)
    assert found == [KeptText(each.input, each.output) for each in file.examples]


def test_no_text_is_stored_that_nobody_asked_to_keep(home: Path) -> None:
    [record] = register_places(home, "weather")
    assert record.texts_sha256 == ""
    assert "texts_sha256" not in record.to_json()
    stored = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    assert b"weather 3" not in stored


def test_every_task_is_embedded_again_as_a_revision_of_its_own(home: Path) -> None:
    register_places(home, *PLACES, keep_text=True)
    before = file_digests(home / "artifacts")
    switch(home)
    encoder = HalfEncoder()
    with CatalogReader(home) as catalog:
        newest = catalog.newest_revision()
        assert catalog.revision(newest).action == "switch_encoder"
        assert catalog.revision(newest).encoder == encoder.fingerprint
        assert catalog.live(newest) == [TaskKey(name, 2) for name in sorted(PLACES)]
        old, new = (catalog.record(TaskKey("sport", revision)) for revision in (1, 2))
    assert (new.encoder, new.data, new.texts_sha256) == (
        encoder.fingerprint,
        old.data,
        old.texts_sha256,
    )
    with Workshop(home, encoder) as workshop:
        rows = read_statistics(workshop.artifacts, new).embeddings
        texts = [text.input for text in kept_texts(workshop.artifacts, new)]
        assert (rows == to_fixed_point(encoder.encode(texts).vectors)).all()
        assert workshop.newest_head().summary["held_out_accuracy"] > 0.7
    after = file_digests(home / "artifacts")
    assert before.items() <= after.items()


def test_the_head_is_that_of_a_catalog_that_was_always_of_that_encoder(
    home: Path, tmp_path: Path
) -> None:
    register_places(home, *PLACES, keep_text=True)
    switch(home)
    elsewhere = tmp_path / "elsewhere"
    requests = [
        RegisterTask(name, tmp_path / f"{name}.jsonl", with_prompt=False) for name in PLACES
    ]
    with Workshop(elsewhere, HalfEncoder()) as workshop:
        register(workshop, requests, None, TuningSettings())
        expected = workshop.newest_head()
    with Workshop(home, HalfEncoder()) as workshop:
        found = workshop.newest_head()
    assert found.rows.tobytes() == expected.rows.tobytes()
    assert found.thresholds == expected.thresholds


def test_one_task_without_its_texts_refuses_the_switch_and_changes_nothing(home: Path) -> None:
    register_places(home, "weather", "sport", keep_text=True)
    register_places(home, "music")
    before = file_digests(home)
    with pytest.raises(RefusedError, match=r"not kept of music.*--keep-text"):
        switch(home)
    assert file_digests(home) == before


def test_a_retired_task_without_its_texts_does_not_hinder(home: Path) -> None:
    register_places(home, "weather", "sport", keep_text=True)
    register_places(home, "music")
    with new_workshop(home) as workshop:
        lifecycle.retire(workshop, "music")
    switch(home)
    with (
        Workshop(home, HalfEncoder()) as workshop,
        pytest.raises(IncompatibleModelError, match=r"encoder of music@1.*--revise"),
    ):
        lifecycle.restore(workshop, "music")


def test_a_task_cannot_go_back_to_a_revision_of_the_encoder_of_before(home: Path) -> None:
    register_places(home, *PLACES, keep_text=True)
    switch(home)
    with Workshop(home, HalfEncoder()) as workshop:
        with pytest.raises(IncompatibleModelError, match="encoder of sport@1"):
            lifecycle.rollback(workshop, "sport", 1)
        assert workshop.catalog.newest_revision() == 2


def test_a_catalog_can_be_switched_back(home: Path) -> None:
    register_places(home, *PLACES, keep_text=True)
    with new_workshop(home) as workshop:
        before = workshop.newest_head()
    switch(home)
    with new_workshop(home) as workshop:
        switch_encoder(workshop)
        after = workshop.newest_head()
    assert [key.revision for key in after.tasks] == [3, 3, 3]
    assert after.rows.tobytes() == before.rows.tobytes()


def test_older_revisions_are_served_with_the_encoder_of_before(home: Path) -> None:
    register_places(home, *PLACES, keep_text=True)
    switch(home)
    with CatalogReader(home) as catalog:
        loader = SnapshotLoader(home, served_models())
        assert loader.load(catalog, 1, None).revision == 1
        with pytest.raises(IncompatibleModelError, match="choose it with --encoder"):
            loader.load(catalog, 2, None)


def test_what_makes_no_sense_is_refused(home: Path) -> None:
    with (
        Workshop(home, HalfEncoder()) as workshop,
        pytest.raises(InvalidInputError, match="register a task"),
    ):
        switch_encoder(workshop)
    register_places(home, *PLACES, keep_text=True)
    with (
        new_workshop(home) as workshop,
        pytest.raises(InvalidInputError, match="the catalog is of it already"),
    ):
        switch_encoder(workshop)
    register_places(home, "sport", keep_text=True, revise=True)
    with new_workshop(home) as workshop:
        lifecycle.rollback(workshop, "sport", 1)
        start_challenge(workshop, "sport", None, 2)
    with pytest.raises(InvalidInputError, match=r"challengers: '?sport@2"):
        switch(home)


def test_damaged_texts_refuse_the_switch(home: Path) -> None:
    records = register_places(home, *PLACES, keep_text=True)
    flip_byte(artifact_file(home, records[0].texts_sha256))
    with pytest.raises(CorruptArtifactError):
        switch(home)
