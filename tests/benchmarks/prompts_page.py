"""The page `docs/benchmarks/prompts.md`, made of measurements; it says which are missing."""

from __future__ import annotations

import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prompts_words import METHODS, WORDS

from trainer.metrics import wilson_interval

Records = Sequence[Mapping[str, Any]]
Table = list[list[str]]
_WIDTH = 100
# Virtual tokens of a prompt where nothing is said.
_LENGTH = 20


@dataclass(frozen=True, slots=True)
class Spread:
    """A middle, and the least and the most that were seen."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float], middle: Callable[[Sequence[float]], float]) -> Spread:
        """`middle` is the mean or the median."""
        return cls(float(middle(values)), min(values), max(values))

    def text(self, form: str) -> str:
        """With the extremes, each in the format `form`; alone where there is one value."""
        if self.least == self.most:
            return f"{self.middle:{form}}"
        return f"{self.middle:{form}} ({self.least:{form}} to {self.most:{form}})"


def page(measurements: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> str:
    """The whole page, as Markdown."""
    measured: defaultdict[str, defaultdict[str, list[Mapping[str, Any]]]]
    measured = defaultdict(lambda: defaultdict(list))
    for each in measurements:
        if each["records"]:
            measured[each["part"]][_setting(each)].append(each)
    missing = [part for part in parts if part not in measured]
    title, text = WORDS["all"]
    lines = [f"# {title}", "", paragraph(text), ""]
    if missing:
        lines += [f"Not measured yet: {', '.join(f'`{part}`' for part in missing)}.", ""]
    for part in parts:
        title, text = WORDS[part]
        lines += [f"## {title}", "", paragraph(f"Part `{part}`. {text}"), ""]
        if part in missing:
            lines += ["Not measured yet.", ""]
        for setting, runs in measured[part].items():
            lines += [paragraph(f"{setting}:"), "", *markdown(TABLES[part](_records(runs))), ""]
            lines += [*_how(runs), ""]
    return "\n".join(lines)


def paragraph(text: str) -> str:
    """In lines of at most `_WIDTH`."""
    return textwrap.fill(" ".join(text.split()), _WIDTH, break_on_hyphens=False)


def markdown(table: Table) -> list[str]:
    """A table, its first row the heading."""
    heading, *rows = table
    return [f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows)]


def _records(runs: Records) -> Records:
    return [
        {**record, "of_tasks": len(run["settings"]["tasks"])}
        for run in runs
        for record in run["records"]
    ]


def _how(runs: Records) -> list[str]:
    """Versions and commands of the runs of a part in one setting."""
    first = runs[0]
    versions = ", ".join(
        f"{name} {value}" for name, value in first["environment"].items() if name != "device"
    )
    lines = [paragraph(f"{versions}. Repeat with:"), ""]
    lines += ["```", *dict.fromkeys(str(run["command"]) for run in runs), "```"]
    if not all(run["complete"] for run in runs):
        lines += ["", "Cut short: some figures are of fewer repeats, seeds or tasks."]
    return lines


def _setting(run: Mapping[str, Any]) -> str:
    """Where and with how much of everything a part was run; what differs there is not mixed."""
    base = run.get("base_model", {})
    digest = f" {base['fingerprint'][:12]}" if "fingerprint" in base else ""
    name = f", base model {base['name']}{digest}" if base else ""
    return f"{run['environment']['device']}{name}, {_sizes(run)}"


def _sizes(run: Mapping[str, Any]) -> str:
    told = run["settings"]
    if run["part"] in ("context", "safety"):
        return (
            f"{told['steps']} steps of {told['rows_per_step']} rows, learning rate {told['rate']}"
        )
    tasks = "one task" if len(told["tasks"]) == 1 else f"{len(told['tasks'])} tasks"
    if run["part"] == "serving-speed":
        rows = f"{told['serving_rows']} rows of {tasks}"
        return f"{rows}, answers of at most {told['new_tokens']} tokens"
    steps = f"{told['steps']} steps of {told['rows_per_step']} rows a task"
    if run["part"] in ("tuning-speed", "costs"):
        return f"{tasks}, {steps}, {told['repeats']} repeats"
    if run["part"] == "stream":
        rows = f"{told['rows']} train, {told['dev_rows']} dev and {told['test_rows']} test rows"
        return f"{tasks}, at most {rows} each, {steps}, learning rate {told['rate']}"
    if told["length"] != _LENGTH:
        steps += f", {told['length']} virtual tokens"
    tried = f"the best of {told['rates']} learning rates with {told['validations']} checks each"
    rows = f"at most {told['dev_rows']} dev and {told['test_rows']} test rows"
    precision = "bfloat16 (autocast)" if told["bf16"] else "float32"
    if run["part"] == "data-size":
        return f"{steps}, learning rate {told['rate']}, {rows}, {precision}"
    return f"{steps}, {tried}, {rows}, {precision}"


def _by(records: Records, *keys: str) -> dict[tuple[Any, ...], Records]:
    groups: defaultdict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in keys)].append(record)
    return dict(groups)


def _times(records: Records) -> Spread:
    return Spread.of([record["seconds"] for record in records], statistics.median)


def tuning_speed(records: Records) -> Table:
    """Tasks an hour, beside PEFT's."""
    sides = _by(records, "side")
    peft = _times(sides[("PEFT",)]).middle if ("PEFT",) in sides else None
    table = [["side", "seconds for all tasks", "tasks an hour", "times PEFT's", "loss at the end"]]
    for (side,), rows in sides.items():
        times = _times(rows)
        hour = 3600 * rows[0]["tasks"] / times.middle
        ratio = f"{peft / times.middle:.2f}" if peft else ""
        loss = statistics.median(row["training_loss"] for row in rows)
        table.append([side, times.text(".2f"), f"{hour:,.0f}", ratio, f"{loss:.3f}"])
    return table


def serving_speed(records: Records) -> Table:
    """Rows a second, beside PEFT's."""
    groups = _by(records, "work", "side")
    table = [["work", "side", "rows a second", "Promptyard is faster by", "same results"]]
    for (work, side), rows in groups.items():
        speed = Spread.of([row["rows"] / row["seconds"] for row in rows], statistics.median)
        ratio = _times(rows).middle / _times(groups[(work, "promptyard")]).middle
        share = f"{100 * rows[0]['as_promptyard']:.0f} %"
        table.append([work, side, speed.text(".1f"), f"{ratio:.2f}", share])
    return table


def costs(records: Records) -> Table:
    """A row for each method."""
    table = [
        [
            *("method", "trainable parameters", "of the base's", "bytes a task"),
            *("training, ms a step", "training memory, MiB", "switch, ms", "latency, ms"),
            "added by the method, ms",
        ]
    ]
    for record in records:
        memory = record.get("training_peak_mib")
        added = record["latency_ms"] - record["base_latency_ms"]
        table.append(
            [
                METHODS[record["method"]],
                f"{record['parameters']:,}",
                f"{100 * record['share_of_base']:.3f} %",
                f"{record['bytes']:,}",
                f"{record['training_ms_a_step']:.1f}",
                "not measured" if memory is None else f"{memory:.0f}",
                f"{record['switch_ms']:.3f}",
                f"{record['latency_ms']:.2f}",
                f"{added:+.2f}",
            ]
        )
    return table


def accuracies(records: Records, column: str = "method") -> dict[str, dict[int, dict[str, float]]]:
    """Test accuracy by way, seed and task: tasks that all ways have, seeds that have all those."""
    found: defaultdict[str, defaultdict[int, dict[str, float]]]
    found = defaultdict(lambda: defaultdict(dict))
    for record in records:
        found[record[column]][record["seed"]][record["task"]] = record["test"]
    shared = set.intersection(*(set().union(*seeds.values()) for seeds in found.values()))
    return {
        way: {
            seed: {task: value for task, value in tasks.items() if task in shared}
            for seed, tasks in seeds.items()
            if shared <= tasks.keys()
        }
        for way, seeds in found.items()
    }


def accuracy(records: Records) -> Table:
    """Mean over the tasks, with its spread over seeds, and each task's mean over seeds."""
    found = accuracies(records)
    names = list(dict.fromkeys(record["task"] for record in records))
    names = [name for name in names if all(_has(seeds, name) for seeds in found.values())]
    full = _mean(found["full"]).middle if found.get("full") else None
    table = [["method", "mean (over seeds)", "of full fine-tuning's", "seeds", *names]]
    for method, seeds in found.items():
        if not seeds:
            continue
        mean = _mean(seeds)
        share = f"{mean.middle / full:.3f}" if full else ""
        per_task = [f"{np.mean([tasks[name] for tasks in seeds.values()]):.3f}" for name in names]
        table.append([METHODS[method], mean.text(".3f"), share, str(len(seeds)), *per_task])
    return table


def _has(seeds: Mapping[int, Mapping[str, float]], name: str) -> bool:
    return all(name in tasks for tasks in seeds.values())


def _mean(seeds: Mapping[int, Mapping[str, float]]) -> Spread:
    """Of the means over tasks."""
    means = [statistics.fmean(tasks.values()) for tasks in seeds.values()]
    return Spread.of(means, statistics.fmean)


def forgetting(records: Records) -> Table:
    """The first task right after it was learned and at the end, and the mean change of all."""
    table = [["method", "first task, then", "first task, at the end", "change", "BWT", "seeds"]]
    for (method,), rows in _by(records, "method").items():
        first = [row for row in rows if row["place"] == 0]
        whole = [seed for seed in _by(rows, "seed").values() if len(seed) == seed[0]["of_tasks"]]
        then, end = ([row[key] for row in first] for key in ("then", "at_the_end"))
        changes = [
            statistics.fmean(
                row["at_the_end"] - row["then"]
                for row in of_seed
                if row["place"] < row["of_tasks"] - 1
            )
            for of_seed in whole
        ]
        table.append(
            [
                METHODS[method],
                Spread.of(then, statistics.fmean).text(".3f"),
                Spread.of(end, statistics.fmean).text(".3f"),
                f"{statistics.fmean(end) - statistics.fmean(then):+.3f}",
                Spread.of(changes, statistics.fmean).text("+.3f") if changes else "cut short",
                str(len(first)),
            ]
        )
    return table


def stream(records: Records) -> Table:
    """A row for each order, and what the orders come to."""
    table = [
        [
            *("order", "right task given", "routed", "points under", "BWT, right task given"),
            *("BWT, routed", "inputs routed right", "prompt alone, right task given"),
        ]
    ]
    for record in records:
        table.append(
            [
                str(record["order"]),
                f"{record['oracle']:.3f}",
                f"{record['routed']:.3f}",
                f"{100 * record['routing_loss']:.2f}",
                f"{100 * record['oracle_transfer']:+.2f}",
                f"{100 * record['routed_transfer']:+.2f}",
                f"{100 * record['routing_accuracy']:.1f} %",
                f"{record['prompt_alone']:.3f}",
            ]
        )
    return table


def data_size(records: Records) -> Table:
    """Mean accuracy over the tasks by rows and start, and how soon the loss is as low."""
    table = [["train rows", "start", "accuracy (over seeds)", "steps to the same loss", "reached"]]
    for (size,), of_size in _by(records, "rows").items():
        for start, seeds in accuracies(of_size, "start").items():
            steps = [row["steps_to_loss"] for row in of_size if row["start"] == start]
            reached = [step for step in steps if step is not None]
            table.append(
                [
                    str(size or "all"),
                    start,
                    _mean(seeds).text(".3f") if seeds else "",
                    f"{statistics.median(reached):.0f}" if reached else "",
                    f"{len(reached)} of {len(steps)}",
                ]
            )
    return table


def context(records: Records) -> Table:
    """A row for each way to tune and to ask."""
    table = [["tuned", "asked", "exact match (over seeds)", "95 % interval", "seeds"]]
    for (tuned, asked), rows in _by(records, "tuned_with", "asked_with").items():
        shares = [row["test"] for row in rows]
        mean = statistics.fmean(shares)
        # Seeds answer the same rows: they make the mean no surer than one of them is.
        interval = wilson_interval(mean * rows[0]["rows"], rows[0]["rows"])
        table.append(
            [
                "with the passage" if tuned else "without it",
                "with the passage" if asked else "without it",
                Spread.of(shares, statistics.fmean).text(".3f"),
                f"{interval.low:.3f} to {interval.high:.3f}",
                str(len(rows)),
            ]
        )
    return table


SAFETY_SIDES = {
    "habit": "before: half of the replies are rejected ones",
    "desired": "after, on desired replies alone",
    "rejected": "after, and told of the rejected ones",
}


def safety(records: Records) -> Table:
    """A row for each prompt, with what became of the probabilities that it started from."""
    table = [
        [
            *("prompt", "p(rejected), mean", "of before", "p(desired), mean", "of before"),
            *("desired replies", "seeds"),
        ]
    ]
    sides = _by(records, "side")
    before = {row["seed"]: row for row in sides.get(("habit",), ())}
    for (side,), rows in sides.items():
        cells = [SAFETY_SIDES[side]]
        for kind in ("rejected", "desired"):
            ratios = [row[kind] / before[row["seed"]][kind] for row in rows]
            cells.append(Spread.of([row[kind] for row in rows], statistics.fmean).text(".3g"))
            cells.append(Spread.of(ratios, statistics.fmean).text(".3g"))
        right = Spread.of([row["right"] for row in rows], statistics.fmean).text(".3f")
        table.append([*cells, right, str(len(rows))])
    return table


TABLES: Mapping[str, Callable[[Records], Table]] = {
    "tuning-speed": tuning_speed,
    "serving-speed": serving_speed,
    "costs": costs,
    "comparison": accuracy,
    "forgetting": forgetting,
    "accuracy": accuracy,
    "stream": stream,
    "data-size": data_size,
    "context": context,
    "safety": safety,
}
