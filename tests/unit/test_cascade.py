"""The fast encoder decides what it is sure of, and the full one the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from router.artifacts import ArtifactReader
from router.background import measure_background
from router.cascade import LEAST_PROBABILITY, FastModel
from router.catalog import HEADS_FOLDER, CatalogReader
from router.decision import Outcome
from router.errors import InvalidInputError
from router.interfaces import Embeddings
from router.loading import ServedModels, SnapshotLoader
from router.routing import Router
from router.settings import ServerSettings
from router.snapshot import Snapshot
from tests.catalogs import (
    DIMENSION,
    PlaceEncoder,
    artifact_file,
    flip_byte,
    new_workshop,
    place_background,
    texts_of,
    write_rows,
)
from tests.fakes import FixedLive, make_settings
from trainer import lifecycle
from trainer import workshop as workshop_module
from trainer.challenges import start_challenge
from trainer.commands import PolicyChange, RegisterTask
from trainer.evaluate_routing import evaluate_routing
from trainer.evaluation_rows import LabelledText
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

PLACES = ("weather", "sport", "music")
ELSEWHERE = [f"nowhere{number} at all" for number in range(40)]


class CountingEncoder(PlaceEncoder):
    """Remembers the texts that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """As the places are."""
        self.asked += texts
        return super().encode(texts)


class CoarseEncoder(PlaceEncoder):
    """Half of the dimensions of the places."""

    name = "coarse"
    dimension = DIMENSION // 2

    made_as = "coarse:1"

    def __init__(self) -> None:
        super().__init__(self.made_as)

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Unit vectors `[B, 12]`."""
        whole = super().encode(texts)
        half = whole.vectors[:, : self.dimension]
        return Embeddings(half / np.linalg.norm(half, axis=1, keepdims=True), whole.truncated)


def register_places(home: Path, *names: str, **options: object) -> None:
    requests = [
        RegisterTask(
            name,
            write_rows(home.parent / f"{name}.jsonl", texts_of(name, 40)),
            with_prompt=False,
            **options,  # type: ignore[arg-type]
        )
        for name in names
    ]
    with new_workshop(home) as workshop:
        assert not register(workshop, requests, None, TuningSettings()).failures


def load(home: Path, *, cascade: bool = True) -> Snapshot:
    coarse = CoarseEncoder()
    fast = FastModel(coarse, measure_background(coarse)) if cascade else None
    models = ServedModels(PlaceEncoder.fingerprint, DIMENSION, place_background(), None, fast)
    with CatalogReader(home) as catalog:
        return SnapshotLoader(home, models).load(catalog, catalog.newest_revision(), None)


def router_over(snapshot: Snapshot, encoder: PlaceEncoder) -> Router:
    settings = make_settings()
    return Router(FixedLive(snapshot), encoder, None, settings.limits, settings.routing_batches)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    register_places(folder, *PLACES, keep_text=True)
    return folder


async def test_what_the_fast_encoder_is_sure_of_never_reaches_the_full_one(home: Path) -> None:
    encoder = CountingEncoder()
    snapshot = load(home)
    router = router_over(snapshot, encoder)
    texts = [text for name in PLACES for text in texts_of(name, 20, start=100)] + ELSEWHERE
    try:
        found = await router.route_batch(texts, top_k=1)
    finally:
        router.close()
    assert snapshot.cascade is not None
    fast = [d is not None for d in snapshot.cascade.decide(texts)]
    assert 0 < sum(fast) < len(texts)
    assert encoder.asked == [text for text, sure in zip(texts, fast, strict=True) if not sure]
    for decision, sure in zip(found, fast, strict=True):
        assert decision.revision == snapshot.revision
        assert len(decision.candidates) == 1
        if sure:
            assert decision.outcome is Outcome.MATCHED
            assert decision.used == decision.task
            assert (decision.probability or 0) >= LEAST_PROBABILITY
    own = [name for name in PLACES for _ in range(20)]
    right = [d.task and d.task.name == name for d, name in zip(found, own, strict=False)]
    assert np.mean([bool(each) for each in right]) > 0.85


async def test_the_others_are_decided_as_without_a_cascade(home: Path) -> None:
    texts = [*texts_of("sport", 10, start=100), *ELSEWHERE]
    found = []
    for cascade in (True, False):
        router = router_over(load(home, cascade=cascade), CountingEncoder())
        try:
            found.append(await router.route_batch(texts, top_k=2))
        finally:
            router.close()
    cascade = load(home).cascade
    assert cascade is not None
    unsure = [place for place, d in enumerate(cascade.decide(texts)) if d is None]
    assert unsure
    for place in unsure:
        one, other = found[0][place], found[1][place]
        assert (one.outcome, one.task) == (other.outcome, other.task)
        assert one.score == pytest.approx(other.score, abs=1e-4)


async def test_a_decision_does_not_depend_on_its_batch(home: Path) -> None:
    router = router_over(load(home), CountingEncoder())
    texts = [*texts_of("music", 5, start=100), *ELSEWHERE[:5]]
    try:
        together = await router.route_batch(texts)
        alone = [await router.route(text) for text in texts]
    finally:
        router.close()
    assert [(d.outcome, d.task) for d in together] == [(d.outcome, d.task) for d in alone]


# Catalogs that cannot have one are served without


@pytest.mark.parametrize("reason", ["no texts", "damaged texts", "a challenger", "no tasks"])
def test_a_catalog_without_what_it_takes_is_served_by_the_full_encoder(
    tmp_path: Path, reason: str
) -> None:
    home = tmp_path / "home"
    register_places(home, *PLACES, keep_text=True)
    with new_workshop(home) as workshop:
        if reason == "no tasks":
            for name in PLACES:
                lifecycle.retire(workshop, name)
        if reason == "damaged texts":
            key = workshop.catalog.live(1)[0]
            flip_byte(artifact_file(home, workshop.catalog.record(key).texts_sha256))
    if reason == "no texts":
        register_places(home, "late")
    if reason == "a challenger":
        register_places(home, "sport", keep_text=True, revise=True)
        with new_workshop(home) as workshop:
            lifecycle.rollback(workshop, "sport", 1)
            start_challenge(workshop, "sport", None, 2)
    snapshot = load(home)
    assert snapshot.cascade is None
    assert len(snapshot.decide(PlaceEncoder().encode(["sport 100"]))) == 1


# A head that is published with the revision


def coarse_model() -> FastModel:
    coarse = CoarseEncoder()
    return FastModel(coarse, measure_background(coarse))


def set_cascade(home: Path, *, wanted: bool = True) -> None:
    with Workshop(home, PlaceEncoder(), coarse_model) as workshop:
        workshop.publish("policy", live={}, change=PolicyChange(cascade=wanted))


def fast_head(home: Path) -> str | None:
    with CatalogReader(home) as catalog:
        return catalog.fast_head(catalog.newest_revision())


def cascade_head(snapshot: Snapshot) -> bytes:
    assert snapshot.cascade is not None
    return snapshot.cascade.snapshot.head.to_bytes()


def test_a_published_head_is_that_which_a_server_would_compile_and_needs_no_texts(
    home: Path,
) -> None:
    compiled = cascade_head(load(home))
    assert fast_head(home) is None
    set_cascade(home)
    assert fast_head(home) == hashlib.sha256(compiled).hexdigest()
    with CatalogReader(home) as catalog:
        for key in catalog.live(catalog.newest_revision()):
            artifact_file(home, catalog.record(key).texts_sha256).unlink()
    assert cascade_head(load(home)) == compiled


def test_a_published_head_follows_the_tasks_and_a_retired_one_leaves_no_trace(home: Path) -> None:
    set_cascade(home)
    before = fast_head(home)
    with Workshop(home, PlaceEncoder(), coarse_model) as workshop:
        rows = write_rows(home.parent / "chess.jsonl", texts_of("chess", 40))
        request = RegisterTask("chess", rows, with_prompt=False, keep_text=True)
        assert not register(workshop, [request], None, TuningSettings()).failures
        with_chess = fast_head(home)
        assert load(home).cascade is not None
        lifecycle.retire(workshop, "chess")
    assert with_chess not in (None, before)
    assert fast_head(home) == before


@pytest.mark.parametrize("damage", ["flipped", "pruned", "of another encoder"])
def test_a_head_that_cannot_be_used_is_compiled_again(home: Path, damage: str) -> None:
    compiled = cascade_head(load(home))
    set_cascade(home)
    digest = fast_head(home)
    assert digest is not None
    file = ArtifactReader(home / HEADS_FOLDER).path(digest)
    if damage == "flipped":
        flip_byte(file)
    if damage == "pruned":
        file.unlink()
    if damage == "of another encoder":
        CoarseEncoder.made_as, made_as = "coarse:2", CoarseEncoder.made_as
        try:
            assert b"coarse:2" in cascade_head(load(home))
        finally:
            CoarseEncoder.made_as = made_as
    assert cascade_head(load(home)) == compiled


def test_a_task_without_texts_is_refused_where_there_is_to_be_a_cascade(home: Path) -> None:
    set_cascade(home)
    rows = write_rows(home.parent / "late.jsonl", texts_of("late", 40))
    request = RegisterTask("late", rows, with_prompt=False)
    with Workshop(home, PlaceEncoder(), coarse_model) as workshop:
        before = workshop.catalog.newest_revision()
        with pytest.raises(InvalidInputError, match=r"no texts of late.*--no-cascade"):
            register(workshop, [request], None, TuningSettings())
        assert workshop.catalog.newest_revision() == before
        workshop.publish("policy", live={}, change=PolicyChange(cascade=False))
        assert not register(workshop, [request], None, TuningSettings()).failures
    assert fast_head(home) is None


def test_a_catalog_of_the_fast_encoder_has_no_cascade(tmp_path: Path) -> None:
    home = tmp_path / "home"
    rows = write_rows(tmp_path / "sport.jsonl", texts_of("sport", 40))
    request = RegisterTask("sport", rows, with_prompt=False, keep_text=True)
    with Workshop(home, CoarseEncoder(), coarse_model) as workshop:
        assert not register(workshop, [request], None, TuningSettings()).failures
        with pytest.raises(InvalidInputError, match="all is decided fast"):
            workshop.publish("policy", live={}, change=PolicyChange(cascade=True))


def test_heads_that_only_old_revisions_use_are_removed(home: Path) -> None:
    set_cascade(home)
    old = fast_head(home)
    assert old is not None
    with Workshop(home, PlaceEncoder(), coarse_model) as workshop:
        lifecycle.retire(workshop, "music")
        for number in range(1, workshop_module._KEPT_HEADS + 1):
            assert ArtifactReader(home / HEADS_FOLDER).path(old).exists() == (
                number < workshop_module._KEPT_HEADS
            )
            rate = 0.05 + number / 1000
            workshop.publish("policy", live={}, change=PolicyChange(false_reject_rate=rate))
    assert load(home).cascade is not None


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"encoder": "fast"}, "all is decided fast"), ({"decision_log": Path("log")}, "drift")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        ServerSettings(home=Path("unused"), cascade=True, **settings)  # type: ignore[arg-type]


# What it saves and costs


def test_saving_and_loss_are_measured_beside_the_full_encoder(home: Path) -> None:
    rows = [
        LabelledText(number, text, name)
        for name in PLACES
        for number, text in enumerate(texts_of(name, 20, start=200), start=1)
    ] + [LabelledText(number, text, None) for number, text in enumerate(ELSEWHERE, start=1)]
    snapshot = load(home)
    evaluation = evaluate_routing(snapshot, PlaceEncoder(), rows)
    cascade = evaluation.cascade
    assert snapshot.cascade is not None
    assert cascade is not None
    fast = [d is not None for d in snapshot.cascade.decide([row.text for row in rows])]
    assert cascade.decided_fast == pytest.approx(np.mean(fast))
    assert cascade.out_of_scope_fast == pytest.approx(np.mean(fast[60:]))
    assert abs(cascade.accuracy - evaluation.routing.accuracy) <= cascade.differing * len(rows) / 60
    assert cascade.out_of_scope_rejected is not None
    assert evaluate_routing(load(home, cascade=False), PlaceEncoder(), rows).cascade is None
