"""Evaluates a stream of tasks: they arrive one after the other, and all are scored each time.

Every task is registered through `trainer.register`, in a scratch home. Test rows are only ever
read for scoring: what a registration sees is a file of the task's own training rows.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from router.errors import InvalidInputError
from router.head import Head, digest
from router.interfaces import Embeddings, Encoder, FloatArray, LanguageModel, prompted_encoder
from router.snapshot import Snapshot
from router.statistics import ExactArray
from router.threads import one_blas_thread
from trainer import metrics
from trainer.commands import PolicyChange, RegisterTask
from trainer.data import Fields, read_labelled
from trainer.embedding_ahead import EncoderAhead
from trainer.evaluate_answers import (
    DEFAULT_OUTPUT_TOKENS,
    AnswerEvaluation,
    AnswerFigures,
    evaluate_answers,
)
from trainer.evaluate_routing import (
    RejectFigures,
    RoutedText,
    RoutingFigures,
    decide,
    embed_texts,
    load_snapshot,
    reject_figures,
    routing_figures,
)
from trainer.evaluation_rows import (
    DEFAULT_OUT_OF_SCOPE_LABEL,
    SPLIT_FIELD,
    TEST_SPLIT,
    EvaluationFields,
    LabelledText,
    first_of_each_task,
    match_tasks,
    read_texts,
    task_names,
)
from trainer.metrics import StreamFigures
from trainer.preparing import MIN_ROWS_FOR_PROMPT, MIN_ROWS_FOR_ROUTING
from trainer.register import EMBED_ROWS, Progress, register
from trainer.task_map import TaskMap, task_map
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Published, Workshop

_FORCED = "evaluation of a stream: every task arrives, whatever its prompt is worth"


@dataclass(frozen=True, slots=True)
class StreamFiles:
    """Where a stream's rows come from, and which of them are meant.

    Where rows have a `split` field, the training rows are those whose split is not `test`, and the
    test rows those whose split is `test` (all rows of a test file in which none is). One file can
    so be both. Training rows with the out-of-scope label are left out. `order` is a file of labels,
    as a JSON list or one a line; without it the tasks arrive in the order of their names.
    """

    train: Path
    test: Path
    fields: EvaluationFields
    out_of_scope_label: str = DEFAULT_OUT_OF_SCOPE_LABEL
    order: Path | None = None
    unknown_as_oos: bool = False
    test_rows_per_task: int | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """The tasks in the order of their arrival, with training rows, and the test rows of all.

    Rows carry task names; `labels` has the label of each name. `out_of_scope_dropped` counts the
    training rows that were left out, `test_texts_in_train` the test texts that are also training
    texts.
    """

    order: tuple[str, ...]
    train: Mapping[str, Sequence[LabelledText]]
    test: tuple[LabelledText, ...]
    labels: Mapping[str, str]
    out_of_scope_dropped: int
    test_texts_in_train: int


@dataclass(frozen=True, slots=True)
class Registration:
    """One arrival: what it cost, and what it did.

    `seconds` is the whole registration: reading, embedding (also what was done of that while the
    task before was registered), tuning and publishing. `bytes` are what
    the task added for good (routing rows and prompt), `head_bytes` the compiled head of all tasks.
    `changed_decisions` counts the held-out rows of older tasks that are decided differently now.
    """

    task: str
    rows: int
    duplicates_dropped: int
    seconds: float
    bytes: int
    head_bytes: int
    changed_decisions: int
    prompt_scores: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class AnswersOverTime:
    """What the answers to a task's test rows were worth right after it arrived, by task.

    The transfers are the mean change from then to the end, over all tasks but the last, as BWT is
    of routing: of the answers that were routed, and of those under the oracle's task. The second is
    0 where what serves a task stays as it is; it is measured all the same, with what was served
    then.
    """

    on_arrival: Mapping[str, AnswerFigures]
    routed_transfer: float
    oracle_transfer: float


@dataclass(frozen=True, slots=True)
class StreamEvaluation:
    """What `evaluate_stream` found.

    `matrix` `[T, T]`: R[i, j] is the share of task j's test rows whose best-scoring task is j,
    after task i arrived; NaN where j had not arrived, or has no test rows. `accuracy_after_each`
    `[T]` is over the test rows of all tasks that had arrived. `unknown_before_arrival` `[T]` is the
    share of each task's test rows that are called unknown just before it arrives: 1 is right, as
    they belong to no task yet. It is NaN for the first, and without test rows. `routing`, `reject`
    and `decisions` are those of the end, as is `head_sha256`; `answers` and `answers_over_time` are
    None for a stream without prompts. `places` are the tasks on a map.
    """

    stream: Stream
    encoder: str
    head: str
    routing: RoutingFigures
    reject: RejectFigures | None
    matrix: ExactArray
    continual: StreamFigures
    accuracy_after_each: tuple[float, ...]
    unknown_before_arrival: tuple[float, ...]
    registrations: tuple[Registration, ...]
    answers: AnswerEvaluation | None
    answers_over_time: AnswersOverTime | None
    places: TaskMap
    decisions: tuple[RoutedText, ...]
    head_sha256: str
    seconds: float


def read_stream(files: StreamFiles, *, with_prompt: bool) -> Stream:
    """Read and check the rows of a stream.

    Raises:
        InvalidInputError: a file or a row cannot be used, a task has too few training rows, a test
            row's task has none, or the order does not name every task once.
    """
    label = files.out_of_scope_label
    train = [row for row in read_texts(files.train, files.fields, label) if row.split != TEST_SPLIT]
    test = read_texts(files.test, files.fields, label)
    if any(row.split == TEST_SPLIT for row in test):
        test = [row for row in test if row.split == TEST_SPLIT]
    elif files.train.resolve() == files.test.resolve():
        raise InvalidInputError(
            f"{files.test}: field {SPLIT_FIELD!r}",
            f"no row says {TEST_SPLIT!r}",
            "give different files, or mark the test rows of the one file",
        )
    known = [row for row in train if row.task is not None]
    _check_sizes(files.train, known, MIN_ROWS_FOR_PROMPT if with_prompt else MIN_ROWS_FOR_ROUTING)
    names = task_names(str(row.task) for row in known)
    test = match_tasks(files.test, test, names, unknown_as_oos=files.unknown_as_oos)
    test = first_of_each_task(test, files.test_rows_per_task)
    if not any(row.task for row in test):
        raise InvalidInputError(f"{files.test}", "no in-scope test row", "give some to score")
    rows_of: dict[str, list[LabelledText]] = {}
    for row in known:
        rows_of.setdefault(names[str(row.task)], []).append(row)
    trained = {row.text for row in known}
    return Stream(
        order=tuple(names[task] for task in _order(files.order, names)),
        train=rows_of,
        test=tuple(replace(row, task=names[row.task] if row.task else None) for row in test),
        labels={name: task for task, name in names.items()},
        out_of_scope_dropped=len(train) - len(known),
        test_texts_in_train=sum(row.text in trained for row in test),
    )


def evaluate_stream(
    stream: Stream,
    scratch: Path,
    encoder: Encoder,
    base_model: LanguageModel | None,
    settings: TuningSettings,
    change: PolicyChange | None = None,
    max_output_tokens: int = DEFAULT_OUTPUT_TOKENS,
    progress: Progress = lambda *_: None,
) -> StreamEvaluation:
    """Register the tasks one after the other in `scratch`, an empty folder, and score each time.

    Prompts are tuned where there is a `base_model`. `change` is the catalog's policy.

    Raises:
        PromptyardError: a task could not be registered.
    """
    began = time.perf_counter()
    order = stream.order
    registrations: list[Registration] = []
    scoring: list[Future[_Scored]] = []
    on_arrival: dict[str, AnswerFigures] = {}
    # An arrival is scored, and the texts of the next task are embedded, while a task is registered.
    with (
        one_blas_thread(),
        ThreadPoolExecutor(1) as scorer,
        ThreadPoolExecutor(1) as embedder,
        Workshop(scratch / "home", ahead := EncoderAhead(encoder, embedder)) as workshop,
    ):
        texts = [row.text for row in stream.test]
        test = scorer.submit(embed_texts, encoder, texts, progress)
        files = {task: _write_rows(scratch / f"{task}.jsonl", stream.train[task]) for task in order}
        _announce(ahead, files, order[:1], with_output=base_model is not None)
        for number, task in enumerate(order, start=1):
            progress("tasks", "register", number - 1, len(order))
            coming = order[number : number + 1]
            _announce(ahead, files, coming, with_output=base_model is not None)
            seconds_ahead = ahead.seconds_ahead
            registration, published = _register(
                workshop, stream, task, files[task], base_model, settings, change, progress
            )
            seconds = registration.seconds + ahead.seconds_ahead - seconds_ahead
            registrations.append(replace(registration, seconds=seconds))
            scoring.append(scorer.submit(_score, published.head, stream, number, test))
            if base_model is not None and any(row.task == task for row in stream.test):
                of_task = _answers_of_task(
                    task, stream, test.result(), scratch, encoder, base_model, max_output_tokens
                )
                on_arrival |= of_task.per_task
        progress("tasks", "register", len(registrations), len(order))
    embeddings = test.result()
    scored = [arrival.result() for arrival in scoring]
    snapshot = Snapshot.build(published.revision, published.head, {})
    decisions = decide(snapshot, stream.test, embeddings)
    matrix = np.stack([arrival.row_of_matrix for arrival in scored])
    answers = None
    if base_model is not None:
        served = load_snapshot(scratch / "home", encoder, base_model.fingerprint)
        answers = evaluate_answers(
            served,
            base_model,
            decisions,
            embeddings.vectors,
            max_output_tokens,
            progress,
            encoder=prompted_encoder(encoder),
        )
    return StreamEvaluation(
        stream=stream,
        encoder=encoder.fingerprint,
        head=snapshot.head.kind,
        routing=routing_figures(decisions, sorted(stream.order)),
        reject=reject_figures(decisions),
        matrix=matrix,
        continual=metrics.stream_figures(matrix),
        accuracy_after_each=tuple(arrival.accuracy for arrival in scored),
        unknown_before_arrival=(math.nan, *(arrival.next_unknown for arrival in scored[:-1])),
        registrations=tuple(registrations),
        answers=answers,
        answers_over_time=changes_since_arrival(stream.order, on_arrival, answers.per_task)
        if answers is not None
        else None,
        places=task_map([row.task for row in stream.test], embeddings.vectors),
        decisions=tuple(decisions),
        head_sha256=digest(published.head.to_bytes()),
        seconds=time.perf_counter() - began,
    )


def _announce(
    ahead: EncoderAhead, files: Mapping[str, Path], coming: Sequence[str], *, with_output: bool
) -> None:
    """Have the texts of the `coming` tasks embedded, as their registration will ask for them.

    A row that registration cannot use is its own to refuse.
    """
    for task in coming:
        with contextlib.suppress(InvalidInputError):
            file = read_labelled(files[task], with_output=with_output, drop_duplicates=True)
            texts = [example.input for example in file.examples]
            for start in range(0, len(texts), EMBED_ROWS):
                ahead.announce(texts[start : start + EMBED_ROWS])


def _answers_of_task(
    task: str,
    stream: Stream,
    embeddings: Embeddings,
    scratch: Path,
    encoder: Encoder,
    base_model: LanguageModel,
    max_output_tokens: int,
) -> AnswerEvaluation:
    """What the newest revision answers to the test rows of one task."""
    places = [place for place, row in enumerate(stream.test) if row.task == task]
    some = Embeddings(embeddings.vectors[places], embeddings.truncated[places])
    snapshot = load_snapshot(scratch / "home", encoder, base_model.fingerprint)
    decisions = decide(snapshot, [stream.test[place] for place in places], some)
    return evaluate_answers(
        snapshot,
        base_model,
        decisions,
        some.vectors,
        max_output_tokens,
        encoder=prompted_encoder(encoder),
    )


def changes_since_arrival(
    order: Sequence[str],
    on_arrival: Mapping[str, AnswerFigures],
    at_the_end: Mapping[str, AnswerFigures],
) -> AnswersOverTime:
    """What became of the answers; tasks without test rows are in neither mapping."""
    pairs = [(on_arrival[task], at_the_end[task]) for task in order[:-1] if task in on_arrival]
    return AnswersOverTime(
        on_arrival,
        metrics.mean([end.routed - then.routed for then, end in pairs]) if pairs else 0.0,
        metrics.mean([end.oracle - then.oracle for then, end in pairs]) if pairs else 0.0,
    )


@dataclass(frozen=True, slots=True)
class _Scored:
    """Routing after an arrival: R[i, :] `[T]`, and the accuracy over all rows that count yet.

    `next_unknown` is the share of the next task's rows that are called unknown; NaN without any.
    """

    row_of_matrix: ExactArray
    accuracy: float
    next_unknown: float


def _score(head: Head, stream: Stream, arrived: int, test: Future[Embeddings]) -> _Scored:
    """Score the test rows of the first `arrived` tasks before rejection.

    The best task is the server's; without its score, which decides about rejection, and without
    the second best, this is one matrix product.
    """
    vectors = test.result().vectors
    number = {name: n for n, name in enumerate(stream.order)}
    truth = np.array([number.get(str(row.task), metrics.OUT_OF_SCOPE) for row in stream.test])
    counted = (truth != metrics.OUT_OF_SCOPE) & (truth < arrived)
    best = np.array([number[key.name] for key in head.tasks])[head.best_tasks(vectors[counted])]
    hits = metrics.per_task(metrics.confusion(truth[counted], best, len(stream.order)))
    row = np.array([task.accuracy for task in hits])
    row[arrived:] = np.nan
    return _Scored(
        row, metrics.accuracy(truth[counted], best), _unknown_share(head, vectors[truth == arrived])
    )


def _unknown_share(head: Head, vectors: FloatArray) -> float:
    """The share of embeddings `[B, D]` whose best task does not accept them."""
    if not len(vectors):
        return math.nan
    scores = head.scores(vectors)
    best = scores.argmax(1)
    accepted = scores[np.arange(len(best)), best] >= np.array(head.thresholds)[best]
    return float((~accepted).mean())


def _register(
    workshop: Workshop,
    stream: Stream,
    task: str,
    data: Path,
    base_model: LanguageModel | None,
    settings: TuningSettings,
    change: PolicyChange | None,
    progress: Progress,
) -> tuple[Registration, Published]:
    """Register one task from a file of its training rows, as a user would."""
    rows = stream.train[task]
    request = RegisterTask(
        name=task,
        data=data,
        description=stream.labels[task],
        instruction=next((row.instruction for row in rows if row.instruction), ""),
        fields=Fields(),
        with_prompt=base_model is not None,
        drop_duplicates=True,
        force=_FORCED if base_model is not None else "",
    )
    began = time.perf_counter()

    def tuning(_: str, stage: str, done: int, total: int) -> None:
        if stage == "tune":
            progress(task, stage, done, total)

    # Every task arrives, whatever it takes of others: that is what is to be measured.
    result = register(workshop, [request], base_model, settings, change, tuning, gate_limit=1.0)
    if result.published is None:
        raise result.failures[task]
    seconds = time.perf_counter() - began
    [record], published = result.records, result.published
    registration = Registration(
        task=task,
        rows=record.data.rows,
        duplicates_dropped=record.data.duplicates_dropped,
        seconds=seconds,
        bytes=sum(
            workshop.artifacts.path(digest).stat().st_size
            for digest in (record.embeddings_sha256, record.prompt and record.prompt.sha256)
            if digest
        ),
        head_bytes=published.head_bytes,
        changed_decisions=sum(published.changed_decisions.values()),
        prompt_scores=record.prompt.scores if record.prompt else None,
    )
    return registration, published


def _write_rows(path: Path, rows: Sequence[LabelledText]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"input": row.text, "output": row.output}) + "\n")
    return path


def _order(path: Path | None, labels: Iterable[str]) -> list[str]:
    """The labels as they arrive."""
    expected = sorted(labels)
    if path is None:
        return expected
    order = _read_order(path)
    for problem, found in (
        ("named twice", [label for label, times in Counter(order).items() if times > 1]),
        ("not in the training rows", sorted(set(order) - set(expected))),
        ("left out", sorted(set(expected) - set(order))),
    ):
        if found:
            raise InvalidInputError(
                f"{path}", f"{', '.join(found)} {problem}", "name every task exactly once"
            )
    return order


def _read_order(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        order = json.loads(text) if text.lstrip().startswith("[") else text.split("\n")
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path}", error, "give a JSON list of labels, or one label a line"
        ) from error
    return [label for label in (str(item).strip() for item in order) if label]


def _check_sizes(path: Path, rows: Sequence[LabelledText], least: int) -> None:
    """Refuse now what the registration of a task would refuse later."""
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(str(row.task), set()).add(row.text)
    if not texts:
        raise InvalidInputError(f"{path}", "no in-scope training row", "give some to train on")
    for task, different in texts.items():
        if len(different) < least:
            raise InvalidInputError(
                f"{path}: task {task!r}",
                f"{len(different)} different training rows",
                f"give at least {least}, or leave the task out",
            )
