"""Checks a request to register, and reads and splits its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.catalog import CatalogReader
from router.challengers import Challenge
from router.errors import InvalidInputError
from router.tasks import check_task_name
from router.templates import check_template
from trainer.admission import next_revision
from trainer.answer_metrics import Metric, check_metric, default_metric
from trainer.challenge_rules import requested_challenge
from trainer.commands import RegisterTask
from trainer.data import Example, LabelledFile, closed_outputs, read_labelled, split

MIN_ROWS_FOR_ROUTING = 2
MIN_ROWS_FOR_PROMPT = 8


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request whose data was read and checked."""

    request: RegisterTask
    revision: int
    file: LabelledFile
    outputs: tuple[str, ...] | None
    train: Sequence[Example]
    validation: Sequence[Example]
    metric: Metric = "accuracy"
    challenge: Challenge | None = None


def prepare(catalog: CatalogReader, request: RegisterTask) -> Prepared:
    """Check the request and read its data.

    Raises:
        InvalidInputError: the name or the data cannot be used, or it cannot challenge.
        TaskExistsError: the task exists, and `revise` is not set.
        TaskNotFoundError: `revise` is set, and the task does not exist.
    """
    check_task_name(request.name)
    check_template(request.template, f"template of {request.name}")
    if request.prompt_from is not None and not request.with_prompt:
        raise InvalidInputError(
            "prompt_from", request.prompt_from, "give it without --no-prompt (with_prompt: false)"
        )
    if request.statistics_only and request.keep_text:
        raise InvalidInputError(
            "keep_text", "with statistics_only", "embeddings tell less than texts: give one of them"
        )
    revision = next_revision(catalog.newest_record(request.name), request)
    challenge = requested_challenge(catalog, request, revision)
    file = read_labelled(
        request.data,
        request.fields,
        with_output=request.with_prompt,
        drop_duplicates=request.drop_duplicates,
        min_rows=MIN_ROWS_FOR_PROMPT if request.with_prompt else MIN_ROWS_FOR_ROUTING,
    )
    if not request.with_prompt:
        return Prepared(request, revision, file, None, file.examples, (), challenge=challenge)
    outputs = None if request.free_text else closed_outputs(file.examples)
    if outputs is not None and len(outputs) < 2:
        raise InvalidInputError(
            f"{request.data}: field {request.fields.output!r}",
            f"only {outputs[0]!r}",
            "give rows of at least two outputs, or --no-prompt to route only",
        )
    metric = default_metric(
        outputs, [example.output for example in file.examples], multi_label=file.multi_label
    )
    if request.metric:
        metric = check_metric(request.name, request.metric, outputs, multi_label=file.multi_label)
    train, validation = split(file.examples)
    return Prepared(request, revision, file, outputs, train, validation, metric, challenge)
