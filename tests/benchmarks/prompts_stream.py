"""Part `stream`: tasks arrive one after the other at the real router; no input names its task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from bench_base_model import Task, computing
from prompts_plan import Bench, Record

from router.bootstrap import load_encoder
from router.embedding_cache import CachingEncoder
from trainer.evaluate_stream import Stream, evaluate_stream
from trainer.evaluation_rows import LabelledText
from trainer.tuning_options import tuning_settings

ORDERS_FILE = "cl15_orders.json"
_CACHE_BYTES = 1 << 29


def stream(bench: Bench) -> Iterator[Record]:
    """The answers, routed and with the oracle's task, for every order that is asked for.

    Every task is registered as a user would: its prompt is tuned when it arrives, with its label
    classifier. Scores are shares of right answers, mean over the tasks.
    """
    model = bench.model("auto")
    encoder = CachingEncoder(load_encoder(), _CACHE_BYTES)
    options = bench.options
    settings = tuning_settings(
        {
            "length": options.length,
            "steps": bench.steps,
            "rows_per_step": options.rows_per_step,
            "learning_rate": options.rate,
            "validations": options.validations,
            "refit": "never",
        }
    )
    with computing(model, options.bf16):
        for name, order in orders(options.data.with_name(ORDERS_FILE), bench.tasks).items():
            if options.orders and name not in options.orders:
                continue
            with TemporaryDirectory() as scratch:
                found = evaluate_stream(
                    _stream(order, bench.tasks), Path(scratch), encoder, model, settings
                )
            answers, over_time = found.answers, found.answers_over_time
            if answers is None or over_time is None:
                raise SystemExit("a stream with prompts has answers")
            yield {
                "order": name,
                "tasks": order,
                "routed": answers.mean.routed,
                "routed_with_rejection": answers.mean.routed_with_rejection,
                "oracle": answers.mean.oracle,
                "prompt_alone": answers.mean.prompt_alone,
                "routing_loss": answers.routing_loss,
                "routed_transfer": over_time.routed_transfer,
                "oracle_transfer": over_time.oracle_transfer,
                "routing_accuracy": found.continual.accuracy,
                "routing_transfer": found.continual.backward_transfer,
                "per_task": {task: asdict(each) for task, each in answers.per_task.items()},
                "seconds": found.seconds,
            }


def orders(path: Path, tasks: Sequence[Task]) -> dict[str, list[str]]:
    """The different orders of the file that name all of the tasks, without what is left out."""
    wanted = {task.job.name for task in tasks}
    found: dict[str, list[str]] = {}
    for name, order in json.loads(path.read_text(encoding="utf-8")).items():
        kept = [task for task in order if task in wanted]
        if isinstance(order, list) and set(kept) == wanted and kept not in found.values():
            found[name] = kept
    return found


def _stream(order: Sequence[str], tasks: Sequence[Task]) -> Stream:
    by_name = {task.job.name: task for task in tasks}
    train = {
        name: [
            LabelledText(number, text, name, output, task.job.instruction)
            for number, (text, output) in enumerate(
                (*task.job.train, *task.job.validation), start=1
            )
        ]
        for name, task in by_name.items()
    }
    test = [
        LabelledText(number, text, name, output)
        for name, task in by_name.items()
        for number, (text, output) in enumerate(task.test, start=1)
    ]
    known = {row.text for rows in train.values() for row in rows}
    return Stream(
        tuple(order),
        train,
        tuple(test),
        {name: name for name in by_name},
        0,
        sum(row.text in known for row in test),
    )
