"""The demo when a task is refused: it says so, counts the task's inputs as wrong, and goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pytest

from router.client import RouterClient
from router.errors import PromptyardError, RefusedError
from tests.fakes import FakeLanguageModel, make_router, make_task, running_server
from trainer.admission import Registered
from trainer.cli.demo import print_result
from trainer.demo import ask_all
from trainer.demo_result import Answered, DemoResult, HeldOut, LiveRegistration, check

REFUSAL = RefusedError("prompt of refunds", "52 % right, majority 55 %", "give more rows")
ROWS = [
    HeldOut("weather", "the weather brings rain", "rain"),
    HeldOut("sport", "the sport needs a goal", "goal"),
    # Of a task that was refused; another task answers it, with the right word by chance.
    HeldOut("refunds", "the weather and the sun", "sun"),
]


@pytest.fixture(scope="module")
def answered() -> Iterator[list[Answered]]:
    with (
        running_server(make_router(model=FakeLanguageModel())) as address,
        RouterClient(address) as client,
    ):
        yield ask_all(client, ROWS)


def demo_result(
    answered: list[Answered],
    failures: Mapping[str, PromptyardError],
    live_failures: Mapping[str, PromptyardError],
) -> DemoResult:
    records = tuple(make_task(name, ("a", "b")).record for name in ("weather", "sport"))
    live = LiveRegistration(
        task="late",
        failures=live_failures,
        seconds_to_serve=math.inf if live_failures else 0.1,
        answered=answered[:1],
        changed_files=(),
        changed_records=(),
        old_answers_changed=0,
        old_answers=len(answered),
    )
    result = DemoResult(Registered(records, failures, None), 1.0, answered, live=live)
    result.checks = check(result)
    return result


def test_inputs_of_served_tasks_are_answered_routed_and_under_their_task(
    answered: list[Answered],
) -> None:
    assert [(a.answer, a.oracle) for a in answered[:2]] == [("rain", "rain"), ("goal", "goal")]
    assert all(a.right and a.rightly_routed and a.oracle_right for a in answered[:2])


def test_a_rejected_input_is_wrong_with_rejection_and_answered_by_the_best_task_without() -> None:
    router = make_router(model=FakeLanguageModel())
    row = HeldOut("weather", "qqq the rain", "rain")
    with running_server(router) as address, RouterClient(address) as client:
        [rejected] = ask_all(client, [row])
    assert rejected.decision.used is None
    assert rejected.answer == ""
    assert rejected.routed
    assert not rejected.right


def test_inputs_of_a_refused_task_are_wrong_whatever_answers_them(
    answered: list[Answered],
) -> None:
    refused = answered[2]
    assert (refused.answer, refused.oracle) == ("sun", None)
    assert [refused.right, refused.rightly_routed, refused.oracle_right] == [False] * 3


def test_a_refusal_fails_the_demo_and_names_the_task(answered: list[Answered]) -> None:
    result = demo_result(answered, {"refunds": REFUSAL}, {})
    claims = {claim: (found, holds) for claim, found, holds in result.checks}
    assert claims["every task was registered"] == ("1 refused (refunds)", False)
    assert not result.passed


def test_a_refusal_of_the_live_task_fails_the_demo_as_well(answered: list[Answered]) -> None:
    result = demo_result(answered, {}, {"late": REFUSAL})
    claims = {claim: (found, holds) for claim, found, holds in result.checks}
    assert claims["every task was registered"] == ("1 refused (late)", False)
    assert not claims["the new task served within 2 s, without a restart"][1]


def test_without_a_refusal_every_task_counts_as_registered(answered: list[Answered]) -> None:
    result = demo_result(answered[:2], {}, {})
    assert ("every task was registered", "all", True) in result.checks


def test_the_tables_are_printed_with_the_refusal(
    answered: list[Answered], capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(demo_result(answered, {"refunds": REFUSAL}, {}), show_all=False)
    printed = " ".join(capsys.readouterr().out.split())
    assert "refunds was refused, and its inputs count as wrong" in printed
    assert "give more rows" in printed
    assert "accuracy on held-out inputs" in printed
    assert "every task was registered" in printed
