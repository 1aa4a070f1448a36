"""Decisions of a real server over a real channel; only the models are fakes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest

from router.rejection import OnUnknown, RejectionPolicy
from router.v1 import decision_pb2
from router.v1 import router_service_pb2 as messages
from tests.calls import TIMEOUT, Serving, failed, read_one, reason, route
from tests.fakes import TASKS, make_snapshot


def test_a_text_is_routed_to_the_task_that_it_fits(serving: Serving) -> None:
    response = serving.router.Route(route("weather tomorrow", top_k=2), timeout=TIMEOUT)
    decision = response.decision
    assert decision.outcome == decision_pb2.OUTCOME_MATCHED
    assert (decision.task, decision.task_revision) == ("weather", 1)
    assert decision.score == pytest.approx(0.5**0.5)
    assert decision.threshold == pytest.approx(0.3)
    assert decision.margin == pytest.approx(decision.score)
    assert response.revision == decision.revision == 3
    first, _ = decision.candidates
    assert first.task == "weather"
    assert not decision.truncated


def test_that_no_task_fits_is_a_decision_and_not_an_error(serving: Serving) -> None:
    decision = serving.router.Route(route("tax law"), timeout=TIMEOUT).decision
    assert decision.outcome == decision_pb2.OUTCOME_UNKNOWN
    assert decision.task == ""
    assert not decision.candidates


def test_two_tasks_that_fit_about_equally_are_ambiguous(serving: Serving) -> None:
    decision = serving.router.Route(route("weather sport"), timeout=TIMEOUT).decision
    assert decision.outcome == decision_pb2.OUTCOME_AMBIGUOUS
    assert decision.task in {"weather", "sport"}


def with_policy(text: str, action: str, fallback: str = "") -> messages.RouteRequest:
    policy = decision_pb2.RejectionPolicy(
        action=f"REJECTION_ACTION_{action}",  # type: ignore[arg-type]
        fallback_task=fallback,
    )
    return messages.RouteRequest(text=text, on_unknown=policy)


def test_a_request_says_which_task_is_used_for_a_text_that_fits_none(serving: Serving) -> None:
    for action, fallback, used, use in (
        ("UNSPECIFIED", "", "", decision_pb2.USE_ABSTAINED),
        ("ABSTAIN", "", "", decision_pb2.USE_ABSTAINED),
        ("FALLBACK", "story", "story", decision_pb2.USE_FALLBACK),
        ("BEST", "", "sport", decision_pb2.USE_BEST_ANYWAY),
    ):
        # One word of twelve: nearest to sport, and under its threshold.
        text = "sport and tax law of the land that we all live in"
        request = with_policy(text, action, fallback)
        response = serving.router.Route(request, timeout=TIMEOUT)
        decision = response.decision
        assert decision.outcome == decision_pb2.OUTCOME_UNKNOWN
        assert (decision.task, decision.used_task, decision.use) == ("", used, use)
        assert decision.used_task_revision == bool(used)
        assert not decision.candidates


def test_a_text_that_fits_is_not_touched_by_a_policy(serving: Serving) -> None:
    decision = serving.router.Route(with_policy("weather", "BEST"), timeout=TIMEOUT).decision
    assert (decision.used_task, decision.use) == ("weather", decision_pb2.USE_MATCHED)
    both = with_policy("weather sport", "FALLBACK", "story")
    decision = serving.router.Route(both, timeout=TIMEOUT).decision
    assert decision.outcome == decision_pb2.OUTCOME_AMBIGUOUS
    assert (decision.used_task, decision.use) == (decision.task, decision_pb2.USE_BEST_OF_AMBIGUOUS)


def test_a_catalogs_policy_holds_unless_the_request_has_one(serving: Serving) -> None:
    to_story = RejectionPolicy(OnUnknown.FALLBACK, "story")
    serving.live.snapshot = replace(make_snapshot(), rejection=to_story)
    policy = with_policy("", "ABSTAIN").on_unknown
    texts = ["tax law", "weather"]
    for asked, used in ((None, ["story", "weather"]), (policy, ["", "weather"])):
        batch = messages.BatchRouteRequest(texts=texts, on_unknown=asked)
        response = serving.router.BatchRoute(batch, timeout=TIMEOUT)
        assert [decision.used_task for decision in response.decisions] == used
        stream = [messages.StreamRouteRequest(text=text, on_unknown=asked) for text in texts]
        responses = list(serving.router.StreamRoute(iter(stream), timeout=TIMEOUT))
        assert [response.decision.used_task for response in responses] == used


def test_a_catalogs_fallback_that_was_retired_is_told_and_is_no_error(serving: Serving) -> None:
    gone = RejectionPolicy(OnUnknown.FALLBACK, "retired")
    serving.live.snapshot = replace(make_snapshot(), rejection=gone)
    decision = serving.router.Route(route("tax law"), timeout=TIMEOUT).decision
    assert (decision.used_task, decision.use) == ("", decision_pb2.USE_FALLBACK_MISSING)
    status = serving.router.GetStatus(messages.GetStatusRequest(), timeout=TIMEOUT)
    assert (status.on_unknown, status.fallback_missing) == ("fallback:retired", True)
    request = messages.GenerateRequest(text="tax law")
    *_, summary = serving.router.Generate(request, timeout=TIMEOUT)
    assert summary.summary.finish_reason == messages.FINISH_REASON_NO_TASK


def test_a_requests_fallback_that_does_not_exist_is_not_found(serving: Serving) -> None:
    request = with_policy("weather", "FALLBACK", "nobody")
    error, status = failed(lambda: serving.router.Route(request, timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert reason(status) == "TASK_NOT_FOUND"
    assert "on_unknown.fallback_task: nobody" in status.message


def test_a_bad_policy_in_a_stream_is_an_error_of_its_own(serving: Serving) -> None:
    bad = decision_pb2.RejectionPolicy(fallback_task="story")
    requests = [
        messages.StreamRouteRequest(text="tax law", on_unknown=bad, id="bad"),
        messages.StreamRouteRequest(text="tax law", id="good"),
    ]
    first, second = serving.router.StreamRoute(iter(requests), timeout=TIMEOUT)
    assert (first.id, first.error.field) == ("bad", "on_unknown.action")
    assert second.decision.outcome == decision_pb2.OUTCOME_UNKNOWN


def test_an_unknown_text_is_answered_under_the_task_of_the_policy(serving: Serving) -> None:
    policy = with_policy("", "FALLBACK", "weather").on_unknown
    request = messages.GenerateRequest(text="snow on tax law", on_unknown=policy)
    first, piece, last = serving.router.Generate(request, timeout=TIMEOUT)
    assert first.decision.outcome == decision_pb2.OUTCOME_UNKNOWN
    assert (first.decision.used_task, piece.piece) == ("weather", "snow")
    assert last.summary.finish_reason == messages.FINISH_REASON_LABEL


def test_truncation_to_the_encoders_window_is_reported(serving: Serving) -> None:
    decision = serving.router.Route(route("weather " * 300), timeout=TIMEOUT).decision
    assert decision.truncated


def test_a_catalog_without_tasks_answers_unknown() -> None:
    with Serving() as serving:
        serving.live.snapshot = replace(make_snapshot(), revision=0)
        empty = make_snapshot(revision=0).head
        serving.live.snapshot = make_snapshot(revision=0).build(
            0,
            replace(
                empty, tasks=(), thresholds=(), rows=empty.rows[:0], row_task=empty.row_task[:0]
            ),
            {},
        )
        decision = serving.router.Route(route("weather", top_k=3), timeout=TIMEOUT).decision
        assert decision.outcome == decision_pb2.OUTCOME_UNKNOWN


def test_a_batch_is_decided_in_its_order_at_one_revision(serving: Serving) -> None:
    texts = [f"{name} number {n}" for n in range(85) for name in TASKS]
    response = serving.router.BatchRoute(
        messages.BatchRouteRequest(texts=texts, top_k=1), timeout=TIMEOUT
    )
    assert [decision.task for decision in response.decisions] == list(TASKS) * 85
    assert {decision.revision for decision in response.decisions} == {response.revision} == {3}


def test_500_texts_of_a_stream_are_answered_in_order_and_share_batches(serving: Serving) -> None:
    names = [list(TASKS)[n % 3] for n in range(500)]

    def requests() -> Iterator[messages.StreamRouteRequest]:
        serving.encoder.blocked.clear()
        for n, name in enumerate(names):
            if n == 40:  # texts gather behind the first one, however slowly they come
                while serving.served.queued["routing"] < 40:
                    time.sleep(0.001)
                serving.encoder.blocked.set()
            yield messages.StreamRouteRequest(text=f"{name} {n}", id=str(n))

    responses = list(serving.router.StreamRoute(requests(), timeout=TIMEOUT))
    assert [response.id for response in responses] == [str(n) for n in range(500)]
    assert [response.decision.task for response in responses] == names
    assert [len(batch) for batch in serving.encoder.batches[:2]] == [1, 32]


def test_a_bad_text_in_a_stream_gets_an_error_of_its_own(serving: Serving) -> None:
    good = messages.StreamRouteRequest(text="weather", id="good").SerializeToString()
    not_utf8 = b"\x0a\x02\xff\xfe\x1a\x03bad"
    requests = [
        good,
        messages.StreamRouteRequest(text=" ", id="empty").SerializeToString(),
        not_utf8,
        messages.StreamRouteRequest(text="x", top_k=-1, id="k").SerializeToString(),
        good,
    ]
    stream = serving.channel.stream_stream(
        "/router.v1.RouterService/StreamRoute", None, messages.StreamRouteResponse.FromString
    )
    responses = list(stream(iter(requests), timeout=TIMEOUT))
    assert [response.id for response in responses] == ["good", "empty", "bad", "k", "good"]
    assert [response.error.field for response in responses] == ["", "text", "text", "top_k", ""]
    assert {response.error.reason for response in responses[1:4]} == {"INVALID_INPUT"}
    assert responses[4].decision.task == "weather"
    assert all(response.revision == 3 for response in responses)


def test_a_stream_that_is_abandoned_leaves_nothing_behind(serving: Serving) -> None:
    def endless() -> Iterator[messages.StreamRouteRequest]:
        while True:
            yield messages.StreamRouteRequest(text="weather")

    call = serving.router.StreamRoute(endless(), timeout=TIMEOUT)
    for _ in range(10):
        read_one(call)
    call.cancel()  # type: ignore[no-untyped-call]
    assert serving.router.Route(route("sport"), timeout=TIMEOUT).decision.task == "sport"
