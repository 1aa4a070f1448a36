"""`make soak` in short: a real server under a mixed load while the catalog moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from router.backends.language_model import load_language_model
from router.backends.onnx_encoder import OnnxMiniLM
from router.decision import Candidate, Decision, Outcome, Use
from router.tasks import TaskKey
from router.v1 import decision_pb2
from tests.benchmarks.catalog_model import CatalogModel, tasks_of
from tests.benchmarks.load import Call, Result, percentile
from tests.benchmarks.serving_homes import example_requests, write_examples
from tests.benchmarks.soak import MOST_GROWTH, Findings, Soak, holds, report, same_decision
from tests.catalogs import new_workshop, publish
from tests.unit.small_models import save_small_model
from trainer.commands import RegisterTask
from trainer.data import Example, read_labelled


def test_a_mixed_load_sees_no_error_and_no_half_loaded_revision_while_the_catalog_moves(
    tmp_path: Path, encoder: OnnxMiniLM
) -> None:
    folder = save_small_model("bart", tmp_path / "base")
    base = load_language_model(folder, device="cpu", threads=1)
    tasks = [
        replace(task, data=write_examples(tmp_path / task.data.name, _first_rows(task)))
        for task in example_requests()[:5]
    ]
    soak = Soak(tmp_path / "home", encoder, base, str(folder), tasks)
    findings = soak.run(seconds=4.0, publish_every=0.3)
    assert holds(findings, may_refuse=True), report(findings, 4.0)
    # How many there were depends on the machine.
    assert sum(findings.publishes.values()) >= 1


def _first_rows(task: RegisterTask) -> Sequence[Example]:
    return read_labelled(task.data).examples[:24]


def test_the_model_finds_what_was_not_live_at_a_revision(tmp_path: Path) -> None:
    with new_workshop(tmp_path) as workshop:
        publish(workshop, "weather")
        workshop.publish("retire", live={"weather": None})
    model = CatalogModel(tmp_path)
    assert model.problem(1, "weather@1") == ""
    assert model.problem(2, "") == ""
    assert model.problem(2, "weather@1") == "weather@1 not live at revision 2"
    assert model.problem(1, "weather@2") == "weather@2 not live at revision 1"
    assert model.problem(3, "") == "revision 3 is not in the catalog"
    assert model.problem(0, "") == "revision 0 is not in the catalog"


def test_all_tasks_of_a_response_are_looked_at() -> None:
    found = decision_pb2.Decision(task="b", task_revision=2, used_task="b", used_task_revision=2)
    used = decision_pb2.Decision(used_task="a", used_task_revision=1)
    assert tasks_of([found, used]) == "a@1 b@2"


@pytest.mark.parametrize(("a_second", "fails"), [(0.0, False), (0.01, False), (0.2, True)])
def test_memory_that_grows_in_the_second_half_is_found(a_second: float, *, fails: bool) -> None:
    findings = Findings(revisions_seen={1, 2}, decisions_compared=1)
    findings.calls.update(("Route", "BatchRoute", "StreamRoute", "Generate"))
    # Memory that is taken in the beginning is warming up.
    findings.memory = [(t, 400.0 + min(t, 100.0) + a_second * t) for t in range(600)]
    growth = findings.growth()
    assert growth is not None
    assert (growth > MOST_GROWTH) is fails
    assert holds(findings) is not fails


def test_a_refusal_fails_a_soak_unless_the_machine_may_be_busy() -> None:
    findings = Findings(revisions_seen={1, 2}, decisions_compared=1)
    findings.calls.update(("Route", "BatchRoute", "StreamRoute", "Generate"))
    findings.refused["Route"] = 1
    assert not holds(findings)
    assert holds(findings, may_refuse=True)
    findings.calls["Route"] = 0
    assert not holds(findings, may_refuse=True)


def test_a_soak_that_checked_nothing_does_not_hold() -> None:
    assert not holds(Findings())


def test_decisions_of_two_revisions_are_not_the_same() -> None:
    key = TaskKey("weather", 1)
    one = Decision(
        Outcome.MATCHED, key, 1.0, 0.5, 0.2, 7, False, (Candidate(key, 1.0, 0.2),), key, Use.MATCHED
    )
    assert same_decision(one, replace(one, score=1.00001))
    assert not same_decision(one, replace(one, score=1.01))
    assert not same_decision(one, replace(one, revision=8))
    assert not same_decision(one, replace(one, outcome=Outcome.UNKNOWN, task=None))


def test_a_result_counts_what_ended_within_the_measured_time() -> None:
    calls = [Call(0, 1, 1, "OK"), Call(1, 3, 2, "OK"), Call(2, 4, 1, "RESOURCE_EXHAUSTED")]
    result = Result([*calls, Call(3, 6, 1, "OK")], 2.0, 5.0)
    assert result.rate == pytest.approx(2 / 3)
    assert result.codes == {"OK": 1, "RESOURCE_EXHAUSTED": 1}
    assert result.times() == [2]
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([1.0], 0.99) == 1.0
