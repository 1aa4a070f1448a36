"""Hostile input: whatever comes in, what comes out is an answer or an error of ours.

`make fuzz` tries many more examples than a plain run of the tests.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.numpy import save

from router.access import TokenFile, read_tokens
from router.artifacts import ArtifactReader
from router.errors import (
    CorruptArtifactError,
    ForbiddenError,
    InvalidInputError,
    UnauthenticatedError,
)
from router.roles import Role
from router.v1 import router_service_pb2 as messages
from router.v1 import task_service_pb2 as task_messages
from tests.fakes import FakeLanguageModel, make_router, running_server
from trainer.cli.configuration import read_settings
from trainer.data import read_labelled
from trainer.manifest import read_manifest

ROWS = [{"input": f"text, number {n}", "output": "ab"[n % 2]} for n in range(8)]
# A function-scoped folder is written anew by every example, which is what is wanted here.
anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# What a call may end with, whatever was sent. INTERNAL and UNKNOWN would be defects of ours.
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@st.composite
def mutated(draw: st.DrawFn, contents: list[bytes]) -> bytes:
    """One of `contents` with some pieces cut out, repeated, or replaced by random bytes."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 4))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 16)))
        piece = bytes(content[begin:end])
        content[begin:end] = draw(
            st.one_of(
                st.just(b""),
                st.just(piece * 2),
                st.binary(max_size=16),
                st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")),
            )
        )
    return bytes(content)


# ---- bytes on the wire

REQUESTS: dict[str, list[bytes]] = {
    "router.v1.RouterService/Route": [
        messages.RouteRequest(text="weather", top_k=2).SerializeToString()
    ],
    "router.v1.RouterService/BatchRoute": [
        messages.BatchRouteRequest(texts=["weather", "sport"], top_k=1).SerializeToString()
    ],
    "router.v1.RouterService/StreamRoute": [
        messages.StreamRouteRequest(text="weather", id="1").SerializeToString()
    ],
    "router.v1.RouterService/Generate": [
        messages.GenerateRequest(
            text="a story", task="story", context=["once"], max_output_tokens=3
        ).SerializeToString()
    ],
    "router.v1.RouterService/GetSoftPrompt": [
        messages.GetSoftPromptRequest(task="weather").SerializeToString()
    ],
    "router.v1.RouterService/GetStatus": [b""],
    "router.v1.TaskService/GetTask": [
        task_messages.GetTaskRequest(name="weather").SerializeToString()
    ],
    "router.v1.TaskService/ListTasks": [
        task_messages.ListTasksRequest(page_size=2, page_token="dGFzazo=").SerializeToString()
    ],
}


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with (
        running_server(make_router(model=FakeLanguageModel())) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield channel
        # It serves as before, whatever it was sent.
        route = channel.unary_unary("/router.v1.RouterService/Route")
        assert route(messages.RouteRequest(text="weather").SerializeToString(), timeout=10)


@pytest.mark.parametrize("method", REQUESTS)
def test_no_bytes_make_a_call_end_with_anything_but_an_answer_or_a_refusal(
    channel: grpc.Channel, method: str
) -> None:
    call = channel.stream_stream(f"/{method}")

    @given(st.one_of(mutated(REQUESTS[method]), st.binary(max_size=64)))
    def send(raw: bytes) -> None:
        running = call(iter([raw]), timeout=20)
        with contextlib.suppress(grpc.RpcError):
            list(running)
        assert running.code() in EXPECTED, (running.code(), running.details(), raw)

    send()


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_token_but_a_known_one_is_let_in(name: str, token: str) -> None:
    known = TokenFile.__new__(TokenFile)
    known._tokens, known._looked = {}, float("inf")
    for value in (token, f"Bearer {token}", f"bearer{token}"):
        with pytest.raises((UnauthenticatedError, ForbiddenError)):
            known.check(Role.ROUTE, [(name, value), ("authorization", value)])


# ---- files


def _csv() -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["input", "output"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def _parquet() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
DATA = {
    "rows.jsonl": [JSONL, b'{"input": "a", "output": NaN}\n' * 2],
    "rows.jsonl.gz": [gzip.compress(JSONL)],
    "rows.csv": [_csv()],
    "rows.parquet": [_parquet()],
}


@pytest.mark.parametrize("name", DATA)
def test_no_data_file_does_more_than_be_read_or_be_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name

    @anew
    @given(mutated(DATA[name]))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(InvalidInputError):
            file = read_labelled(path)
            assert len(file.examples) >= 2
            assert all(example.input.strip() for example in file.examples)

    read()


TOKENS = {"tokens": [{"name": "shop", "sha256": "0" * 64, "roles": ["route", "read"]}]}
MANIFEST = {"tasks": [{"name": "weather", "data": "a.csv", "revise": True, "force": "why"}]}
SETTINGS = {"listen": "127.0.0.1:1", "max-calls": 3, "home": "there"}
YAML_FILES: list[tuple[Callable[[Path], object], dict[str, object]]] = [
    (read_tokens, dict(TOKENS)),
    (read_manifest, dict(MANIFEST)),
    (lambda path: read_settings(path, {"listen", "max_calls", "home"}), SETTINGS),
]


@pytest.mark.parametrize(("read", "document"), YAML_FILES, ids=["tokens", "manifest", "settings"])
def test_no_yaml_file_does_more_than_be_read_or_be_refused(
    tmp_path: Path, read: Callable[[Path], object], document: dict[str, object]
) -> None:
    path = tmp_path / "file.yaml"
    contents = [
        yaml.safe_dump(document).encode(),
        json.dumps(document).encode(),
        b"a: &a [*a]\nb: !!python/name:os.system\n? [x]\n: 2024-13-45\n",
    ]

    @anew
    @given(mutated(contents))
    def look(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(InvalidInputError):
            read(path)

    look()


ARTIFACT = save({"prompt": np.ones((3, 4), np.float32), "other": np.ones(2, np.int16)})


def test_no_stored_file_does_more_than_be_read_or_be_called_corrupt(tmp_path: Path) -> None:
    reader = ArtifactReader(tmp_path)

    @anew
    @given(mutated([ARTIFACT]))
    def read(content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()  # as if somebody had stored it
        reader.path(digest).parent.mkdir(exist_ok=True)
        reader.path(digest).write_bytes(content)
        with contextlib.suppress(CorruptArtifactError):
            matrix = reader.read_tensor(digest, "prompt", np.float32, 4)
            assert np.isfinite(matrix).all()

    read()
