"""What a real server does with bad input, and what it logs; only the models are fakes."""

from __future__ import annotations

import grpc
import pytest

from router.v1 import router_service_pb2 as messages
from tests.calls import TIMEOUT, Serving, assert_invalid, failed, generate, reason, route
from tests.fakes import make_settings


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (route(""), "text"),
        (route(" \n\t"), "text"),
        (route("x" * (33 * 1024)), "text"),
        (route("a\0b"), "text"),
        (route("x", top_k=-1), "top_k"),
        (route("x", top_k=101), "top_k"),
    ],
)
def test_a_bad_route_request_is_refused_by_field(
    serving: Serving, request_: messages.RouteRequest, field: str
) -> None:
    assert_invalid(lambda: serving.router.Route(request_, timeout=TIMEOUT), field)


def test_the_refusal_names_the_value_and_the_remedy(serving: Serving) -> None:
    request = route("ä" * (17 * 1024))
    message = assert_invalid(lambda: serving.router.Route(request, timeout=TIMEOUT), "text")
    assert message == "text: 34816 bytes; send at most 32768 bytes of UTF-8"


@pytest.mark.parametrize(
    ("texts", "field"), [([], "texts"), (["x"] * 257, "texts"), (["x", "y", "", "z"], "texts[2]")]
)
def test_a_bad_batch_is_refused_by_field(serving: Serving, texts: list[str], field: str) -> None:
    request = messages.BatchRouteRequest(texts=texts)
    assert_invalid(lambda: serving.router.BatchRoute(request, timeout=TIMEOUT), field)


def test_bytes_that_are_not_utf8_are_refused_by_field(serving: Serving) -> None:
    message = assert_invalid(
        lambda: serving.raw("Route")(b"\x0a\x04ab\xff\xfe", timeout=TIMEOUT), "text"
    )
    assert "at byte 2" in message
    second = b"\x0a\x02ok" + b"\x0a\x02\xc3\x28"
    assert_invalid(lambda: serving.raw("BatchRoute")(second, timeout=TIMEOUT), "texts[1]")


def test_bytes_that_are_no_message_are_refused(serving: Serving) -> None:
    assert_invalid(lambda: serving.raw("Route")(b"\xff\xff\xff", timeout=TIMEOUT), "request")


def test_a_message_of_5_megabytes_is_refused_with_the_limit(serving: Serving) -> None:
    request = route("x" * 5_000_000)
    message = assert_invalid(lambda: serving.router.Route(request, timeout=TIMEOUT), "text")
    assert "5000000 bytes" in message


def test_a_message_over_the_request_limit_is_refused_unparsed(serving: Serving) -> None:
    request = route("x" * (serving.settings.limits.max_request_bytes + 1))
    assert_invalid(lambda: serving.router.Route(request, timeout=TIMEOUT), "request")


def test_a_message_over_the_transports_cap_is_refused_by_grpc(serving: Serving) -> None:
    request = route("x" * (3 * serving.settings.limits.max_request_bytes))
    error, _ = failed(lambda: serving.router.Route(request, timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert serving.router.Route(route("weather"), timeout=TIMEOUT).decision.task == "weather"


def test_a_full_batch_of_the_longest_texts_fits_a_request(serving: Serving) -> None:
    limits = serving.settings.limits
    text = "weather " * (limits.max_text_bytes // 8)
    request = messages.BatchRouteRequest(texts=[text] * limits.max_batch_texts)
    response = serving.router.BatchRoute(request, timeout=TIMEOUT)
    assert len(response.decisions) == limits.max_batch_texts


def test_a_defect_is_internal_and_tells_the_client_nothing(
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    serving.encoder.broken = RuntimeError("secret text of a caller")
    error, status = failed(lambda: serving.router.Route(route("weather"), timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert reason(status) == "INTERNAL"
    assert "secret" not in repr(error)
    assert "Traceback" not in repr(error)
    assert ".py" not in repr(error)
    logged = "".join(capsys.readouterr())
    assert "RuntimeError" in logged
    assert "tests/fakes.py" in logged
    assert "secret" not in logged


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("order-7/step:2", True), ("", False), ("two words", False), ("x" * 129, False)],
)
def test_a_call_that_fails_is_named_by_its_request_id(
    serving: Serving, capsys: pytest.CaptureFixture[str], sent: str, kept: bool
) -> None:
    serving.encoder.broken = RuntimeError("a defect")
    metadata = [("x-request-id", sent)] if sent else []
    error, _ = failed(
        lambda: serving.router.Route(route("weather"), timeout=TIMEOUT, metadata=metadata)
    )
    trailers = dict(error.trailing_metadata())
    assert (trailers["x-request-id"] == sent) is kept
    assert trailers["x-request-id"] in "".join(capsys.readouterr())


def test_calls_are_logged_where_that_is_asked_for_and_texts_never(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Serving(make_settings(log_calls=True)) as serving:
        metadata = [("x-request-id", "order-7")]
        serving.router.Route(route("secret weather"), timeout=TIMEOUT, metadata=metadata)
        generate(serving, "a secret story")
        failed(lambda: serving.router.Route(route(""), timeout=TIMEOUT))
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if "request_id" in line]
    assert len(lines) == 3
    for line, parts in zip(
        lines,
        (["order-7", "Route", "OK"], ["Generate", "OK"], ["Route", "INVALID_ARGUMENT"]),
        strict=True,
    ):
        assert all(part in line for part in parts), line
        assert "milliseconds" in line
        assert "secret" not in line


def test_without_being_asked_the_server_logs_no_calls(
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    serving.router.Route(route("weather"), timeout=TIMEOUT)
    assert "request_id" not in "".join(capsys.readouterr())
