"""Challengers: two revisions of a task side by side, over real catalogs, servers and channels."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from router.answering import Answerer
from router.challengers import MAX_CHALLENGERS, Challenge, parse_share
from router.client import RouterClient, RouterError
from router.decision import Decision, Outcome
from router.errors import InvalidInputError, TaskNotFoundError
from router.limits import MAX_REQUEST_KEY_BYTES
from router.live import LiveCatalog
from router.prometheus import PrometheusMetrics, serving
from router.routing import Router
from router.tasks import TaskKey
from tests.catalogs import (
    BASE_MODEL,
    PlaceEncoder,
    artifact_file,
    file_digests,
    flip_byte,
    head_file,
    new_record,
    new_workshop,
    prompt_values,
    publish,
    served_models,
    texts_of,
)
from tests.fakes import FakeLanguageModel, make_settings, running_server
from trainer.challenges import end_challenge, promote_challenger, start_challenge
from trainer.cli import app
from trainer.gate import DEFAULT_GATE_LIMIT, InterferenceError
from trainer.lifecycle import live_revision, retire, rollback
from trainer.workshop import Published, Workshop

# The next revision of sport also knows texts that the current one takes for nothing.
BOTH = [*texts_of("sport", 20, start=100), *texts_of("chess", 20)]


class PlaceModel(FakeLanguageModel):
    """The fake base model that the tasks of these catalogs have prompts for."""

    fingerprint = BASE_MODEL


def challenge(workshop: Workshop, share: float | None, name: str = "sport") -> Published:
    """Publish the next revision of a task as its challenger."""
    revision = workshop.catalog.newest_record(name) + 1
    texts = [text.replace("sport", name) for text in BOTH]
    record = new_record(workshop, name, revision=revision, texts=texts, with_prompt=True)
    return workshop.publish(
        "challenge",
        records=(record,),
        live={},
        gate_limit=DEFAULT_GATE_LIMIT,
        challenge=Challenge(name, revision, share),
    )


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, "weather", "sport", with_prompt=True)
        yield workshop


class Served:
    """A server over a real catalog that looks for news when it is told to."""

    def __init__(self, home: Path, metrics: PrometheusMetrics, live: LiveCatalog) -> None:
        settings = make_settings(home=home)
        self.metrics, self.live, self.model = metrics, live, PlaceModel()
        self.noted: list[tuple[str, Decision]] = []
        self.router = Router(
            live,
            PlaceEncoder(),
            Answerer(self.model, settings.answer_batches, metrics),
            settings.limits,
            settings.routing_batches,
            metrics,
            note=self.noted.extend,
        )
        metrics.watch(lambda: serving({"": self.router}))

    def count(self, sample: str, **labels: str) -> float:
        return sum(
            each.value
            for family in self.metrics.registry.collect()
            for each in family.samples
            if each.name == sample and labels.items() <= each.labels.items()
        )


@pytest.fixture
def served(workshop: Workshop) -> Iterator[Served]:
    live = LiveCatalog(workshop.home, served_models(), poll_seconds=60)
    live.start()
    try:
        yield Served(workshop.home, PrometheusMetrics(), live)
    finally:
        live.close()


@pytest.fixture
def client(served: Served) -> Iterator[RouterClient]:
    with running_server(served.router) as address, RouterClient(address) as client:
        yield client


def keys_of(challenge: Challenge, *, answered: bool) -> list[str]:
    """Keys on one side."""
    keys = (f"customer-{number}" for number in range(1000))
    return [key for key in keys if challenge.answers(key) is answered]


# The split


def test_a_key_stays_on_its_side_and_the_share_is_what_was_asked_for(
    workshop: Workshop, served: Served, client: RouterClient
) -> None:
    challenge(workshop, 0.1)
    served.live.refresh()
    keys = [f"session {number}" for number in range(2000)]
    sides = [client.route("sport 3", request_key=key).used for key in keys]
    taken = sides.count(TaskKey("sport", 2))
    assert taken + sides.count(TaskKey("sport", 1)) == 2000
    # A binomial of 2,000 and 0.1: five standard deviations are 67.
    assert abs(taken - 200) < 67
    # Whatever the text, the call and the place in a batch.
    for key, side in list(zip(keys, sides, strict=True))[:100]:
        decisions = client.batch_route(["sport 3", "sport 9"], request_key=key)
        streamed = list(client.stream_route(["sport 12"], request_key=key))
        assert {d.used for d in [*decisions, *streamed]} == {side}  # type: ignore[union-attr]


def test_sides_are_the_same_in_another_process_and_grow_with_the_share() -> None:
    small, large = Challenge("sport", 2, 0.1), Challenge("sport", 2, 0.5)
    keys = [f"k{number}" for number in range(300)] + ["ключ", "\n", "a\0b"]
    program = (
        "from router.challengers import Challenge\n"
        f"print([Challenge('sport', 2, 0.1).answers(key) for key in {keys!r}])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    mine = [small.answers(key) for key in keys]
    assert found.stdout.decode().strip() == str(mine)
    assert all(large.answers(key) for key in keys if small.answers(key))
    assert [Challenge("sport", 3, 0.1).answers(key) for key in keys] != mine
    assert all(Challenge("sport", 2, 1.0).answers(key) for key in keys)
    assert not Challenge("sport", 2, 1.0).answers("")
    assert not any(Challenge("sport", 2, None).answers(key) for key in keys)


def test_the_side_that_answers_decides_all_of_it(
    workshop: Workshop, served: Served, client: RouterClient
) -> None:
    [about] = challenge(workshop, 0.5).challenges
    served.live.refresh()
    mine, theirs = keys_of(about, answered=False)[0], keys_of(about, answered=True)[0]
    # Only the challenger knows chess, and a text without a key is the current revision's.
    assert client.route("chess 3", request_key=theirs).task == TaskKey("sport", 2)
    for key in (mine, ""):
        decision = client.route("chess 3", request_key=key)
        assert decision.outcome is Outcome.UNKNOWN
        assert decision.side is not None
        assert not decision.side.by_challenger
    elsewhere = client.route("weather 3", request_key=theirs)
    assert (elsewhere.task, elsewhere.side) == (TaskKey("weather", 1), None)
    for key, revision in ((mine, 1), (theirs, 2)):
        for task in ("", "sport"):  # routed, and named
            decision, *_ = client.generate("sport 3", task=task, request_key=key)
            assert isinstance(decision, Decision)
            assert decision.used == TaskKey("sport", revision)
            np.testing.assert_array_equal(
                served.model.batches[-1][-1].prompt, prompt_values("sport", revision)
            )
        prompt = client.get_soft_prompt("sport", revision)
        np.testing.assert_array_equal(prompt.values, prompt_values("sport", revision))
    np.testing.assert_array_equal(client.get_soft_prompt("sport").values, prompt_values("sport", 1))
    # What drift looks at is the current revision's.
    assert {str(d.task) for text, d in served.noted if text == "sport 3"} == {"sport@1"}


def test_a_head_of_a_challenger_has_the_bits_that_it_has_when_it_is_promoted(
    workshop: Workshop,
) -> None:
    published = challenge(workshop, 0.5)
    [stored] = workshop.catalog.challengers(published.revision)
    current = workshop.catalog.revision(published.revision).head_sha256
    assert current == workshop.catalog.revision(1).head_sha256
    promoted = promote_challenger(workshop, "sport")
    assert workshop.catalog.revision(promoted.revision).head_sha256 == stored.head_sha256


# Shadows


def test_a_shadow_never_changes_an_answer_and_says_what_it_would_have_been(
    workshop: Workshop, served: Served, client: RouterClient
) -> None:
    texts = [f"{place} {n}" for place in ("sport", "chess", "weather", "money") for n in range(5)]
    before = client.batch_route(texts, top_k=2, request_key="k")
    answers = [list(client.generate(text, request_key="k"))[1:] for text in texts]
    challenge(workshop, None)
    served.live.refresh()
    after = client.batch_route(texts, top_k=2, request_key="k")
    assert [replace(d, shadows=(), revision=1) for d in after] == before
    assert [list(client.generate(text, request_key="k"))[1:] for text in texts] == answers
    for text, decision in zip(texts, after, strict=True):
        seen = [(str(s.challenger), str(s.task), s.differs) for s in decision.shadows]
        if text.startswith("sport"):
            assert seen == [("sport@2", "sport@2", False)]
        elif text.startswith("chess"):
            assert seen == [("sport@2", "sport@2", True)]
        else:
            assert seen == []


# Metrics


def test_the_metrics_tell_both_sides_of_a_split_and_those_without_a_key(
    workshop: Workshop, served: Served, client: RouterClient
) -> None:
    [about] = challenge(workshop, 0.5).challenges
    served.live.refresh()
    mine, theirs = keys_of(about, answered=False)[0], keys_of(about, answered=True)[0]
    for key, times in ((mine, 3), (theirs, 2), ("", 1)):
        client.batch_route(["sport 3"] * times, request_key=key)
    client.route("chess 3", request_key=mine)
    list(client.generate("sport 3", task="sport", request_key=theirs))
    client.route("weather 3", request_key=theirs)
    name = "promptyard_challenge_decisions_total"
    for side, revision, outcome, times in (
        ("current", "1", "matched", 3),
        ("challenger", "2", "matched", 2),
        ("no_key", "1", "matched", 1),
        ("current", "1", "unknown", 1),
        ("challenger", "2", "named", 1),
    ):
        labels = {"task": "sport", "side": side, "revision": revision, "outcome": outcome}
        assert served.count(name, **labels) == times, labels
    assert served.count(name) == 8
    assert served.count("promptyard_challenge_score_count", side="challenger") == 2
    assert served.count("promptyard_challenge_score_count", side="current") == 3
    assert served.count("promptyard_challengers") == 1


def test_the_metrics_tell_what_a_shadow_decided_otherwise(
    workshop: Workshop, served: Served, client: RouterClient
) -> None:
    challenge(workshop, None)
    served.live.refresh()
    client.batch_route(["sport 3", "sport 4", "chess 3", "weather 3"])
    name = "promptyard_challenge_decisions_total"
    assert served.count(name, side="shadow", outcome="matched", revision="2") == 3
    assert served.count(name, side="current", outcome="matched", revision="1") == 2
    assert served.count(name, side="current", outcome="unknown", revision="1") == 1
    assert served.count("promptyard_shadow_differences_total", task="sport", revision="2") == 1


# From the beginning of a challenge to its end


def test_promoting_ending_and_rolling_back_append_to_the_catalog_and_delete_nothing(
    workshop: Workshop,
) -> None:
    challenge(workshop, 0.1)
    before = file_digests(workshop.home / "artifacts")
    grown = start_challenge(workshop, "sport", 0.5)
    assert [str(c.key) for c in grown.challenges] == ["sport@2"]
    assert grown.gate is None  # it was measured when it began
    ended = end_challenge(workshop, "sport")
    assert (ended.challenges, [str(c.key) for c in ended.ended]) == ((), ["sport@2"])
    assert live_revision(workshop, "sport") == 1
    start_challenge(workshop, "sport", None)
    promoted = promote_challenger(workshop, "sport")
    assert (live_revision(workshop, "sport"), promoted.challenges) == (2, ())
    rollback(workshop, "sport")
    assert live_revision(workshop, "sport") == 1
    assert file_digests(workshop.home / "artifacts") == before
    actions = [workshop.catalog.revision(number).action for number in range(2, 8)]
    assert actions == [
        *("challenge", "challenge", "end-challenge", "challenge"),
        "promote",
        "rollback",
    ]
    shares = [[c.challenge.share for c in workshop.catalog.challengers(n)] for n in range(1, 8)]
    assert shares == [[], [0.1], [0.5], [], [None], [], []]


def test_listing_and_showing_tasks_say_which_have_a_challenger(workshop: Workshop) -> None:
    challenge(workshop, 0.25)
    home = ["--home", str(workshop.home)]
    listed = CliRunner().invoke(app, ["list", *home], env={"COLUMNS": "200"}).output
    assert "live, tries 2 (25%)" in listed
    found = json.loads(CliRunner().invoke(app, ["list", "--json", *home]).output)["tasks"]
    told = {"task": "sport", "revision": 2, "share": 0.25}
    assert {task["name"]: task["challenger"] for task in found} == {"sport": told, "weather": None}
    for name, expected in (("sport", told), ("weather", None)):
        shown = CliRunner().invoke(app, ["show", name, "--json", *home]).output
        assert json.loads(shown)["challenger"] == expected


def test_a_challenge_goes_on_when_other_tasks_come_and_ends_when_its_task_goes(
    workshop: Workshop, served: Served
) -> None:
    challenge(workshop, 0.5)
    published = publish(workshop, "money")
    assert [str(c.key) for c in published.challenges] == ["sport@2"]
    served.live.refresh()
    standing = served.live.snapshot.challengers["sport"].snapshot
    assert [str(key) for key in standing.head.tasks] == ["money@1", "sport@2", "weather@1"]
    assert [str(c.key) for c in retire(workshop, "sport").ended] == ["sport@2"]


def test_running_servers_follow_every_step(
    workshop: Workshop, served: Served, client: RouterClient
) -> None:
    def seen() -> tuple[str, list[tuple[str, int, int, float]]]:
        served.live.refresh()
        found = [
            (c.task, c.current_revision, c.challenger_revision, c.share)
            for c in client.status().challengers
        ]
        return str(client.route("sport 3", request_key="k").used), found

    assert seen() == ("sport@1", [])
    challenge(workshop, 1.0)
    assert seen() == ("sport@2", [("sport", 1, 2, 1.0)])
    start_challenge(workshop, "sport", None)
    assert seen() == ("sport@1", [("sport", 1, 2, 0.0)])
    assert not client.status().challengers[0].HasField("share")
    end_challenge(workshop, "sport")
    assert seen() == ("sport@1", [])
    start_challenge(workshop, "sport", 1.0)
    promote_challenger(workshop, "sport")
    assert seen() == ("sport@2", [])
    rollback(workshop, "sport")
    assert seen() == ("sport@1", [])


def test_the_gate_measures_a_challenger_in_the_place_of_the_current_revision(
    workshop: Workshop,
) -> None:
    record = new_record(workshop, "sport", revision=2, texts=texts_of("weather", 30, start=500))
    about = Challenge("sport", 2, 0.5)
    with pytest.raises(InterferenceError, match=r"sport@2 on the other tasks: takes"):
        workshop.publish("challenge", records=(record,), live={}, gate_limit=0.05, challenge=about)
    assert workshop.catalog.newest_revision() == 1
    assert workshop.catalog.newest_record("sport") == 1


def test_what_makes_no_sense_is_refused_and_changes_nothing(workshop: Workshop) -> None:
    with pytest.raises(TaskNotFoundError, match="task: wether"):
        start_challenge(workshop, "wether", 0.5)
    with pytest.raises(InvalidInputError, match="challenger: sport@1; it is live"):
        start_challenge(workshop, "sport", 0.5)
    with pytest.raises(TaskNotFoundError, match="--revision: sport@7; give 1 to 1"):
        start_challenge(workshop, "sport", 0.5, revision=7)
    for action in (promote_challenger, end_challenge):
        with pytest.raises(TaskNotFoundError, match="challenger of: sport; see"):
            action(workshop, "sport")
    assert workshop.catalog.newest_revision() == 1
    challenge(workshop, 0.5)
    with pytest.raises(InvalidInputError, match="sport@3; sport@2 is tried already"):
        challenge(workshop, 0.5)
    names = [f"task-{number}" for number in range(MAX_CHALLENGERS)]
    publish(workshop, *names)
    for name in names:
        publish(workshop, name, revision=2, texts=texts_of(name, 12, start=40))
    for name in names[:-1]:
        start_challenge(workshop, name, 0.5, revision=1)
    with pytest.raises(InvalidInputError, match=f"the {MAX_CHALLENGERS + 1}th; end another one"):
        start_challenge(workshop, names[-1], 0.5, revision=1)


# What breaks


def broken(workshop: Workshop, served: Served, client: RouterClient) -> str:
    """Serve a damaged challenger; what GetStatus says of it, when all else was checked."""
    served.live.refresh()
    for key in ("k1", "k2", "k3", ""):
        assert client.route("sport 3", request_key=key).used == TaskKey("sport", 1)
        assert client.route("chess 3", request_key=key).side is None
    list(client.generate("sport 3", request_key="k1"))
    status = client.status()
    assert (status.revision, status.problem) == (workshop.catalog.newest_revision(), "")
    assert not status.out_of_service
    assert served.count("promptyard_challengers_out_of_service") == 1
    [about] = status.challengers
    assert (about.task, about.challenger_revision) == ("sport", 2)
    return about.problem


def test_a_damaged_prompt_takes_only_the_challenger_out(
    workshop: Workshop, served: Served, client: RouterClient
) -> None:
    challenge(workshop, 1.0)
    prompt = workshop.catalog.record(TaskKey("sport", 2)).prompt
    assert prompt is not None
    flip_byte(artifact_file(workshop.home, prompt.sha256))
    assert "digest" in broken(workshop, served, client)
    with pytest.raises(RouterError, match="TASK_OUT_OF_SERVICE"):
        client.get_soft_prompt("sport", 2)


def test_a_damaged_head_is_compiled_again_and_without_the_rows_only_the_challenger_is_out(
    workshop: Workshop, served: Served, client: RouterClient
) -> None:
    published = challenge(workshop, 1.0)
    [stored] = workshop.catalog.challengers(published.revision)
    flip_byte(head_file(workshop.home, stored.head_sha256))
    served.live.refresh()
    assert client.route("chess 3", request_key="k").used == TaskKey("sport", 2)
    start_challenge(workshop, "sport", 0.9)
    rows = workshop.catalog.record(TaskKey("sport", 2)).embeddings_sha256
    flip_byte(artifact_file(workshop.home, rows))
    flip_byte(head_file(workshop.home, stored.head_sha256))
    assert "routing rows of sport@2" in broken(workshop, served, client)


@pytest.mark.parametrize("key", ["x" * (MAX_REQUEST_KEY_BYTES + 1), "ж" * MAX_REQUEST_KEY_BYTES])
def test_a_key_that_is_too_long_is_refused_and_not_repeated(client: RouterClient, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: client.route("sport 1", request_key=key),
        lambda: client.batch_route(["sport 1"], request_key=key),
        lambda: list(client.generate("sport 1", request_key=key)),
        lambda: list(client.generate("sport 1", task="sport", request_key=key)),
    ]
    for call in calls:
        with pytest.raises(RouterError) as refused:
            call()
        assert (refused.value.reason, refused.value.field) == ("INVALID_INPUT", "request_key")
        assert key[:20] not in str(refused.value)
    [error] = client.stream_route(["sport 1"], request_key=key)
    assert isinstance(error, RouterError)
    assert error.field == "request_key"
    assert client.route("sport 1", request_key="x" * MAX_REQUEST_KEY_BYTES).task is not None


@pytest.mark.parametrize("revision", [-1, 2, 2**62])
def test_a_prompt_of_a_revision_that_is_not_served_is_not_found(
    client: RouterClient, revision: int
) -> None:
    with pytest.raises(RouterError, match="TASK_NOT_FOUND") as refused:
        client.get_soft_prompt("sport", revision)
    assert refused.value.field == "revision"


@pytest.mark.parametrize(
    ("text", "share"),
    [("10%", 0.1), ("0.1", 0.1), (".25", 0.25), ("2.5%", 0.025), ("100%", 1.0), ("shadow", None)],
)
def test_shares_are_written_as_percentages_or_fractions(text: str, share: float | None) -> None:
    assert parse_share(text) == share
    assert parse_share(Challenge("sport", 2, share).share_text) == share


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "0.0", "1", "10", "101%", "-5%", "nan", "inf", "1e-3", "٣%", "x" * 9999]
)
def test_what_is_no_share_is_refused_with_what_to_give(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"give a share like 10% or 0\.1") as refused:
        parse_share(text)
    assert len(str(refused.value)) < 200
