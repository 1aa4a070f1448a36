"""How answers are scored against the outputs of labelled rows. All scores are in [0, 1].

| metric | what | default for |
|---|---|---|
| accuracy | share of answers that are the row's output | a closed set of outputs |
| macro-f1 | F1 of each output, mean over the outputs that occur in the rows | |
| exact-match | share of answers that are the row's output | free text, short |
| rouge-l | F of the longest common subsequence of words, mean of rows (Lin 2004) | longer |
| label-f1 | F1 of the set of labels, mean of rows (Tsoumakas & Katakis 2007) | lists of labels |

A set of labels is written as one text: sorted, with `, ` between them. Case and white space do not
count anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from router.errors import InvalidInputError

Metric = Literal["accuracy", "macro-f1", "exact-match", "rouge-l", "label-f1"]
METRICS: tuple[Metric, ...] = get_args(Metric)

LABEL_SEPARATOR = ","
# Text of more words than this is seldom written again word by word: it is compared by ROUGE-L.
_MOST_WORDS_TO_MATCH = 5
_WORDS = re.compile(r"\w+")


def score_rows(metric: Metric, answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """The score of each answer. Their mean is `score`, but for macro-F1.

    Macro-F1 is none of single rows; what a row gives here is whether its answer is right.
    """
    score_of = {"rouge-l": _rouge_l, "label-f1": _label_f1}.get(metric, same_text)
    return [float(score_of(a, b)) for a, b in zip(answers, expected, strict=True)]


def score(metric: Metric, answers: Sequence[str], expected: Sequence[str]) -> float:
    """The score of all answers; NaN without any."""
    if not answers:
        return float("nan")
    if metric == "macro-f1":
        return _macro_f1(answers, expected)
    return float(np.mean(score_rows(metric, answers, expected)))


def default_metric(
    labels: tuple[str, ...] | None, outputs: Sequence[str], *, multi_label: bool
) -> Metric:
    """What suits a task with the closed set `labels`, or None, and these outputs in its rows."""
    if multi_label:
        return "label-f1"
    if labels is not None:
        return "accuracy"
    long = sum(len(_WORDS.findall(output)) > _MOST_WORDS_TO_MATCH for output in outputs)
    return "rouge-l" if 2 * long > len(outputs) else "exact-match"


def check_metric(
    task: str, metric: str, labels: tuple[str, ...] | None, *, multi_label: bool
) -> Metric:
    """`metric`, if there is such a one and it suits the task.

    Raises:
        InvalidInputError: there is none, or it needs other outputs.
    """
    for known in METRICS:
        if known == metric:
            break
    else:
        raise InvalidInputError("metric", metric, f"choose one of {', '.join(METRICS)}")
    if known == "label-f1" and not multi_label:
        raise InvalidInputError(
            f"metric of {task}", metric, "give lists of labels as outputs, or another metric"
        )
    if known == "macro-f1" and (labels is None or multi_label):
        other = "label-f1" if multi_label else "exact-match or rouge-l"
        raise InvalidInputError(
            f"metric of {task}", metric, f"its outputs are not one of a closed set: take {other}"
        )
    return known


def recorded_metric(name: str) -> Metric:
    """The metric that a record names; accuracy where an older version named it otherwise."""
    wanted = name.replace(" ", "-")
    return next((metric for metric in METRICS if metric == wanted), "accuracy")


def same_text(answer: str, expected: str) -> bool:
    """Whether two texts say the same, apart from case and white space.

    White space is ignored altogether: uncased word-piece tokenizers, such as the embedded one,
    write `3. 5` and `stoke - on - trent`.
    """
    return _plain(answer) == _plain(expected)


def labels_of(text: str) -> frozenset[str]:
    """The labels that a text lists, without case and white space."""
    return frozenset(filter(None, (_plain(label) for label in text.split(LABEL_SEPARATOR))))


def join_labels(labels: Iterable[str]) -> str:
    """A set of labels as one text."""
    return f"{LABEL_SEPARATOR} ".join(sorted(set(labels)))


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()


def _f1(common: int, first: int, second: int) -> float:
    """The harmonic mean of precision and recall, as 2 * common / (both sizes)."""
    return 2 * common / (first + second) if first + second else 0.0


def _label_f1(answer: str, expected: str) -> float:
    given, wanted = labels_of(answer), labels_of(expected)
    return _f1(len(given & wanted), len(given), len(wanted))


def _macro_f1(answers: Sequence[str], expected: Sequence[str]) -> float:
    given, wanted = [_plain(text) for text in answers], [_plain(text) for text in expected]
    right = Counter(b for a, b in zip(given, wanted, strict=True) if a == b)
    answered, occurring = Counter(given), Counter(wanted)
    scores = [_f1(right[each], answered[each], rows) for each, rows in occurring.items()]
    return float(np.mean(scores))


def _rouge_l(answer: str, expected: str) -> float:
    given, wanted = _WORDS.findall(answer.casefold()), _WORDS.findall(expected.casefold())
    return _f1(_longest_common_subsequence(given, wanted), len(given), len(wanted))


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """By dynamic programming, one row of the table at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = before + 1 if word == other else max(above, row[place - 1])
            before = above
    return row[-1]
