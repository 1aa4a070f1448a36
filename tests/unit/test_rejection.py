"""Which task is used for an input that fits none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from router.decision import Candidate, Decision, Outcome, Use, decide
from router.errors import InvalidInputError, TaskNotFoundError
from router.loading import SnapshotLoader
from router.rejection import OnUnknown, RejectionPolicy
from router.snapshot import Snapshot
from router.tasks import TaskKey
from tests.catalogs import PlaceEncoder, new_workshop, publish, served_models
from trainer.commands import PolicyChange
from trainer.lifecycle import restore, retire
from trainer.workshop import Workshop

A, B, HELP = TaskKey("a", 1), TaskKey("b", 3), TaskKey("help", 2)
POLICIES = ("abstain", "best", "fallback:help")


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    with new_workshop(tmp_path / "home") as workshop:
        publish(workshop, "weather", "sport", "help")
        yield workshop


def decision(best: float, second: float) -> Decision:
    candidates = [Candidate(A, best, 0.5), Candidate(B, second, 0.5)]
    return decide(candidates, ambiguity_margin=0.1, revision=4, top_k=2)


def served(workshop: Workshop) -> Snapshot:
    newest = workshop.catalog.newest_revision()
    return SnapshotLoader(workshop.home, served_models()).load(workshop.catalog, newest, None)


def unknown(snapshot: Snapshot, policy: RejectionPolicy) -> Decision:
    """What becomes of a text from nowhere."""
    [decided] = snapshot.decide(PlaceEncoder().encode(["nowhere at all"]), top_k=1)
    assert decided.outcome is Outcome.UNKNOWN
    return snapshot.apply(decided, policy)


@pytest.mark.parametrize("text", POLICIES)
def test_a_policy_is_what_its_text_says(text: str) -> None:
    assert str(RejectionPolicy.parse(text)) == text


@pytest.mark.parametrize("text", ["", "Best", "fallback", "fallback:", "fallback:a b", "best:a"])
def test_a_text_that_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"--on-unknown: .*; give abstain, best or"):
        RejectionPolicy.parse(text, "--on-unknown")


def test_only_a_fallback_names_a_task() -> None:
    with pytest.raises(InvalidInputError, match="fallback task: help; leave it out"):
        RejectionPolicy(OnUnknown.BEST, "help")
    with pytest.raises(InvalidInputError, match="task name"):
        RejectionPolicy(OnUnknown.FALLBACK)


@pytest.mark.parametrize(
    ("policy", "used", "use"),
    [
        ("abstain", None, Use.ABSTAINED),
        ("best", A, Use.BEST_ANYWAY),
        ("fallback:help", HELP, Use.FALLBACK),
    ],
)
def test_the_policy_says_what_is_used_for_an_unknown_input(
    policy: str, used: TaskKey | None, use: Use
) -> None:
    before = decision(0.4, 0.1)
    after = RejectionPolicy.parse(policy).apply(before, A, HELP)
    assert (after.used, after.use) == (used, use)
    # The verdict itself is the same.
    assert (after.outcome, after.task, after.score) == (Outcome.UNKNOWN, None, before.score)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_input_that_fits_is_used_for_what_it_fits_under_every_policy(policy: str) -> None:
    for scores, use in (((0.9, 0.1), Use.MATCHED), ((0.9, 0.85), Use.BEST_OF_AMBIGUOUS)):
        after = RejectionPolicy.parse(policy).apply(decision(*scores), A, HELP)
        assert (after.used, after.use) == (A, use)


def test_nothing_is_used_where_there_is_nothing_to_use() -> None:
    empty = decide((), ambiguity_margin=0.0, revision=1)
    best = RejectionPolicy(OnUnknown.BEST).apply(empty, None, None)
    assert (best.used, best.use) == (None, Use.NO_TASKS)
    fallback = RejectionPolicy(OnUnknown.FALLBACK, "help").apply(empty, None, None)
    assert (fallback.used, fallback.use) == (None, Use.FALLBACK_MISSING)


def test_the_policy_of_a_catalog_is_served_with_its_revision(workshop: Workshop) -> None:
    assert str(served(workshop).rejection) == "abstain"
    change = PolicyChange(on_unknown=RejectionPolicy.parse("fallback:help"))
    published = workshop.publish("policy", live={}, change=change)
    assert workshop.catalog.revision(published.revision).policy.on_unknown == "fallback:help"
    # It stays when other things are published.
    publish(workshop, "music")
    snapshot = served(workshop)
    decided = unknown(snapshot, snapshot.rejection)
    assert (str(decided.used), decided.use) == ("help@1", Use.FALLBACK)


def test_a_fallback_that_is_not_live_is_refused_when_it_is_set(workshop: Workshop) -> None:
    retire(workshop, "sport")
    for name in ("nobody", "sport"):
        change = PolicyChange(on_unknown=RejectionPolicy(OnUnknown.FALLBACK, name))
        with pytest.raises(TaskNotFoundError, match=f"fallback task: {name}; name a live task"):
            workshop.publish("policy", live={}, change=change)
    assert workshop.catalog.newest_revision() == 2


def test_a_fallback_that_is_retired_later_leaves_unknown_inputs_without_a_task(
    workshop: Workshop,
) -> None:
    change = PolicyChange(on_unknown=RejectionPolicy(OnUnknown.FALLBACK, "help"))
    workshop.publish("policy", live={}, change=change)
    retire(workshop, "help")
    snapshot = served(workshop)
    decided = unknown(snapshot, snapshot.rejection)
    assert (decided.used, decided.use) == (None, Use.FALLBACK_MISSING)
    restore(workshop, "help")
    snapshot = served(workshop)
    assert unknown(snapshot, snapshot.rejection).use is Use.FALLBACK
