"""Registers tasks: the use case, from top to bottom.

Read and check the data; embed it with the router's own encoder; tune the soft prompts, several
tasks in the same batches; refuse prompts that are no better than their baselines; store the
artifacts; measure what the tasks do to the others, and refuse those that take too much; publish.
Nothing that is stored already is touched.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from router.challengers import Challenge
from router.errors import InvalidInputError, PromptyardError, RefusedError, shorten
from router.interfaces import (
    Embeddings,
    Encoder,
    FloatArray,
    LanguageModel,
    prompted_encoder,
)
from router.loading import (
    CLUSTERS_TENSOR,
    COUNTS_TENSOR,
    EMBEDDINGS_TENSOR,
    GRAM_TENSOR,
    PROMPT_TENSORS,
    SUMS_TENSOR,
)
from router.statistics import sums_of, to_fixed_point
from router.tasks import PromptSummary, TaskRecord
from router.templates import fill
from trainer.admission import Registered, SuspectInput
from trainer.answer_metrics import Metric
from trainer.catalog_writer import now
from trainer.checkpoint import DEFAULT_SECONDS, Checkpoints
from trainer.classifier_fitting import ClassifierFitter, LabelledTask
from trainer.clustering import cluster
from trainer.commands import PolicyChange, RegisterTask
from trainer.data import Example, summarise
from trainer.gate import DEFAULT_GATE_LIMIT, InterferenceError
from trainer.preparing import Prepared, prepare
from trainer.text_keeping import keep_texts
from trainer.tuned_prompt import TunedPrompt, TuningFailure, training_curve
from trainer.tuning_log import TuningLog
from trainer.tuning_settings import TuningJob, TuningSettings
from trainer.workshop import Published, Workshop

# What tunes is imported where it is used: without a prompt, no torch is waited for.
if TYPE_CHECKING:
    from trainer.initialisation import Start
    from trainer.prompt_quality import LabelledRow

CHECKPOINTS_FOLDER = "checkpoints"
EMBED_ROWS = 256
"""How many texts of a task are embedded at a time."""

# What the bits of a tuned prompt may depend on.
_VERSIONED = ("promptyard", "torch", "transformers")

# progress(task or "", stage, done, total)
Progress = Callable[[str, str, int, int], None]


def register(
    workshop: Workshop,
    requests: Sequence[RegisterTask],
    base_model: LanguageModel | None,
    settings: TuningSettings,
    change: PolicyChange | None = None,
    progress: Progress = lambda *_: None,
    gate_limit: float = DEFAULT_GATE_LIMIT,
    checkpoint_seconds: float = DEFAULT_SECONDS,
    others: Sequence[TuningSettings] = (),
    log: TuningLog | None = None,
) -> Registered:
    """Register tasks and publish those that succeed, all of them in one catalog revision.

    A failure of one task leaves the others. A challenger is registered alone: it becomes live for
    nobody, and passes the gate as if it did. `base_model` may be None where no request wants a
    prompt. A task that takes more than `gate_limit` of the held-out rows of an old one is refused,
    unless it is forced. `others` are further settings to try (`trainer.search`): of each task, the
    best on its validation rows are kept. `log` gets the figures of tuning.

    The state of tuning is kept in the home every `checkpoint_seconds`: the same call after a kill
    goes on from there, and comes to the same prompts.

    Raises:
        PromptyardError: nothing could be registered for a reason that no single task has.
    """
    _refuse_challenger_among_others(requests)
    _refuse_useless_encoder_prompts(requests, workshop.encoder)
    workshop.check_encoder()
    workshop.policy(change)
    failures: dict[str, PromptyardError] = {}
    prepared = list(_each(requests, lambda request: prepare(workshop.catalog, request), failures))
    checkpoints = Checkpoints(workshop.home / CHECKPOINTS_FOLDER, checkpoint_seconds)
    prompts = _tune(
        workshop, prepared, base_model, (settings, *others), failures, progress, checkpoints, log
    )
    classifiers = ClassifierFitter(workshop, progress, settings.steps)
    records = []
    for task in prepared:
        if task.request.name in failures:
            continue
        tuned = prompts.get(task.request.name)
        try:
            if tuned is not None:
                check_prompt(task.request, tuned, task.metric)
            records.append(_store(workshop, task, tuned, base_model, classifiers, progress))
        except PromptyardError as error:
            failures[task.request.name] = error
    progress("", "publish", 0, 1)
    challenge = next((task.challenge for task in prepared if task.challenge is not None), None)
    published, published_records = _publish(
        workshop, records, change, gate_limit, failures, challenge
    )
    progress("", "publish", 1, 1)
    checkpoints.remove()
    return Registered(published_records, failures, published, _suspects(prepared, published))


def _publish(
    workshop: Workshop,
    records: Sequence[TaskRecord],
    change: PolicyChange | None,
    gate_limit: float,
    failures: dict[str, PromptyardError],
    challenge: Challenge | None,
) -> tuple[Published | None, tuple[TaskRecord, ...]]:
    """Publish the records that the gate lets pass, and say which they are."""
    left = tuple(records)
    while left:
        action = "revise" if all(record.revision > 1 for record in left) else "register"
        live = {record.name: record.revision for record in left}
        try:
            published = workshop.publish(
                action if challenge is None else "challenge",
                records=left,
                live=live if challenge is None else {},
                change=change,
                gate_limit=gate_limit,
                challenge=challenge,
            )
        except InterferenceError as error:
            failures.update({key.name: error for key in error.tasks})
            left = tuple(record for record in left if record.key not in error.tasks)
        else:
            return published, left
    return None, ()


def _refuse_challenger_among_others(requests: Sequence[RegisterTask]) -> None:
    challengers = [request.name for request in requests if request.challenger]
    if challengers and len(requests) > 1:
        raise InvalidInputError(
            "challenger", ", ".join(challengers), "register a challenger in a call of its own"
        )


def _refuse_useless_encoder_prompts(requests: Sequence[RegisterTask], encoder: Encoder) -> None:
    for request in requests:
        if not request.encoder_prompt:
            continue
        if prompted_encoder(encoder) is None:
            raise InvalidInputError(
                "encoder prompt",
                encoder.name,
                "leave it out: of the encoders only the embedded one takes prompts",
            )
        if not (request.with_prompt and request.with_classifier) or request.free_text:
            raise InvalidInputError(
                "encoder prompt",
                request.name,
                "leave it out, or register a prompt and a label classifier for it to serve",
            )


def _suspects(
    prepared: Sequence[Prepared], published: Published | None
) -> tuple[SuspectInput, ...]:
    """The suspects of the gate by their text, which is not stored."""
    if published is None or published.gate is None:
        return ()
    examples = {task.request.name: task.file.examples for task in prepared}
    suspects = [
        SuspectInput(
            suspect.task.name,
            shorten(examples[suspect.task.name][suspect.row].input),
            suspect.decided.name if suspect.decided else None,
        )
        for suspect in published.gate.suspects
    ]
    return tuple(sorted(suspects, key=lambda suspect: suspect.decided is None))


def check_prompt(request: RegisterTask, tuned: TunedPrompt, metric: Metric = "accuracy") -> None:
    """Refuse a prompt that is no better than the majority class or the plain instruction.

    Where few validation rows make it score the same as the instruction, the loss decides, as it
    does between prompts.

    Raises:
        RefusedError: it is not, and `force` gives no reason to publish it all the same.
    """
    from trainer.prompt_quality import Quality

    scores = tuned.scores
    quality = Quality(scores["prompt"], -tuned.validation_loss)
    instruction = Quality(scores["instruction"], -tuned.instruction_loss)
    better = scores["prompt"] > scores["majority"] and quality.clearly_exceeds(instruction)
    if not better and not request.force:
        raise RefusedError(
            f"prompt of {request.name}",
            f"{metric} {scores['prompt']:.1%}; majority class {scores['majority']:.1%}, "
            f"plain instruction {scores['instruction']:.1%}, losses {tuned.validation_loss:.3f} "
            f"and {tuned.instruction_loss:.3f}",
            "give more or cleaner rows or more --steps; --force REASON publishes it all the same",
        )


def _each(
    requests: Sequence[RegisterTask],
    work: Callable[[RegisterTask], Prepared],
    failures: dict[str, PromptyardError],
) -> Iterator[Prepared]:
    seen: set[str] = set()
    for request in requests:
        try:
            if request.name in seen:
                raise InvalidInputError("task name", request.name, "name every task once")
            seen.add(request.name)
            yield work(request)
        except PromptyardError as error:
            failures[request.name] = error


def _tune(
    workshop: Workshop,
    prepared: Sequence[Prepared],
    base_model: LanguageModel | None,
    configurations: Sequence[TuningSettings],
    failures: dict[str, PromptyardError],
    progress: Progress,
    checkpoints: Checkpoints,
    log: TuningLog | None,
) -> dict[str, TunedPrompt]:
    wanted = [
        task for task in prepared if task.request.with_prompt and task.request.name not in failures
    ]
    if not wanted:
        return {}
    if base_model is None:
        raise InvalidInputError("base model", "none", "give --base-model, or --no-prompt")
    from trainer.prompt_import import import_prompt
    from trainer.tuning import tune

    jobs = [tuning_job(workshop, task, base_model, configurations) for task in wanted]
    folders = {task.request.name: task.request.prompt_from for task in wanted}
    prompts = {}
    for job in jobs:
        folder = folders[job.name]
        if folder is not None:
            try:
                prompts[job.name] = import_prompt(base_model, job, folder)
            except PromptyardError as error:
                failures[job.name] = error
    jobs = [job for job in jobs if folders[job.name] is None]
    if not jobs:
        return prompts
    settings, *others = configurations
    results = tune(base_model, jobs, settings, progress, checkpoints, others, log)
    for name, result in results.items():
        if isinstance(result, TuningFailure):
            failures[name] = RefusedError(f"prompt of {name}", result.reason, result.remedy)
        else:
            prompts[name] = result
    return prompts


def tuning_job(
    workshop: Workshop,
    task: Prepared,
    base_model: LanguageModel,
    configurations: Sequence[TuningSettings],
) -> TuningJob:
    """What to tune, with any of `configurations`, for a request whose data was read."""
    return TuningJob(
        name=task.request.name,
        instruction=_instruction(task.request),
        labels=task.outputs,
        train=_rows(task, task.train),
        validation=_rows(task, task.validation),
        starts=_starts(workshop, task, base_model, configurations),
        metric=task.metric,
        rejected=_rejected(task.train),
        validation_rejected=_rejected(task.validation),
    )


def _instruction(request: RegisterTask) -> str:
    """What the task is, in words: those of its name where the user gave no others."""
    return request.instruction or request.description or re.sub(r"[-_.]+", " ", request.name)


def _rejected(examples: Sequence[Example]) -> tuple[tuple[str, ...], ...]:
    return tuple(example.rejected for example in examples)


def _rows(task: Prepared, examples: Sequence[Example]) -> tuple[LabelledRow, ...]:
    """What the base model reads of examples, and their outputs."""
    template = task.request.template
    return tuple((fill(template, each.input, each.context), each.output) for each in examples)


def _starts(
    workshop: Workshop,
    task: Prepared,
    model: LanguageModel,
    configurations: Sequence[TuningSettings],
) -> tuple[Start, ...]:
    wanted = any(each.initialisation in ("best", "nearest") for each in configurations)
    if task.request.prompt_from is not None or not wanted:
        return ()
    from trainer.nearest_prompts import nearest_prompts

    texts = [example.input for example in task.train]
    return nearest_prompts(workshop, texts, model, configurations[0].method)


def _store(
    workshop: Workshop,
    task: Prepared,
    tuned: TunedPrompt | None,
    base_model: LanguageModel | None,
    classifiers: ClassifierFitter,
    progress: Progress,
) -> TaskRecord:
    """Embed the rows, store rows and prompt, and make the record."""
    request = task.request
    texts = [example.input for example in task.file.examples]
    embeddings = embed(workshop, request.name, texts, progress)
    prompt = classifier = None
    if tuned is not None and base_model is not None:
        if task.outputs is not None and request.with_classifier:
            classifier = classifiers.stored(
                LabelledTask(
                    request.name,
                    request.instruction,
                    task.outputs,
                    texts,
                    [example.output for example in task.file.examples],
                ),
                embeddings.vectors,
                with_encoder_prompt=request.encoder_prompt is not False,
            )
        tokens, width = tuned.values.shape
        prompt = PromptSummary(
            sha256=workshop.artifacts.write_tensors({PROMPT_TENSORS[tuned.method]: tuned.values}),
            tokens=tokens,
            hidden_size=width if tuned.layers == 0 else width // (2 * tuned.layers),
            base_model=base_model.fingerprint,
            base_model_name=base_model.name,
            metric=task.metric,
            scores=dict(tuned.scores),
            settings={**tuned.settings, "python": platform.python_version()},
            steps=tuned.steps,
            seconds=round(tuned.seconds, 3),
            method=tuned.method,
            layers=tuned.layers,
            curve=training_curve(tuned),
            probabilities=dict(tuned.probabilities),
            search=tuned.search,
            versions={name: version(name) for name in _VERSIONED},
        )
    return TaskRecord(
        name=request.name,
        revision=task.revision,
        created_at=now(),
        description=request.description,
        instruction=request.instruction,
        outputs=task.outputs,
        data=summarise(task.file, len(task.train), len(task.validation)),
        encoder=workshop.encoder.fingerprint,
        embeddings_sha256=store_rows(
            workshop, embeddings.vectors, statistics_only=request.statistics_only
        ),
        prompt=prompt,
        forced_reason=request.force,
        template=request.template,
        classifier=classifier,
        texts_sha256=(
            keep_texts(workshop.artifacts, task.file.examples) if request.keep_text else ""
        ),
        statistics_only=request.statistics_only,
    )


def store_rows(workshop: Workshop, vectors: FloatArray, *, statistics_only: bool = False) -> str:
    """Store a task's embeddings `[n, D]` with their clusters; returns the file's digest.

    With `statistics_only` the sums over them, and not themselves.
    """
    if statistics_only:
        sums = sums_of(to_fixed_point(vectors))
        triangle = sums.gram[np.triu_indices(len(sums.gram))]
        return workshop.artifacts.write_tensors(
            {
                COUNTS_TENSOR: sums.counts[:, None].astype(np.int64),
                SUMS_TENSOR: sums.sums.astype(np.int64),
                GRAM_TENSOR: triangle[None].astype(np.int64),
            }
        )
    return workshop.artifacts.write_tensors(
        {
            EMBEDDINGS_TENSOR: to_fixed_point(vectors),
            CLUSTERS_TENSOR: cluster(vectors)[:, None],
        }
    )


def embed(workshop: Workshop, name: str, texts: Sequence[str], progress: Progress) -> Embeddings:
    """Embed the texts of a task, in pieces, with progress."""
    pieces = []
    for start in range(0, len(texts), EMBED_ROWS):
        progress(name, "embed", start, len(texts))
        pieces.append(workshop.encoder.encode(texts[start : start + EMBED_ROWS]))
    progress(name, "embed", len(texts), len(texts))
    return Embeddings(
        np.concatenate([piece.vectors for piece in pieces]),
        np.concatenate([piece.truncated for piece in pieces]),
    )
