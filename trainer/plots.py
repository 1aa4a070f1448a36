"""Pictures of evaluations, as PNG files in memory. Few tasks are labelled by name, many counted."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from router.interfaces import FloatArray
from router.statistics import ExactArray
from trainer.metrics import Numbers, ReliabilityBin

_DOTS_PER_INCH = 130
_INK = "#1f2933"
_QUIET = "#7b8794"
_GRID = "#e4e7eb"
_ABSENT = "#f1f3f5"
_FIRST, _SECOND = "#2563a8", "#d9622b"

# Up to so many tasks every row and column has its name, and every cell its number.
NAMED_TASKS = 40
_NUMBERED_TASKS = 16
_LONGEST_NAME = 24


def matrix_picture(matrix: ExactArray, order: Sequence[str]) -> bytes:
    """The R matrix `[T, T]` of a stream: rows are arrivals, columns are tasks, NaN is absent."""
    figure, axes = _square(len(order), order)
    lowest = float(np.nanmin(matrix)) if np.isfinite(matrix).any() else 0.0
    # Shares differ near the top: the scale starts at the lowest one that occurs.
    floor = np.floor(min(lowest, 0.9) * 10) / 10
    _heat(figure, axes, matrix, _blues(), floor, 1.0, "share of the task's rows routed to it")
    _label(axes, "test rows of", "after the arrival of")
    return _png(figure)


def confusion_picture(matrix: Numbers, tasks: Sequence[str]) -> bytes:
    """A confusion matrix `[K, K]` of rows by share of the true task's rows.

    Colour is errors: the diagonal is left grey, so that a few stray rows among many can be seen.
    """
    figure, axes = _square(len(tasks), tasks)
    rows = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, rows, out=np.full(matrix.shape, np.nan), where=rows > 0)
    errors = shares.copy()
    np.fill_diagonal(errors, np.nan)
    highest = float(np.nanmax(errors)) if np.isfinite(errors).any() else 0.0
    top = max(np.ceil(highest * 20) / 20, 0.05)
    _heat(figure, axes, errors, _oranges(), 0.0, top, "share of the task's rows sent there", shares)
    _label(axes, "best-scoring task", "true task")
    return _png(figure)


def arrivals_picture(accuracy: Sequence[float], macro: Sequence[float]) -> bytes:
    """Accuracy after every arrival, over rows and over tasks."""
    figure, axes = _wide()
    arrivals = np.arange(1, len(accuracy) + 1)
    marker = "o" if len(accuracy) <= NAMED_TASKS else None
    # Wide under narrow: where tasks have equally many rows the two coincide.
    axes.plot(arrivals, macro, color=_SECOND, lw=5, alpha=0.4, label="mean of tasks")
    axes.plot(arrivals, accuracy, color=_FIRST, lw=1.6, marker=marker, ms=4, label="all rows")
    lowest = min([value for value in (*accuracy, *macro) if np.isfinite(value)], default=0.0)
    axes.set_ylim(max(0.0, np.floor(lowest * 20 - 0.5) / 20), 1.005)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(axes, "tasks in the catalog", "routed to the right task")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    return _png(figure)


def orders_picture(accuracies: Sequence[Sequence[float]]) -> bytes:
    """Accuracy after every arrival in several orders; the first one is dark."""
    figure, axes = _wide()
    for number, accuracy in reversed(list(enumerate(accuracies))):
        first = number == 0
        colour, width = (_FIRST, 1.8) if first else (_QUIET, 0.9)
        arrivals = np.arange(1, len(accuracy) + 1)
        axes.plot(arrivals, accuracy, color=colour, lw=width, alpha=1.0 if first else 0.6)
    values = [value for accuracy in accuracies for value in accuracy if np.isfinite(value)]
    axes.set_ylim(max(0.0, np.floor(min(values, default=0.0) * 20 - 0.5) / 20), 1.005)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(axes, "tasks in the catalog", "routed to the right task")
    return _png(figure)


def score_picture(
    in_scope: FloatArray | ExactArray, out_of_scope: FloatArray | ExactArray
) -> bytes:
    """Histograms of how far scores are over the threshold, in scope and (if any) out of it."""
    figure, axes = _wide()
    values = np.concatenate([in_scope, out_of_scope])
    low, high = np.quantile(values, [0.002, 0.998]) if len(values) else (0.0, 1.0)
    bins = np.linspace(min(low, -0.1), max(high, 0.1), 51).tolist()
    groups = [("in scope", in_scope, _FIRST), ("out of scope", out_of_scope, _SECOND)]
    for name, scores, colour in groups:
        if len(scores):
            weights = np.full(len(scores), 1 / len(scores))
            clipped = np.clip(scores, bins[0], bins[-1])
            axes.hist(clipped, bins, weights=weights, color=colour, alpha=0.55, label=name)
    axes.axvline(0, color=_INK, lw=1, ls="--")
    axes.annotate(
        "unknown ← → accepted",
        (0, 0.97),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="top",
        fontsize=8,
        color=_INK,
        bbox={"boxstyle": "round", "fc": "white", "ec": _GRID},
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _label(axes, "score of the best task, over its threshold", "share of rows")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return _png(figure)


def reliability_picture(bins: Sequence[ReliabilityBin]) -> bytes:
    """A reliability diagram: right rows over their probability, and the rows of each bin."""
    figure = Figure(figsize=(6.4, 5.6), layout="constrained", facecolor="white")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for each in (axes, below):
        each.grid(color=_GRID, lw=0.8)
        each.set_axisbelow(True)
        _quiet(each)
    left = [each.low for each in bins]
    width = bins[0].high - bins[0].low
    axes.plot([0, 1], [0, 1], color=_QUIET, lw=1, ls="--")
    x, right = np.array([(each.mean_probability, each.right) for each in bins]).T
    ends = np.array([(each.interval.low, each.interval.high) for each in bins]).T
    # Rounding may put an end on the other side of its share.
    errors = np.maximum(np.abs(ends - right), 0)
    axes.errorbar(x, right, yerr=errors, color=_FIRST, fmt="o", ms=5, elinewidth=1, alpha=0.9)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    below.bar(left, [each.rows for each in bins], width, align="edge", color=_FIRST, alpha=0.55)
    below.set_yscale("log")
    below.set_ylim(0.7)
    _label(axes, "", "right")
    _label(below, "probability of being right", "rows")
    return _png(figure)


def risk_picture(coverage: ExactArray, risk: ExactArray) -> bytes:
    """The coverage-risk curve: the share of wrong rows among the best-scored ones."""
    figure, axes = _wide()
    # The first few rows say nothing: one wrong among ten is no risk of 10 %.
    shown = coverage >= min(0.02, float(coverage[-1]))
    axes.plot(coverage[shown], risk[shown], color=_FIRST, lw=1.8)
    axes.fill_between(coverage[shown], risk[shown], color=_FIRST, alpha=0.12, lw=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(float(risk[shown].max()) * 1.1, 0.01))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    _label(axes, "answered: rows of the highest scores", "wrong among them")
    return _png(figure)


def map_picture(
    places: Mapping[str, tuple[float, float]],
    accuracy: Mapping[str, float],
    confused: Sequence[tuple[str, str, int]],
) -> bytes:
    """Tasks on a plane, coloured by accuracy; lines join those that are confused, by rows.

    Where there are many, only the tasks that are routed worst have their names.
    """
    figure = Figure(figsize=(8.6, 6.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    _quiet(axes)
    for task, other, rows in confused:
        if task in places and other in places:
            x, y = zip(places[task], places[other], strict=True)
            axes.plot(x, y, color=_SECOND, lw=min(0.6 + 0.3 * rows, 4.0), alpha=0.35, zorder=1)
    names = list(places)
    x, y = np.array([places[name] for name in names]).T
    shares = np.array([accuracy[name] for name in names])
    low = min(float(np.nanmin(shares)) if np.isfinite(shares).any() else 0.9, 0.9)
    drawn = axes.scatter(
        *(x, y), c=shares, cmap=_blues(), vmin=low, vmax=1, s=34, edgecolors=_QUIET, lw=0.6
    )
    bar = figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02, format=PercentFormatter(1.0))
    bar.set_label("share of the task's rows routed to it", color=_INK, fontsize=8)
    bar.ax.tick_params(labelsize=8, colors=_INK, length=2)
    bar.outline.set_visible(False)
    worst = np.argsort(np.nan_to_num(shares, nan=2.0), kind="stable")
    named = worst if len(names) <= NAMED_TASKS else worst[:_NUMBERED_TASKS]
    for number in named:
        axes.annotate(
            _short(names[number]),
            (x[number], y[number]),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            color=_INK,
        )
    axes.margins(0.12)
    _label(axes, "first principal component", "second")
    return _png(figure)


def _square(tasks: int, names: Sequence[str]) -> tuple[Figure, Axes]:
    """Axes for one square cell per pair of tasks, with names where there is room for them."""
    if tasks <= NAMED_TASKS:
        side = 2.6 + 0.34 * tasks if tasks > _NUMBERED_TASKS else 3.2 + 0.42 * tasks
    else:
        side = 9.0
    figure = Figure(figsize=(side + 1.0, side), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    if tasks <= NAMED_TASKS:
        short = [_short(name) for name in names]
        axes.set_xticks(range(tasks), short, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(tasks), short)
    else:
        step = 10 if tasks <= 200 else 10 ** int(np.log10(tasks / 5))
        numbers = [0, *range(step - 1, tasks, step)]
        axes.set_xticks(numbers, [str(n + 1) for n in numbers])
        axes.set_yticks(numbers, [str(n + 1) for n in numbers])
    _quiet(axes)
    return figure, axes


def _wide() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, 3.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    _quiet(axes)
    return figure, axes


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)


def _quiet(axes: Axes) -> None:
    axes.tick_params(colors=_INK, labelsize=8, length=2, color=_QUIET)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_QUIET)


def _heat(
    figure: Figure,
    axes: Axes,
    values: ExactArray,
    colours: Colormap,
    low: float,
    high: float,
    meaning: str,
    numbers: ExactArray | None = None,
) -> None:
    """Draw `values`, NaN in grey. `numbers` are written where there is room (default: `values`)."""
    axes.set_facecolor(_ABSENT)
    drawn = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, interpolation="nearest"
    )
    bar = figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02, format=PercentFormatter(1.0))
    bar.set_label(meaning, color=_INK, fontsize=8)
    bar.ax.tick_params(labelsize=8, colors=_INK, length=2)
    bar.outline.set_visible(False)
    if len(values) > _NUMBERED_TASKS:
        return
    written = values if numbers is None else numbers
    for row, column in np.argwhere(np.isfinite(written)):
        share = float(written[row, column])
        if share == 0:
            continue
        shade = float(values[row, column])
        dark = np.isfinite(shade) and shade - low > 0.6 * (high - low)
        axes.text(
            column,
            row,
            f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}",
            ha="center",
            va="center",
            fontsize=7,
            color="white" if dark else _INK,
        )


def _blues() -> Colormap:
    return LinearSegmentedColormap.from_list("blues", ["#f7fbff", "#9ec5e6", _FIRST])


def _oranges() -> Colormap:
    return LinearSegmentedColormap.from_list("oranges", ["#ffffff", "#f7c7a8", _SECOND, "#7a2e0e"])


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    # No date and no version: equal evaluations give equal files.
    figure.savefig(file, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return file.getvalue()
