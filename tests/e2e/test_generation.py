"""Free text over a real channel: answers of several tasks are written side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest

from router.backends.language_model import load_language_model
from router.backends.torch_model import TorchLanguageModel
from router.batching import BatchLimits
from router.interfaces import PromptedInput
from router.tasks import ServedTask
from router.v1 import router_service_pb2 as messages
from tests.calls import Serving, assert_overloaded, failed, read_one, start_generating
from tests.fakes import make_settings, make_snapshot, make_task
from tests.unit.small_models import KINDS, save_small_model

ONE_PLACE = BatchLimits(queue_items=2, batch_items=1, batch_tokens=4096)
# Names that no text below holds by chance.
STORY, POEM = "story", "poem"


@pytest.fixture
def serving() -> Iterator[Serving]:
    """Two tasks of free text, over a model that takes a step when a test says so."""
    with Serving() as serving:
        begin_tasks(serving)
        yield serving


def begin_tasks(serving: Serving) -> None:
    serving.live.snapshot = make_snapshot(
        tasks=[make_task(name, None, number) for number, name in enumerate((STORY, POEM))]
    )
    serving.model.slow = True


def write(serving: Serving, text: str, task: str) -> grpc.CallIterator[messages.GenerateResponse]:
    """A call that has begun: its decision was read."""
    call = start_generating(serving, text, task=task)
    assert read_one(call).HasField("decision")
    return call


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_second_answer_begins_before_the_first_one_ends(serving: Serving) -> None:
    first = write(serving, "one two three four five six", STORY)
    serving.model.steps.release(2)
    assert [read_one(first).piece for _ in range(2)] == ["ONE ", "TWO "]
    second = write(serving, "red blue", POEM)
    wait_for(lambda: serving.served.queued["generating"] == 2)
    serving.model.steps.release(2)
    assert read_one(second).piece == "RED "
    # Nothing lets the first one end before this.
    serving.model.steps.release(20)
    assert "".join(event.piece for event in second) == "BLUE "
    assert "".join(event.piece for event in first) == "THREE FOUR FIVE SIX "
    assert [[float(row.prompt[0, 0]) for row in batch] for batch in serving.model.batches] == [
        [0.0],
        [1.0],
    ]


def test_a_cancelled_call_frees_its_place_at_once() -> None:
    with Serving(make_settings(answer_batches=ONE_PLACE)) as serving:
        begin_tasks(serving)
        long = write(serving, "many words " * 50, STORY)
        serving.model.steps.release()
        assert read_one(long).piece == "MANY "
        waiting = write(serving, "red", POEM)
        wait_for(lambda: serving.served.queued["generating"] == 2)
        long.cancel()  # type: ignore[no-untyped-call]
        wait_for(lambda: serving.served.queued["generating"] == 1)
        # The step that was running as the caller left, and one of the next row.
        serving.model.steps.release(2)
        assert read_one(waiting).piece == "RED "
        assert serving.model.stopped_rows == ["many words " * 50]


def test_a_deadline_frees_the_place_of_its_call() -> None:
    with Serving(make_settings(answer_batches=ONE_PLACE)) as serving:
        begin_tasks(serving)
        request = messages.GenerateRequest(text="many words " * 50, task=STORY)
        error, _ = failed(lambda: list(serving.router.Generate(request, timeout=0.3)))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_for(lambda: serving.served.queued["generating"] == 0)
        waiting = write(serving, "red", POEM)
        serving.model.steps.release(2)
        assert read_one(waiting).piece == "RED "
        assert serving.model.stopped_rows == ["many words " * 50]


def test_a_row_that_fails_leaves_the_others(serving: Serving) -> None:
    serving.model.broken = {"bad text"}
    good = write(serving, "one two three", STORY)
    serving.model.steps.release()
    assert read_one(good).piece == "ONE "
    bad = write(serving, "bad text", POEM)
    wait_for(lambda: serving.served.queued["generating"] == 2)
    serving.model.steps.release()
    error, _ = failed(lambda: list(bad))
    assert error.code() is grpc.StatusCode.INTERNAL
    serving.model.steps.release(10)
    assert "".join(event.piece for event in good) == "TWO THREE "


def test_too_many_answers_are_refused_with_when_to_come_back() -> None:
    with Serving(make_settings(answer_batches=ONE_PLACE)) as serving:
        begin_tasks(serving)
        calls = [write(serving, "one two", STORY) for _ in range(2)]
        wait_for(lambda: serving.served.queued["generating"] == 2)
        assert_overloaded(lambda: list(start_generating(serving, "one more", task=POEM)))
        serving.model.steps.release(20)
        assert ["".join(event.piece for event in call) for call in calls] == ["ONE TWO "] * 2


# ---- with real base models


@pytest.fixture(scope="module", params=KINDS)
def base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TorchLanguageModel:
    folder = save_small_model(request.param, tmp_path_factory.mktemp(request.param))
    model = load_language_model(folder, device="cpu", precision="float32", threads=1)
    model.network.double()  # sums in another order must not change a token
    return model


def real_task(base: TorchLanguageModel, number: int) -> ServedTask:
    task = make_task(f"task{number}", None)
    assert task.prompt is not None
    random = np.random.default_rng(number)
    scale = float(base.embedding.std())
    values = random.normal(0, scale, (3 + number, base.hidden_size)).astype(np.float32)
    return replace(task, prompt=replace(task.prompt, values=values))


def test_answers_of_many_tasks_at_once_are_those_of_one_at_a_time(base: TorchLanguageModel) -> None:
    tasks = [real_task(base, number) for number in range(6)]
    texts = ["bad book", "the quick brown fox jumps over the lazy dog", "a good film"]
    asked = [(task, text, 2 + 3 * n) for n, task in enumerate(tasks) for text in texts]
    few_places = BatchLimits(queue_items=64, batch_items=5, batch_tokens=4096)
    with Serving(make_settings(answer_batches=few_places), base) as serving:
        serving.live.snapshot = make_snapshot(tasks=tasks)
        calls = [
            start_generating(serving, text, task=task.record.name, max_output_tokens=length)
            for task, text, length in asked
        ]
        answers = [list(call) for call in calls]
    for (task, text, length), (_, *pieces, last) in zip(asked, answers, strict=True):
        assert task.prompt is not None
        [alone] = base.generate([PromptedInput(text, task.prompt.values)], length)
        assert "".join(event.piece for event in pieces) == alone.text
        assert last.summary.output_tokens == alone.output_tokens
