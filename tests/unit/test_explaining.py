"""Explanations over a real catalog, a real server and a real channel; only the encoder is small."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.artifacts import ArtifactReader
from router.catalog import ARTIFACTS_FOLDER, CatalogReader
from router.client import RouterClient, RouterError
from router.decision import Candidate, Outcome, Use, decide
from router.explaining import LEAST_EXPLAINED, MOST_EXPLAINED, Explainer
from router.explanation import why
from router.interfaces import Embeddings
from router.live import LiveCatalog
from router.loading import read_statistics
from router.rejection import OnUnknown, RejectionPolicy
from router.routing import Router
from router.tasks import TaskKey
from router.v1 import router_service_pb2 as messages
from tests.catalogs import (
    PlaceEncoder,
    artifact_file,
    flip_byte,
    new_workshop,
    place_background,
    publish,
    served_models,
    texts_of,
)
from tests.fakes import make_settings, running_server
from trainer.commands import PolicyChange
from trainer.lifecycle import retire

PLACES = ("weather", "sport", "music", "cooking")


class WaitingEncoder(PlaceEncoder):
    """Waits before it encodes a text for an explanation."""

    def __init__(self) -> None:
        super().__init__()
        self.blocked = threading.Event()
        self.blocked.set()

    def encode(self, texts: Sequence[str]) -> Embeddings:
        if threading.current_thread().name.startswith("explaining"):
            assert self.blocked.wait(20)
        return super().encode(texts)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explaining") / "home"
    with new_workshop(folder) as workshop:
        publish(workshop, *PLACES)
    return folder


@contextlib.contextmanager
def serving(
    home: Path, *, most_rows: int = 1000, encoder: PlaceEncoder | None = None
) -> Iterator[RouterClient]:
    settings = make_settings(home=home)
    live = LiveCatalog(home, served_models(None), 60.0)
    live.start()
    artifacts = ArtifactReader(home / ARTIFACTS_FOLDER)
    explainer = Explainer(artifacts, place_background, most_rows_for_terms=most_rows)
    router = Router(
        live,
        encoder or PlaceEncoder(),
        None,
        settings.limits,
        settings.routing_batches,
        explainer=explainer,
    )
    with running_server(router, settings) as address, RouterClient(address) as client:
        yield client
    explainer.close()
    live.close()


@pytest.fixture(scope="module")
def client(home: Path) -> Iterator[RouterClient]:
    with serving(home) as client:
        yield client


def stored_vectors(home: Path, task: str) -> np.ndarray:
    with CatalogReader(home) as catalog:
        record = catalog.record(TaskKey(task, 1))
    return read_statistics(ArtifactReader(home / ARTIFACTS_FOLDER), record).vectors


def test_an_explanation_comes_with_the_same_decision_as_without(client: RouterClient) -> None:
    for text in ("sport 900", "nowhere 1"):
        decision, explanation = client.explain(text, top_k=1)
        assert decision == client.route(text, top_k=1)
        assert len(explanation.candidates) == LEAST_EXPLAINED
        assert explanation.candidates[0].task == decision.candidates[0].task


def test_without_being_asked_for_nothing_is_explained(client: RouterClient) -> None:
    response = client._router.Route(messages.RouteRequest(text="sport 900"), timeout=10)
    assert not response.HasField("explanation")


TERMS = {
    "auto": ["likelihood", "discriminant", "regression", "closeness"],
    "lda": ["likelihood", "discriminant", "cosine"],
    "nearest-mean": ["cosine"],
}


@pytest.mark.parametrize("kind", TERMS)
def test_the_terms_of_every_candidate_add_up_to_its_score(kind: str, tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, *PLACES)
        # Two clusters: the terms must be those of the row that won.
        publish(workshop, "both", texts=texts_of("left", 20) + texts_of("right", 20))
        workshop.publish("policy", live={}, change=PolicyChange(head=kind))
    with serving(tmp_path / "home") as client:
        for text in ("sport 900", "left 77", "right 78", "nowhere 1"):
            _, explanation = client.explain(text, top_k=5)
            assert explanation.notes == ()
            assert len(explanation.candidates) == 5
            for candidate in explanation.candidates:
                assert [term.name for term in candidate.terms] == TERMS[kind]
                total = sum(term.value for term in candidate.terms)
                assert total == pytest.approx(candidate.score, abs=1e-3)


def test_the_closest_rows_are_those_of_the_task_by_their_number(
    home: Path, client: RouterClient
) -> None:
    text = texts_of("music", 20)[7]
    [vector] = PlaceEncoder().encode([text]).vectors
    _, explanation = client.explain(text)
    for candidate in explanation.candidates:
        stored = stored_vectors(home, candidate.task.name)
        expected = np.argsort(-(stored @ vector))[:3]
        assert [example.row for example in candidate.examples] == expected.tolist()
        for example in candidate.examples:
            assert example.similarity == pytest.approx(float(stored[example.row] @ vector))
    # It is one of the task's own rows.
    assert explanation.candidates[0].task.name == "music"
    assert explanation.candidates[0].examples[0].similarity == pytest.approx(1.0, abs=1e-3)


def test_margins_are_to_the_best_other_task(client: RouterClient) -> None:
    decision, explanation = client.explain("cooking 901", top_k=4)
    first, *others = explanation.candidates
    assert first.margin == pytest.approx(decision.margin)
    for candidate in others:
        assert candidate.margin == pytest.approx(candidate.score - first.score)


def test_the_sentence_says_what_is_used_for_an_unknown_text(client: RouterClient) -> None:
    sentences = [
        client.explain("nowhere 1", on_unknown=policy)[1].sentence
        for policy in (None, RejectionPolicy(OnUnknown.FALLBACK, "sport"))
    ]
    assert all(s.startswith("Unknown: the best task, ") for s in sentences)
    assert sentences[0].endswith("no task is used.")
    assert sentences[1].endswith("by the rejection policy sport@1 is used.")


@pytest.mark.parametrize(
    ("best", "second", "sentence"),
    [
        (2.0, 1.0, "Matched: a@1 scores 2, over its threshold of 0.5 and 1 ahead of b@1."),
        (
            2.0,
            1.95,
            "Ambiguous: a@1 scores 2, over its threshold of 0.5, but only 0.05 ahead of b@1; "
            "a margin under 0.1 leaves both open.",
        ),
        (
            0.4,
            0.1,
            "Unknown: the best task, a@1, scores 0.4, less than the 0.5 from which on it accepts "
            "an input; no task is used.",
        ),
        (2.0, None, "Matched: a@1 scores 2, over its threshold of 0.5; it is the only task."),
    ],
)
def test_the_sentence_says_why(best: float, second: float | None, sentence: str) -> None:
    candidates = [Candidate(TaskKey("a", 1), best, 0.5)]
    if second is not None:
        candidates.append(Candidate(TaskKey("b", 1), second, 0.5))
    decision = decide(candidates, ambiguity_margin=0.1, revision=1, top_k=2)
    assert why(decision, 0.1) == sentence
    assert why(replace(decision, truncated=True), 0.1).endswith("its end was not read.")


def test_the_sentence_knows_an_empty_catalog_and_every_use() -> None:
    empty = decide((), ambiguity_margin=0.0, revision=1)
    assert why(empty, 0.0) == "Unknown: the catalog has no task."
    unknown = decide(
        [Candidate(TaskKey("a", 1), 0.1, 0.5)], ambiguity_margin=0, revision=1, top_k=2
    )
    assert unknown.outcome is Outcome.UNKNOWN
    said = {why(replace(unknown, used=TaskKey("a", 1), use=use), 0.0) for use in Use}
    assert len(said) == 4


def test_a_large_catalog_is_explained_without_terms(home: Path) -> None:
    with serving(home, most_rows=79) as client:
        decision, explanation = client.explain("sport 900")
    assert decision.outcome is not None
    assert explanation.notes == (
        "no terms: the tasks have 80 rows, and more than 79 take too long",
    )
    assert all(c.terms == () and len(c.examples) == 3 for c in explanation.candidates)


def test_at_most_ten_candidates_are_explained(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, *(f"place-{n}" for n in range(12)))
    with serving(tmp_path / "home") as client:
        decision, explanation = client.explain("place-3 900", top_k=12)
    assert (len(decision.candidates), len(explanation.candidates)) == (12, MOST_EXPLAINED)


def test_a_damaged_file_costs_the_explanation_what_it_held_and_no_more(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, *PLACES)
        digest = workshop.catalog.record(TaskKey("sport", 1)).embeddings_sha256
    flip_byte(artifact_file(tmp_path / "home", digest))
    with serving(tmp_path / "home") as client:
        decision, explanation = client.explain("sport 900", top_k=4)
        assert decision.outcome is Outcome.MATCHED
    by_task = {candidate.task.name: candidate for candidate in explanation.candidates}
    assert by_task["sport"].examples == ()
    assert len(by_task["music"].examples) == 3
    assert any(note.startswith("no terms: routing rows of sport@1") for note in explanation.notes)
    assert any(note.startswith("no examples of sport@1") for note in explanation.notes)


def test_an_empty_catalog_and_a_single_task_are_explained(tmp_path: Path) -> None:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, "sport")
    with serving(tmp_path / "home") as client:
        _, explanation = client.explain("sport 900")
        [candidate] = explanation.candidates
        assert math.isinf(candidate.margin)
    with new_workshop(tmp_path / "home") as workshop:
        retire(workshop, "sport")
    with serving(tmp_path / "home") as client:
        _, explanation = client.explain("sport 900")
        assert explanation.sentence == "Unknown: the catalog has no task."
        assert (explanation.candidates, explanation.notes) == ((), ())


def test_too_many_explanations_are_refused_and_routing_goes_on(home: Path) -> None:
    encoder = WaitingEncoder()
    with serving(home, encoder=encoder) as client:
        encoder.blocked.clear()
        reasons: list[str] = []

        def ask() -> None:
            try:
                client.explain("sport 900")
                reasons.append("")
            except RouterError as error:
                reasons.append(error.reason)

        threads = [threading.Thread(target=ask) for _ in range(14)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while len(reasons) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.route("sport 900").outcome is Outcome.MATCHED
        encoder.blocked.set()
        for thread in threads:
            thread.join(20)
    assert reasons[:5] == ["OVERLOADED"] * 5
    assert sorted(reasons[5:]) == [""] * 9


def test_a_bad_request_for_an_explanation_is_refused_by_field(client: RouterClient) -> None:
    for text, top_k, field in (("", 0, "text"), ("x", -1, "top_k"), ("x", 101, "top_k")):
        with pytest.raises(RouterError) as caught:
            client.explain(text, top_k=top_k)
        assert (caught.value.reason, caught.value.field) == ("INVALID_INPUT", field)
