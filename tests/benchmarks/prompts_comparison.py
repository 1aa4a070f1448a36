"""Parts `costs`, `comparison` and `forgetting`: the ways to teach a task, side by side."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from bench_base_model import Task, computing
from prompts_accuracy import best_prompts, of_tests
from prompts_learners import Learner, Schedule, new_learner, search, taught, train
from prompts_plan import Bench, Record, quality_of, seconds_of

from router.backends.rows import Row
from router.backends.torch_model import TorchLanguageModel
from router.tasks import PromptMethod

PROMPT_METHODS: Mapping[str, PromptMethod] = {"prompt": "prompt", "prefix": "prefix"}
_LATENCY_ROWS = 40
_MIB = 1 << 20


def comparison(bench: Bench) -> Iterator[Record]:
    """Test accuracy of every method, each task by itself."""
    model = bench.model()
    with computing(model, bench.options.bf16):
        for seed in bench.seeds:
            for task in bench.tasks:
                for method in bench.options.methods:
                    yield {"method": method, **taught(model, task, method, bench, seed)}


def forgetting(bench: Bench) -> Iterator[Record]:
    """Tasks one after the other in the same weights: test accuracy right after, and at the end.

    Prompts and prefixes share no weights, so that all are tuned together; they are measured alone
    (then) and in the batches of all tasks (at the end).
    """
    base = bench.model()
    with computing(base, bench.options.bf16):
        for seed in bench.seeds:
            for method in bench.options.methods:
                if method in PROMPT_METHODS:
                    yield from _beside_each_other(base, PROMPT_METHODS[method], bench, seed)
                else:
                    yield from _sequence(base, method, bench, seed)


def _beside_each_other(
    base: TorchLanguageModel, method: PromptMethod, bench: Bench, seed: int
) -> Iterator[Record]:
    tuned = best_prompts(base, method, bench, seed)
    prompts = [each.prompt for each in tuned]
    then = [
        of_tests(base, [task], [prompt])[0]
        for task, prompt in zip(bench.tasks, prompts, strict=True)
    ]
    at_the_end = of_tests(base, bench.tasks, prompts)
    for place, (task, each) in enumerate(zip(bench.tasks, tuned, strict=True)):
        yield {
            "method": method,
            "seed": seed,
            "place": place,
            "task": task.job.name,
            "rate": each.rate,
            "then": then[place],
            "at_the_end": at_the_end[place],
        }


def _sequence(base: TorchLanguageModel, method: str, bench: Bench, seed: int) -> Iterator[Record]:
    learner = new_learner(method, base, bench.tasks[0], bench.options.length)
    then: list[float] = []
    found = []
    for task in bench.tasks:
        found.append(search(learner, task, bench, seed))
        then.append(_test(learner, task))
    for place, task in enumerate(bench.tasks):
        yield {
            "method": method,
            "seed": seed,
            "place": place,
            "task": task.job.name,
            "rate": found[place].rate,
            "then": then[place],
            "at_the_end": _test(learner, task),
        }


def _test(learner: Learner, task: Task) -> float:
    return quality_of(learner.model, learner.trial(task, task.test)).score


def costs(bench: Bench) -> Iterator[Record]:
    """What each method takes: numbers, bytes, memory and time of training, switching, latency."""
    base = bench.model()
    task = bench.tasks[0]
    with computing(base, bench.options.bf16):
        for method in bench.options.methods:
            yield _costs(base, task, method, bench)


def _costs(base: TorchLanguageModel, task: Task, method: str, bench: Bench) -> Record:
    options = bench.options
    learner = new_learner(method, base, task, options.length)
    count = sum(tensor.numel() for tensor in learner.trained)
    record: Record = {
        "method": method,
        "task": task.job.name,
        "parameters": count,
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in learner.trained),
        "share_of_base": count / sum(weights.numel() for weights in base.network.parameters()),
    }
    _restart_memory(base.device)
    times = [_training_seconds(learner, task, bench) for _ in range(options.repeats)]
    record["training_ms_a_step"] = 1000 * statistics.median(times) / bench.steps
    if base.device.type == "cuda":
        # The base is there twice for what changes the network: a trainer needs one.
        twice = 0 if learner.is_prompt else _bytes(base)
        peak = torch.cuda.max_memory_allocated(base.device) - twice
        record["training_peak_mib"] = peak / _MIB
    kept = [tensor.detach().cpu().clone() for tensor in learner.trained]
    switches = [seconds_of(lambda: learner.load(kept), base.device) for _ in range(_LATENCY_ROWS)]
    record["switch_ms"] = 1000 * statistics.median(switches)
    record |= _latency(base, learner, task, options.length)
    return record


def _training_seconds(learner: Learner, task: Task, bench: Bench) -> float:
    """Of `bench.steps` steps, after as many that are not counted."""
    rate = bench.rates(learner.method)[0]
    run = train(learner, task, Schedule(rate, 2 * bench.steps, bench.options.rows_per_step, 2, 0))
    next(run)
    return seconds_of(lambda: next(run), learner.model.device)


def _latency(
    base: TorchLanguageModel, learner: Learner, task: Task, length: int
) -> dict[str, object]:
    """Of scoring a task's labels for one input, alone in its batch; no instruction on either side.

    Base and method take turns, so that what else the machine does meets both.
    """
    labels = [base.tokenize_output(label) for label in task.job.labels or ()]
    texts = [text for text, _ in task.job.validation[:_LATENCY_ROWS]]
    tokens = base.tokenize_inputs(
        texts, [length] * len(texts), [max(map(len, labels))] * len(texts)
    )
    trial = learner.trial(task, ())
    plain, taught_ms = [], []
    for turn in range(2):
        for text in tokens:
            bare = Row(None, text.ids)
            row = Row(trial.prompt, text.ids, trial.method) if learner.is_prompt else bare
            first = _milliseconds(base, bare, labels)
            second = _milliseconds(learner.model, row, labels)
            if turn:  # the first turn warms up
                plain.append(first)
                taught_ms.append(second)
    return {
        "base_latency_ms": statistics.median(plain),
        "latency_ms": statistics.median(taught_ms),
    }


def _milliseconds(model: TorchLanguageModel, row: Row, labels: Sequence[Sequence[int]]) -> float:
    return 1000 * seconds_of(lambda: model.score_rows([row], [labels]), model.device)


def _restart_memory(device: torch.device) -> None:
    """Count a GPU's peak from here on."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _bytes(model: TorchLanguageModel) -> int:
    return sum(weights.numel() * weights.element_size() for weights in model.network.parameters())
