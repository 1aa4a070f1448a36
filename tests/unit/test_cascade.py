"""The fast encoder decides what it is sure of, and the full one the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from router.background import measure_background
from router.cascade import LEAST_PROBABILITY, FastModel
from router.catalog import CatalogReader
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
from trainer.challenges import start_challenge
from trainer.commands import RegisterTask
from trainer.evaluate_routing import evaluate_routing
from trainer.evaluation_rows import LabelledText
from trainer.register import register
from trainer.tuning_settings import TuningSettings

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

    def __init__(self) -> None:
        super().__init__("coarse:1")

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
