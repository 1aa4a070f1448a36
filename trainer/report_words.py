"""How reports say figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer.metrics import Interval
from trainer.report import Table


def summary_table(rows: Sequence[Sequence[str]]) -> Table:
    """The first table of a report: figure, value, remark."""
    return Table("Summary", ("figure", "value", ""), rows)


def percent(share: float) -> str:
    """A share, or `-` where it is not defined."""
    return "-" if math.isnan(share) else f"{100 * share:.2f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points, or `-`."""
    return "-" if math.isnan(difference) else f"{100 * difference:+.2f}"


def interval_in_words(interval: Interval) -> str:
    """A 95 % interval, empty where it is not defined."""
    if math.isnan(interval.low):
        return ""
    return f"95 % interval {100 * interval.low:.1f} to {100 * interval.high:.1f}"


def number(value: float) -> str:
    """A number, or `-` where it is not finite."""
    return f"{value:.3f}" if math.isfinite(value) else "-"
