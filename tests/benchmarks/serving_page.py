"""The page `docs/benchmarks/serving.md`, made of measurements; it says which are missing."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.benchmarks.peer_worker import OUR_ENCODER, THEIR_ENCODER

Measured = Mapping[str, Any]
Table = list[list[str]]
_WIDTH = 100
# Promised in a queue of routing: who would wait longer is refused.
QUEUE_SECONDS = 2.0

INTRODUCTION = """Client processes of their own call a real `promptyard serve` process over a real
channel on the same machine, whose cores both sides share. What is compared is measured in turn in
the same run; figures are medians over the rounds, with the least and the most in brackets, and
ratios are of the same round. The cache of embeddings is off, as the texts come again."""

TITLES = {
    "route": "One caller",
    "stages": "Where the time of one Route goes",
    "rates": "Many callers",
    "fast": "Many callers, the fast encoder",
    "generate": "Answers",
    "overload": "Overload",
}


def page(parts: Mapping[str, Measured]) -> str:
    """The whole page, as Markdown, of the parts that were measured."""
    lines = ["# Serving", "", paragraph(INTRODUCTION), ""]
    for part, title in TITLES.items():
        lines += [f"## {title}", ""]
        if part not in parts:
            lines += [f"Part `{part}` is not measured yet.", ""]
            continue
        measured = parts[part]
        lines += [*PAGES[part](measured["figures"]), ""]
        told = measured["environment"]
        load = f"load of the machine before it began {told['load']:.1f}"
        about = f"{told['date']}, {told['cores']} cores, {load}; {told['platform']}. Repeat with:"
        lines += [paragraph(about), "", "```", measured["command"], "```", ""]
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """In lines of at most `_WIDTH`."""
    return textwrap.fill(" ".join(text.split()), _WIDTH, break_on_hyphens=False)


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, with the least and the most."""
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:{form}}"
    return f"{middle:{form}} ({min(values):{form}} to {max(values):{form}})"


def markdown(table: Table) -> list[str]:
    """A table, its first row the heading."""
    heading, *rows = table
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def _aim(what: str, values: Sequence[float], aim: float, form: str = ".2f", *, most: bool) -> list:
    """A row of the table of aims: does the median hold it?"""
    middle = statistics.median(values)
    holds = middle <= aim if most else middle >= aim
    word = "at most" if most else "at least"
    return [what, spread(values, form), f"{word} {aim:{form}}", "yes" if holds else "**no**"]


_AIMS = ["ratio", "measured", "aim", "holds"]


def _route(figures: Measured) -> list[str]:
    rounds = figures["rounds"]
    table: Table = [["call", "median, ms"]]
    table += [[name, spread([1e3 * row[name] for row in rounds])] for name in rounds[0]]
    aims: Table = [_AIMS]
    cost = [row["Route"] / (row["encoder alone"] + row["empty gRPC call"]) for row in rounds]
    aims.append(_aim("`Route` / (encoder + empty gRPC call)", cost, 1.5, most=True))
    if not figures["missing"]:
        faster = [row[THEIR_ENCODER] / row["Route"] for row in rounds]
        aims.append(_aim(f"{THEIR_ENCODER} / `Route`", faster, 8.0, ".1f", most=False))
        ours = [row[OUR_ENCODER] / row["Route"] for row in rounds]
        aims.append([f"{OUR_ENCODER} / `Route`", spread(ours, ".1f"), "", ""])
    text = f"Texts of at most 15 words, {figures['calls']} calls a round."
    if figures["missing"]:
        text += (
            f" semantic-router was not measured ({figures['missing']}): install"
            " semantic-router==1.1.1 into an environment of its own and give the folder of its"
            " packages with --semantic-router."
        )
    else:
        text += (
            f" semantic-router {figures['semantic-router']} (`IndexedRouter`) is called in its own"
            " process, with no network between: over the same tasks and training rows, with the"
            " same MiniLM weights through its `HuggingFaceEncoder` (torch, float32), and with our"
            " encoder in place of that one."
        )
    return [paragraph(text), "", *markdown(table), "", *markdown(aims)]


def _stages(figures: Measured) -> list[str]:
    rounds = figures["rounds"]

    def row(name: str, of: Callable[[Measured], float]) -> list[str]:
        shares = statistics.median(100 * of(each) / each["client"] for each in rounds)
        return [name, spread([1e6 * of(each) for each in rounds], ".0f"), f"{shares:.0f} %"]

    table = [
        ["stage", "mean, microseconds", "of the call"],
        row(
            "outside the handler: client, channel, reading and writing messages",
            lambda r: r["client"] - r["handler"],
        ),
        row(
            "handler around the queue: admission, checks, wake-up when the batch is done",
            lambda r: r["handler"] - r["routing_wait"] - r["routing_work"],
        ),
        row("wait for the worker thread", lambda r: r["routing_wait"]),
        row("encoder (tokenizer and network)", lambda r: r["routing_encode"]),
        row("decision (head, index, thresholds, metrics)", lambda r: r["routing_decide"]),
        row(
            "rest of the batch",
            lambda r: r["routing_work"] - r["routing_encode"] - r["routing_decide"],
        ),
        row("**the whole call, as the client sees it**", lambda r: r["client"]),
        row("floor: encoder alone, in a process of its own", lambda r: r["encoder alone"]),
        row("floor: its tokenizer", lambda r: r["tokenizer alone"]),
        row("floor: empty gRPC call to the same server", lambda r: r["empty gRPC call"]),
    ]
    text = f"""From the server's own metrics, {figures["calls"]} calls of one caller a round. Means,
    as a sum of stages has no median; the floors are means as well."""
    return [paragraph(text), "", *markdown(table)]


def _rates(figures: Measured) -> list[str]:
    rounds = figures["rounds"]
    names = {
        "encoder": "encoder alone, batches of 32",
        "empty service": f"empty gRPC service, {figures['callers']} callers",
        "Route": f"`Route`, {figures['callers']} callers",
        "StreamRoute": "`StreamRoute`, 4 streams with 16 texts on their way each",
        "BatchRoute": "`BatchRoute`, 4 callers with 32 texts each",
    }
    table = _rate_table(rounds, names)

    def ratio(over: str, under: str) -> list[float]:
        return _rate_ratios(rounds, over, under)

    aims = [
        _AIMS,
        _aim("`Route` / encoder", ratio("Route", "encoder"), 0.5, most=False),
        _aim("`StreamRoute` / encoder", ratio("StreamRoute", "encoder"), 0.75, most=False),
        _aim("`BatchRoute` / encoder", ratio("BatchRoute", "encoder"), 0.75, most=False),
        ["`Route` / empty gRPC service", spread(ratio("Route", "empty service")), "", ""],
    ]
    text = f"""Texts of at most 15 words, two client processes, {figures["seconds"]:g} seconds a
    run. Times are of a call; of a stream, from writing a text to its answer. A call of `BatchRoute`
    holds 32 texts. While the server routes, the clients use the same cores; the encoder alone has
    them to itself."""
    return [paragraph(text), "", *markdown(table), "", *markdown(aims)]


def _fast(figures: Measured) -> list[str]:
    rounds = figures["rounds"]
    names = {
        "empty service": f"empty gRPC service, {figures['callers']} callers",
        "Route": f"`Route`, {figures['callers']} callers",
        **{
            name: f"`BatchRoute`, 4 callers with {name.split()[1]} texts each"
            for name in rounds[0]
            if name.startswith("BatchRoute")
        },
    }
    largest = list(names)[-1]
    unary = _rate_ratios(rounds, "Route", "empty service")
    batches = [row[largest]["rate"] for row in rounds]
    aims = [
        _AIMS,
        _aim("`Route` / empty gRPC service", unary, 0.6, most=False),
        _aim(f"{names[largest]}, decisions a second", batches, 10_000.0, ",.0f", most=False),
    ]
    text = f"""As above, {figures["seconds"]:g} seconds a run, with `--encoder fast` and tasks that
    were registered with it."""
    return [paragraph(text), "", *markdown(_rate_table(rounds, names)), "", *markdown(aims)]


def _rate_table(rounds: Sequence[Measured], names: Mapping[str, str]) -> Table:
    """What was measured by the keys of `names`, under these names."""
    table: Table = [
        ["", "texts a second", "p50, ms", "p99, ms", "server CPU a text, ms", "client CPU, ms"]
    ]
    for key, name in names.items():
        rows = [each[key] for each in rounds]
        cells = [name, spread([row["rate"] for row in rows], ",.0f")]
        for field in ("p50", "p99", "server cpu a text", "client cpu a text"):
            known = field in rows[0]
            cells.append(spread([1e3 * row[field] for row in rows]) if known else "")
        table.append(cells)
    return table


def _rate_ratios(rounds: Sequence[Measured], over: str, under: str) -> list[float]:
    return [row[over]["rate"] / row[under]["rate"] for row in rounds]


def _generate(figures: Measured) -> list[str]:
    rounds = figures["rounds"]
    table: Table = [["", "answers a second", "p50, ms", "p99, ms", "refused"]]
    for name in rounds[0]:
        rows = [each[name] for each in rounds]
        times = [spread([1e3 * row[key] for row in rows], ".0f") for key in ("p50", "p99")]
        refused = spread([row["refused"] for row in rows], ".0f")
        table.append([name, spread([row["rate"] for row in rows], ".1f"), *times, refused])
    many = [row["mixed"]["rate"] / row["one at a time"]["rate"] for row in rounds]
    switching = [row["mixed"]["rate"] / row["one task after the other"]["rate"] for row in rounds]
    aims = [
        _AIMS,
        _aim("mixed, 64 callers / one at a time", many, 4.0, most=False),
        _aim("mixed / one task after the other", switching, 0.95, most=False),
    ]
    text = f"""`Generate` of {figures["tasks"]} named tasks, {figures["answers"]} answers a run with
    {figures["callers"]} callers in two processes, {figures["one at a time"]} of them one at a time.
    Ten tasks have a closed set of outputs, six are free text of at most 16 tokens. The prompts are
    untuned, which changes no time. Mixed and one after the other are the same requests in two
    orders, so that they differ in nothing but the switching of tasks."""
    return [paragraph(text), "", *markdown(table), "", *markdown(aims)]


def _overload(figures: Measured) -> list[str]:
    table: Table = [["", "calls", "p50, ms", "p99, ms"]]
    for name in ("unloaded", "at capacity", "accepted", "refused", "afterwards"):
        times = figures[name]
        table.append([name, f"{times['n']:,}", *(f"{1e3 * times[k]:.1f}" for k in ("p50", "p99"))])
    bound = 3 * figures["unloaded"]["p99"] + QUEUE_SECONDS
    memory = figures["memory, MiB"]
    tenth = max(len(memory) // 10, 1)
    begin, end = (statistics.median(part) for part in (memory[:tenth], memory[-tenth:]))
    growth = 100 * (end / begin - 1)
    aims = [
        ["", "measured", "aim", "holds"],
        _aim(
            "p99 of accepted calls, s (3 times the unloaded one, and the queue's limit)",
            [figures["accepted"]["p99"]],
            bound,
            most=True,
        ),
        _aim("p99 of refusals, ms", [1e3 * figures["refused"]["p99"]], 50.0, ".0f", most=True),
        _aim("growth of memory, last tenth to first tenth, %", [growth], 5.0, ".1f", most=True),
    ]
    codes = ", ".join(f"{count:,} {code}" for code, count in sorted(figures["codes"].items()))
    before = figures["memory before, MiB"]
    text = f"""Texts of 150 words, so that it is the server that is overloaded and not the clients
    on its cores. The server does {figures["capacity"]:.0f} of them a second for 64 callers. It was
    offered {figures["offered"]:.0f} a second (the clients came to
    {figures["really offered"]:.0f}) for {figures["seconds"]:g} seconds, whatever became of the
    earlier ones, and answered {figures["accepted rate"]:.0f} a second. The calls ended with:
    {codes}. Memory: {before:.0f} MiB before, {begin:.0f} in the first tenth of the time,
    {end:.0f} in the last, {max(memory):.0f} at most. The clients used
    {100 * figures["client cpu share"]:.0f} % of a core."""
    return [paragraph(text), "", *markdown(table), "", *markdown(aims)]


PAGES: Mapping[str, Callable[[Measured], list[str]]] = {
    "route": _route,
    "stages": _stages,
    "rates": _rates,
    "fast": _fast,
    "generate": _generate,
    "overload": _overload,
}
