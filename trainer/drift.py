"""Drift: whether sampled decisions still look like those that a revision was calibrated on.

Scores: those of the texts that a task scores best for, accepted or not, against those of the
held-out rows at calibration, by the two-sample Kolmogorov-Smirnov test (Smirnov 1948). The head
stores 19 quantiles of these, so that the largest distance is looked for at these places alone: it
may be missed by a little, and is never invented. Texts that are now rejected count, too: a task
whose inputs changed would otherwise lose just those that show it.

Volumes: the share of a task in the older and the newer half of the log, by Fisher's exact test.
Both over all tasks at once at 1 % (Holm 1979), and only where the difference is large.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import fisher_exact, kstwobign

from router.catalog import HEADS_FOLDER, CatalogReader
from router.decision_log import older
from router.errors import InvalidInputError
from router.head import CALIBRATION_LEVELS, Head
from router.head_files import HeadReader

LEVEL = 0.01
LEAST_DISTANCE = 0.15
LEAST_RATIO = 1.5
LEAST_TEXTS = 30
_UNKNOWN = ""


@dataclass(frozen=True, slots=True)
class Noted:
    """One line of a decision log.

    `task` is the name that was decided for, empty for an unknown text; `best` is NAME@REVISION of
    the task that scored best, empty where there is none.
    """

    tenant: str
    revision: int
    text: str
    task: str
    best: str
    score: float | None


@dataclass(frozen=True, slots=True)
class ScoreDrift:
    """A task's scores: distinct texts and calibration rows, distance, p after Holm, both medians.

    `p` is None where there are too few of either, or no quantiles.
    """

    task: str
    texts: int
    rows: int
    distance: float | None
    p: float | None
    median: float | None
    calibrated_median: float | None
    moved: bool


@dataclass(frozen=True, slots=True)
class VolumeDrift:
    """A task's share of the older and of the newer half; the task is empty for unknown texts."""

    task: str
    older: float
    newer: float
    p: float
    moved: bool


@dataclass(frozen=True, slots=True)
class Drift:
    """What moved. `calibrated_rejected` is the share of held-out rows that was rejected."""

    revision: int
    decisions: int
    other_revisions: int
    unknown: float
    calibrated_rejected: float
    scores: tuple[ScoreDrift, ...]
    volumes: tuple[VolumeDrift, ...]


def read_log(path: Path) -> Iterator[Noted]:
    """The decisions of a log, oldest first; those of the file that was full come before.

    Raises:
        InvalidInputError: it cannot be read, or a line is not one of a decision log.
    """
    for each in (older(path), path):
        if each == path or each.exists():
            try:
                with each.open(encoding="utf-8") as lines:
                    for number, line in enumerate(lines, start=1):
                        yield _noted(line, f"{each}, line {number}")
            except (OSError, UnicodeError) as error:
                raise InvalidInputError(
                    f"{each}", error, "give the file of `serve --decision-log`"
                ) from error


def measure_drift(
    noted: Sequence[Noted], home: Path, tenant: str = "", revision: int | None = None
) -> Drift:
    """Compare the decisions of one catalog revision with its calibration.

    Without `revision` it is the newest one that decided anything.

    Raises:
        InvalidInputError: no decision of this tenant and revision is there.
        CatalogError: there is no such revision.
        CorruptArtifactError: its head is gone (the newest 16 are kept) or damaged.
    """
    mine = [each for each in noted if each.tenant == tenant]
    if revision is None:
        revision = max((each.revision for each in mine), default=0)
    used = [each for each in mine if each.revision == revision]
    if not used or not revision:
        raise InvalidInputError(
            "decision log", "no decision to compare", "let more traffic come, or give --revision"
        )
    with CatalogReader(home) as catalog:
        digest = catalog.revision(revision).head_sha256
    head = HeadReader(home / HEADS_FOLDER).read(digest)
    return Drift(
        revision,
        len(used),
        len(mine) - len(used),
        sum(not each.task for each in used) / len(used),
        head.summary.get("held_out_rejected", math.nan),
        _score_drift(used, head),
        _volume_drift(used),
    )


def _score_drift(used: Sequence[Noted], head: Head) -> tuple[ScoreDrift, ...]:
    found = []
    for number, key in enumerate(head.tasks):
        # A text that comes again says nothing new.
        scores_by_text = {
            each.text: each.score
            for each in used
            if each.best == str(key) and each.score is not None
        }
        scores = np.sort(np.array(list(scores_by_text.values()), np.float64))
        rows, known = 0, None
        if head.calibration is not None:
            rows, known = int(head.calibration[number, 0]), head.calibration[number, 1:]
        distance = p = None
        enough = min(len(scores), rows) >= LEAST_TEXTS
        if enough and known is not None and np.isfinite(known).all():
            distance, p = _kolmogorov_smirnov(scores, known, rows)
        middle = len(CALIBRATION_LEVELS) // 2
        calibrated = None if known is None or not np.isfinite(known).all() else float(known[middle])
        median = float(np.median(scores)) if len(scores) else None
        found.append((str(key), len(scores), rows, distance, p, median, calibrated))
    adjusted = iter(_holm([p for *_, p, _, _ in found if p is not None]))
    drifts = []
    for task, texts, rows, distance, p, median, calibrated in found:
        holm = None if p is None else next(adjusted)
        moved = holm is not None and holm < LEVEL and (distance or 0.0) >= LEAST_DISTANCE
        drifts.append(ScoreDrift(task, texts, rows, distance, holm, median, calibrated, moved))
    return tuple(drifts)


def _kolmogorov_smirnov(
    scores: np.ndarray[tuple[int], np.dtype[np.float64]],
    known: np.ndarray[tuple[int], np.dtype[np.float64]],
    rows: int,
) -> tuple[float, float]:
    """Distance and p of sorted `scores` and the quantiles `known` of `rows` calibration rows."""
    levels = np.array(CALIBRATION_LEVELS)
    upto = np.searchsorted(scores, known, side="right") / len(scores)
    # At a quantile the share of rows up to it is its level, or more by less than one row.
    distance = max(float(np.abs(upto - levels).max()) - 1 / rows, 0.0)
    weight = math.sqrt(len(scores) * rows / (len(scores) + rows))
    return distance, float(kstwobign.sf(distance * weight))


def _volume_drift(used: Sequence[Noted]) -> tuple[VolumeDrift, ...]:
    half = len(used) // 2
    halves = [used[:half], used[half:]]
    before, after = (Counter(each.task for each in part) for part in halves)
    tasks = sorted(before | after)
    tested = []
    for task in tasks if half >= LEAST_TEXTS else []:
        counts = [(part[task], sum(part.values()) - part[task]) for part in (before, after)]
        tested.append((task, counts, float(fisher_exact(counts)[1])))
    drifts = []
    adjusted = _holm([p for *_, p in tested])
    for (task, counts, _), p in zip(tested, adjusted, strict=True):
        was, now = (count / (count + others) for count, others in counts)
        ratio = max(was, now) / max(min(was, now), 1e-9)
        drifts.append(VolumeDrift(task, was, now, p, p < LEVEL and ratio >= LEAST_RATIO))
    return tuple(drifts)


def _holm(p_values: Sequence[float]) -> list[float]:
    """The p values, adjusted for their number (Holm 1979), in the same order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _noted(line: str, where: str) -> Noted:
    try:
        found = json.loads(line)
        score = found["score"]
        return Noted(
            str(found["tenant"]),
            int(found["revision"]),
            str(found["text"]),
            str(found["task"] or _UNKNOWN),
            str(found["best"] or ""),
            None if score is None else float(score),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            where, line.strip(), "give the file of `serve --decision-log`"
        ) from error
