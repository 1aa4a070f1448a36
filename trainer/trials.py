"""Trials: variants of one task, tuned on the same rows and compared. Nothing is published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from router.errors import InvalidInputError
from router.interfaces import LanguageModel
from router.templates import check_template
from router.yaml_file import read_yaml
from trainer.answer_metrics import Metric, score, score_rows
from trainer.commands import RegisterTask
from trainer.metrics import Interval, wilson_interval
from trainer.preparing import prepare
from trainer.prompt_quality import answers_under
from trainer.register import Progress, tuning_job
from trainer.tuned_prompt import TunedPrompt, TuningFailure
from trainer.tuning import tune_each
from trainer.tuning_options import tuning_settings
from trainer.tuning_settings import TuningJob, TuningSettings, check_tuning
from trainer.workshop import Workshop

MOST_VARIANTS = 32
_MOST_MIB = 1
_DRAWS = 2000
# What a variant may change of the request; everything else is a setting of tuning.
_OF_REQUEST = ("template", "instruction")

Variant = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class TriedVariant:
    """What became of a variant; `problem` says why there is no score.

    The intervals are of 95 %: of the score, and of its difference to the first variant's. `seconds`
    is its share of the time of all that were tuned in the same batches.
    """

    variant: Variant
    score: float | None = None
    interval: Interval | None = None
    loss: float | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    steps: int = 0
    seconds: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Trials:
    """The variants in their order, on how many validation rows, and the number of the best one.

    The best has the highest score, or of several the least loss; None where all failed.
    """

    metric: Metric
    rows: int
    tried: tuple[TriedVariant, ...]
    best: int | None


def try_variants(
    workshop: Workshop,
    request: RegisterTask,
    variants: Sequence[Variant],
    base_model: LanguageModel,
    given: Mapping[str, object],
    progress: Progress = lambda *_: None,
) -> Trials:
    """Tune each variant of `request` and compare their answers to the validation rows.

    `given` are the tuning settings that all share. They are tuned without `refit`, which would show
    the prompts the rows that they are compared on.

    Raises:
        InvalidInputError: the data, a variant or a setting cannot be used.
        IncompatibleModelError: the base model cannot be tuned.
    """
    check_variants(variants)
    jobs: list[tuple[TuningJob, TuningSettings]] = []
    for variant in variants:
        changed, settings = with_variant(request, variant, given)
        settings = replace(settings, refit="never")
        job = tuning_job(workshop, prepare(workshop.catalog, changed), base_model, [settings])
        check_tuning([job], settings)
        jobs.append((job, settings))
    tried: list[TriedVariant] = []
    answers: list[list[str] | None] = []
    results = _tune_together(base_model, jobs, progress)
    for variant, (job, _), result in zip(variants, jobs, results, strict=True):
        if isinstance(result, TuningFailure):
            tried.append(TriedVariant(variant, problem=f"{result.reason}; {result.remedy}"))
            answers.append(None)
            continue
        answers.append(
            answers_under(base_model, result.values, result.method, job.labels, job.validation)
        )
        tried.append(
            TriedVariant(
                variant,
                loss=result.validation_loss,
                steps=result.steps,
                seconds=result.seconds,
            )
        )
    job = jobs[0][0]
    expected = [output for _, output in job.validation]
    compared = tuple(_compare(tried, answers, expected, job.metric))
    scored = [n for n, each in enumerate(compared) if each.score is not None]
    best = max(scored, key=lambda n: (compared[n].score, -(compared[n].loss or 0)), default=None)
    return Trials(job.metric, len(expected), compared, best)


def _tune_together(
    model: LanguageModel, jobs: Sequence[tuple[TuningJob, TuningSettings]], progress: Progress
) -> list[TunedPrompt | TuningFailure]:
    """Tune every job; those that can share forward passes do."""
    results: dict[int, TunedPrompt | TuningFailure] = {}
    groups: dict[object, list[int]] = {}
    for number, (_, settings) in enumerate(jobs):
        shared = (settings.precision, settings.micro_batch_positions)
        groups.setdefault(shared, []).append(number)
    for numbers in groups.values():
        wanted = [(job, [settings]) for job, settings in (jobs[number] for number in numbers)]
        results.update(zip(numbers, tune_each(model, wanted, progress), strict=True))
    return [results[number] for number in range(len(jobs))]


def with_variant(
    request: RegisterTask, variant: Variant, given: Mapping[str, object]
) -> tuple[RegisterTask, TuningSettings]:
    """The request and the settings of a variant.

    Raises:
        InvalidInputError: no such key, or a value of another type.
    """
    texts = {"template": request.template, "instruction": request.instruction}
    for key in _OF_REQUEST:
        value = variant.get(key, texts[key])
        if not isinstance(value, str):
            raise InvalidInputError(f"variant, {key}", value, "give a text")
        texts[key] = value
    check_template(texts["template"], "variant, template")
    changed = replace(request, template=texts["template"], instruction=texts["instruction"])
    settings = {key: value for key, value in variant.items() if key not in _OF_REQUEST}
    return changed, tuning_settings({**given, **settings})


def parse_variant(text: str) -> Variant:
    """The variant that `key=value,...` says; numbers are read as such.

    Raises:
        InvalidInputError: a part is not `key=value`, or a key is given twice.
    """
    variant: dict[str, object] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key or key in variant:
            raise InvalidInputError(
                "--variant",
                text,
                "write key=value,key=value with each key once; values with "
                "commas go into a file for --variants",
            )
        variant[key] = value if key in _OF_REQUEST else _number_or_text(value.strip())
    return variant


def read_variants(path: Path) -> list[Variant]:
    """The variants that a YAML file lists under the key `variants`.

    Raises:
        InvalidInputError: missing, or not such a file.
    """
    document = read_yaml(path, _MOST_MIB)
    entries = document.get("variants") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise InvalidInputError(f"{path}", "no list 'variants'", "list them under that key")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
            raise InvalidInputError(
                f"{path}: variant {number}", entry, "give a mapping, like {length: 40}"
            )
    return entries


def check_variants(variants: Sequence[Variant]) -> None:
    """Refuse fewer than two variants, too many, and two that are the same.

    Raises:
        InvalidInputError: says which.
    """
    if not 2 <= len(variants) <= MOST_VARIANTS:
        raise InvalidInputError(
            "variants",
            f"{len(variants)}",
            f"give 2 to {MOST_VARIANTS} with --variant or --variants",
        )
    for number, variant in enumerate(variants):
        if variant in variants[:number]:
            raise InvalidInputError("variants", dict(variant), "give every variant once")


def score_interval(metric: Metric, answers: Sequence[str], expected: Sequence[str]) -> Interval:
    """The 95 % interval of a score: Wilson's, or a bootstrap's where it is no mean over rows.

    Scores of rows in [0, 1] vary at most as much as right and wrong ones of the same mean, so that
    Wilson's interval is wide enough for ROUGE-L and label-F1 as well.
    """
    if metric == "macro-f1":
        return _bootstrap([score(metric, *drawn) for drawn in _draws(answers, expected)])
    return wilson_interval(sum(score_rows(metric, answers, expected)), len(expected))


def difference_interval(
    metric: Metric, first: Sequence[str], second: Sequence[str], expected: Sequence[str]
) -> Interval:
    """The 95 % interval of the score of `second` less that of `first`, on the same rows.

    Percentiles of a paired bootstrap: rows are drawn with replacement, the same for both (Efron and
    Tibshirani 1993, chapter 13). The draws are the same on every run.
    """
    differences = [
        score(metric, there, outputs) - score(metric, here, outputs)
        for here, there, outputs in _draws(first, second, expected)
    ]
    return _bootstrap(differences)


def _compare(
    tried: Sequence[TriedVariant],
    answers: Sequence[Sequence[str] | None],
    expected: Sequence[str],
    metric: Metric,
) -> list[TriedVariant]:
    first = answers[0]
    compared = []
    for each, given in zip(tried, answers, strict=True):
        if given is None:
            compared.append(each)
            continue
        found = score(metric, given, expected)
        each = replace(each, score=found, interval=score_interval(metric, given, expected))
        if first is not None and given is not first:
            each = replace(
                each,
                difference=found - score(metric, first, expected),
                difference_interval=difference_interval(metric, first, given, expected),
            )
        compared.append(each)
    return compared


def _draws(*rows: Sequence[str]) -> list[tuple[list[str], ...]]:
    generator = np.random.default_rng(0)
    count = len(rows[0])
    return [
        tuple([texts[i] for i in chosen] for texts in rows)
        for chosen in generator.integers(0, count, (_DRAWS, count)).tolist()
    ]


def _bootstrap(values: Sequence[float]) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5]).tolist()
    return Interval(low, high)


def _number_or_text(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
