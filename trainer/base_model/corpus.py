"""Reads the rows that may be trained on, source by source."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.base_model.overlap import BenchmarkText
from trainer.base_model.sources import (
    HELD_OUT_WORDS,
    INSTRUCTION_INDUCTION_TASKS,
    NATURAL_INSTRUCTIONS_V1,
    SUPERNI_SOURCES,
)

NLI_LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True, slots=True)
class InstructionTask:
    """A task as its authors wrote it: an instruction, and rows of (input, output)."""

    source: str
    instruction: str
    rows: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two sentences and how the second relates to the first."""

    first: str
    second: str
    label: str


@dataclass(slots=True)
class Corpus:
    """All text that the training tasks are made from; none of it repeats a benchmark."""

    instruction_tasks: dict[str, InstructionTask] = field(default_factory=dict)
    entailment: list[LabelledPair] = field(default_factory=list)
    science_entailment: list[LabelledPair] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)
    """HWU64: text, and an intent such as `alarm_set` whose first part is the domain."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Snips: text, and one of 7 intents."""
    questions: list[tuple[str, float]] = field(default_factory=list)
    """Questions, and the share of raters who found them well formed."""
    splits: list[tuple[str, str, str]] = field(default_factory=list)
    """A Wikipedia sentence, and the two sentences that say the same."""
    narratives: list[str] = field(default_factory=list)
    """Paragraphs in the first person, questions to experts, opinions on films."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many rows of which source repeated a benchmark."""


def read_corpus(data: Path) -> Corpus:
    """Read what the licences allow, and leave out what the benchmarks hold.

    Args:
        data: The folder with `cl/`, `pairs/` and `routing/`.
    """
    return _Reader(data).read()


def read_lines(data: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows of one gzipped JSONL file, named without its ending."""
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


class _Reader:
    def __init__(self, data: Path) -> None:
        self._data = data
        self._benchmarks = read_benchmarks(data)
        self._corpus = Corpus()

    def read(self) -> Corpus:
        self._read_superni()
        self._read_natural_instructions()
        self._read_instruction_induction()
        self._read_entailment()
        self._read_commands()
        self._read_questions()
        self._read_splits()
        self._collect_narratives()
        return self._corpus

    def _allowed(self, source: str, *texts: str) -> bool:
        """Whether none of the texts repeats a benchmark; counts the rows that do."""
        allowed = not any(self._benchmarks.repeats(text) for text in texts)
        self._corpus.dropped[source] += not allowed
        return allowed

    def _add(self, task: str, source: str, instruction: str, row: dict[str, Any]) -> None:
        given, wanted = str(row["input"]).strip(), _plain(str(row["output"]))
        if given and wanted and self._allowed(source, given):
            empty = InstructionTask(source, instruction)
            self._corpus.instruction_tasks.setdefault(task, empty).rows.append((given, wanted))

    def _read_superni(self) -> None:
        facts = {row["task"]: row for row in read_lines(self._data, "cl/superni_tasks")}
        sources = {task: _superni_source(task, row) for task, row in facts.items()}
        for row in read_lines(self._data, "cl/superni"):
            if source := sources[row["task"]]:
                self._add(row["task"], source, facts[row["task"]]["definition"], row)

    def _read_natural_instructions(self) -> None:
        for row in read_lines(self._data, "cl/natural_instructions_v1"):
            source = row["task"].split("_")[1]
            if source in NATURAL_INSTRUCTIONS_V1:
                self._add(f"v1_{row['task']}", source, row["instruction"], row)

    def _read_instruction_induction(self) -> None:
        for row in read_lines(self._data, "cl/instruction_induction"):
            if row["task"] in INSTRUCTION_INDUCTION_TASKS:
                instruction = f"Write the answer: {row['task'].replace('_', ' ')}."
                name = f"induction_{row['task']}"
                self._add(name, "instruction_induction", instruction, row)

    def _read_entailment(self) -> None:
        kept = {"snli": self._corpus.entailment, "snli_cad": self._corpus.entailment}
        kept["scitail"] = self._corpus.science_entailment
        seen: set[tuple[str, str]] = set()
        for row in read_lines(self._data, "pairs/nli_mixed"):
            pair = (row["a"].strip(), row["b"].strip())
            if row["task"] not in kept or row["cl15_test"] or pair in seen:
                continue
            seen.add(pair)
            if self._allowed(row["task"], *pair):
                kept[row["task"]].append(LabelledPair(*pair, row["label"]))

    def _read_commands(self) -> None:
        for source, kept in (("hwu64", self._corpus.commands), ("snips", self._corpus.requests)):
            for row in read_lines(self._data, f"routing/{source}"):
                if row["split"] == "train" and self._allowed(source, row["text"]):
                    kept.append((row["text"].strip(), row["label"]))

    def _read_questions(self) -> None:
        for row in read_lines(self._data, "routing/query_wellformedness"):
            if self._allowed("google_wellformed_query", row["text"]):
                self._corpus.questions.append((row["text"].strip(), float(row["label"])))

    def _read_splits(self) -> None:
        for row in read_lines(self._data, "pairs/wikisplit"):
            parts = [part.strip() for part in row["b"].split("  ") if part.strip()]
            if len(parts) == 2 and self._allowed("wikisplit", row["a"], *parts):
                self._corpus.splits.append((row["a"].strip(), parts[0], parts[1]))

    def _collect_narratives(self) -> None:
        found: set[str] = set()
        for task in self._corpus.instruction_tasks.values():
            if task.source in ("cosmosqa", "doqa", "coached_conv_pref", "circa", "librispeech"):
                found.update(
                    re.sub(r"^\s*CONTEXT:\s*", "", row, flags=re.I) for row, _ in task.rows
                )
        self._corpus.narratives = sorted(text for text in found if len(text.split()) >= 4)


def read_benchmarks(data: Path) -> BenchmarkText:
    """Every text of the benchmarks; 13-word overlap is tested against the test rows of the 15."""
    texts: list[str] = []
    long_texts: list[str] = []
    for row in read_lines(data, "cl/cl15"):
        texts.append(row["input"])
        if row["split"] == "test":
            long_texts.append(row["input"])
    for name in ("clinc150_full", "clinc150_imbalanced", "clinc-single-domain-oos", "banking77"):
        texts.extend(row["text"] for row in read_lines(data, f"routing/{name}"))
    return BenchmarkText(texts, long_texts)


def _superni_source(task: str, facts: dict[str, Any]) -> str | None:
    """The one allowed source of a Super-NaturalInstructions task; None where it has another."""
    names = facts.get("source") or []
    words = set(re.split(r"[^a-z0-9]+", " ".join([task, *names]).lower()))
    held_out = not words.isdisjoint(HELD_OUT_WORDS)
    if held_out or not facts.get("english_only") or not names:
        return None
    sources = {SUPERNI_SOURCES.get(name) for name in names}
    return sources.pop() if len(sources) == 1 else None


def _plain(output: str) -> str:
    """The output without the brackets of a list that was written as text."""
    return re.sub(r"^\[\s*['\"]?|['\"]?\s*\]$", "", output.strip()).strip()


def group_by_label(rows: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Texts by label, labels sorted."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for text, label in rows:
        groups[label].append(text)
    return {label: groups[label] for label in sorted(groups)}
