"""The whole job with real parts: register, serve, route, answer, register one more task live.

Everything that is claimed is checked, and the checks decide the exit code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from router.answer import AnswerSummary
from router.catalog import ARTIFACTS_FOLDER, CatalogReader
from router.client import RouterClient
from router.decision import Decision
from router.errors import CatalogError
from router.interfaces import Encoder, LanguageModel, PromptedInput
from router.snapshot import Snapshot
from router.tasks import TaskKey
from trainer.admission import Registered
from trainer.commands import PolicyChange, RegisterTask
from trainer.data import Example, closed_outputs, read_labelled
from trainer.demo_result import (
    MOST_SECONDS_TO_SERVE,
    Answered,
    DemoResult,
    HeldOut,
    LiveRegistration,
    OutOfScope,
    check,
    share,
)
from trainer.evaluate_routing import load_snapshot
from trainer.manifest import read_manifest
from trainer.prompt_quality import same_text
from trainer.register import Progress, register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

EXAMPLES = Path(__file__).parent / "examples"

_CALLERS = 8
_ANSWER_TOKENS = 16
_SERVER_START_SECONDS = 120.0


def run_demo(
    home: Path,
    encoder: Encoder,
    base_model: LanguageModel,
    progress: Progress,
    say: Callable[[str], None],
) -> DemoResult:
    """Do the whole job in `home`, which must be empty, and check it."""
    began = time.perf_counter()
    requests = read_manifest(EXAMPLES / "manifest.yaml")
    say(f"[1/4] registering {len(requests)} tasks, tuned together")
    with Workshop(home, encoder) as workshop:
        registered = register(
            workshop, requests, base_model, TuningSettings(), PolicyChange(), progress
        )
        result = DemoResult(registered, time.perf_counter() - began)
        say("[2/4] starting the server as a process of its own")
        with running_server(home) as address, RouterClient(address, timeout=60) as client:
            say(f"[3/4] asking it over gRPC at {address}")
            rows = _held_out(requests)
            result.answered = ask_all(client, rows)
            result.out_of_scope = _out_of_scope(client)
            result.no_prompt = _without_prompt(base_model, requests, rows)
            snapshot = load_snapshot(home, encoder, base_model.fingerprint)
            result.prompt_alone = _prompt_alone(base_model, snapshot, rows)
            result.tfidf_routing = _tfidf_routing(requests, rows)
            say("[4/4] registering one more task while the server runs")
            result.live = _register_live(workshop, base_model, client, result, progress)
    result.seconds = time.perf_counter() - began
    result.checks = check(result)
    return result


@contextmanager
def running_server(home: Path) -> Iterator[str]:
    """A real server process on a free port; yields its address.

    Raises:
        CatalogError: it did not start.
    """
    command = [sys.executable, "-m", "trainer.cli", "serve", "--listen", "127.0.0.1:0"]
    log = home / "server.log"
    server = subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--home", str(home)],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        line = server.stdout.readline() if server.stdout else ""
        if not line.startswith("listening on "):
            raise CatalogError("server", "did not start", f"its log says why: {log}")
        yield line.removeprefix("listening on ").split(",")[0]
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()


def _held_out(requests: Sequence[RegisterTask]) -> list[HeldOut]:
    return [
        HeldOut(request.name, example.input, example.output)
        for request in requests
        for example in _examples(EXAMPLES / "heldout" / f"{request.name}.jsonl")
    ]


def _examples(path: Path) -> tuple[Example, ...]:
    return read_labelled(path).examples


def ask_all(client: RouterClient, rows: Sequence[HeldOut]) -> list[Answered]:
    """Route and answer every row, and ask again under other tasks' prompts where those are meant.

    These are the best-scoring task's, where the row was rejected, and the right task's.
    """
    served = {task.name for task in client.list_tasks()}

    def ask(row: HeldOut) -> Answered:
        events = list(client.generate(row.input, top_k=2, max_output_tokens=_ANSWER_TOKENS))
        decision = next(event for event in events if isinstance(event, Decision))
        answer = _text(events)
        answers = {} if decision.used is None else {decision.used.name: answer}

        def under(task: str) -> str:
            if task not in answers:
                asked = client.generate(row.input, task=task, max_output_tokens=_ANSWER_TOKENS)
                answers[task] = _text(list(asked))
            return answers[task]

        routed = under(decision.candidates[0].task.name) if decision.candidates else ""
        oracle = under(row.task) if row.task in served else None
        return Answered(row, decision, answer, routed, oracle)

    with ThreadPoolExecutor(_CALLERS) as callers:
        return list(callers.map(ask, rows))


def _text(events: Sequence[Decision | str | AnswerSummary]) -> str:
    return "".join(event for event in events if isinstance(event, str))


def _out_of_scope(client: RouterClient) -> list[OutOfScope]:
    with (EXAMPLES / "out_of_scope.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    decisions = client.batch_route([row["input"] for row in rows], top_k=1)
    return [
        OutOfScope(row["input"], row["near"] or "", decision)
        for row, decision in zip(rows, decisions, strict=True)
    ]


def _without_prompt(
    base_model: LanguageModel, requests: Sequence[RegisterTask], rows: Sequence[HeldOut]
) -> float:
    """The share of right answers of the base model alone, with the right task's labels."""
    labels = {
        request.name: None if request.free_text else closed_outputs(_examples(request.data))
        for request in requests
    }
    return _share_right(
        base_model,
        rows,
        [PromptedInput(row.input, None) for row in rows],
        [labels.get(row.task) for row in rows],
    )


def _prompt_alone(base_model: LanguageModel, snapshot: Snapshot, rows: Sequence[HeldOut]) -> float:
    """The share of right answers under the right task's prompt, without a label classifier."""
    kept, inputs, labels = [], [], []
    for row in rows:
        task = snapshot.tasks.get(row.task)
        if task is not None and task.prompt is not None:
            kept.append(row)
            inputs.append(PromptedInput(row.input, task.prompt.values, task.prompt.method))
            labels.append(task.record.outputs)
    return _share_right(base_model, kept, inputs, labels) * len(kept) / len(rows)


def _share_right(
    base_model: LanguageModel,
    rows: Sequence[HeldOut],
    inputs: Sequence[PromptedInput],
    labels: Sequence[tuple[str, ...] | None],
) -> float:
    """The share of rows that the base model answers rightly: with one of `labels`, or freely."""
    closed = [i for i, words in enumerate(labels) if words is not None]
    free = [i for i, words in enumerate(labels) if words is None]
    choices = [labels[i] or () for i in closed]
    scores = base_model.score([inputs[i] for i in closed], choices)
    answers = {i: words[row.best] for i, words, row in zip(closed, choices, scores, strict=True)}
    written = base_model.generate([inputs[i] for i in free], _ANSWER_TOKENS)
    answers |= {i: each.text for i, each in zip(free, written, strict=True)}
    return share(same_text(answers[i], row.output) for i, row in enumerate(rows))


def _tfidf_routing(requests: Sequence[RegisterTask], rows: Sequence[HeldOut]) -> float:
    """Routing accuracy of TF-IDF and logistic regression, trained jointly on the same rows."""
    train = [(e.input, r.name) for r in requests for e in _examples(r.data)]
    classifier = make_pipeline(
        TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=10, max_iter=2000)
    )
    classifier.fit([text for text, _ in train], [name for _, name in train])
    return float(classifier.score([row.input for row in rows], [row.task for row in rows]))


def _register_live(
    workshop: Workshop,
    base_model: LanguageModel,
    client: RouterClient,
    result: DemoResult,
    progress: Progress,
) -> LiveRegistration:
    requests = read_manifest(EXAMPLES / "live.yaml")
    name = requests[0].name
    files, records = _files(workshop.home), _records(workshop.home)
    registered = register(workshop, requests, base_model, TuningSettings(), progress=progress)
    seconds = _seconds_until_served(client, registered)
    files_after, records_after = _files(workshop.home), _records(workshop.home)
    again = ask_all(client, [answered.row for answered in result.answered])
    return LiveRegistration(
        name,
        registered.failures,
        seconds,
        ask_all(client, _held_out(requests)),
        [path for path, digest in files.items() if files_after.get(path) != digest],
        [key for key, digest in records.items() if records_after.get(key) != digest],
        sum(a.oracle != b.oracle for a, b in zip(result.answered, again, strict=True)),
        len(again),
    )


def _seconds_until_served(client: RouterClient, registered: Registered) -> float:
    if registered.published is None:
        return math.inf
    published = time.perf_counter()
    while client.status().revision != registered.published.revision:
        if time.perf_counter() - published > 10 * MOST_SECONDS_TO_SERVE:
            break
        time.sleep(0.02)
    return time.perf_counter() - published


def _files(home: Path) -> dict[str, str]:
    """Digests of all prompts and routing rows."""
    folder = home / ARTIFACTS_FOLDER
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _records(home: Path) -> dict[str, str]:
    """Digests of all records."""
    with CatalogReader(home) as catalog:
        keys = [
            TaskKey(name, revision)
            for name in catalog.task_names()
            for revision in range(1, catalog.newest_record(name) + 1)
        ]
        return {str(key): catalog.record(key).sha256 for key in keys}
