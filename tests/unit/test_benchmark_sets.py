"""The small sets of the benchmark of prompts say what the page says of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from trainer.data import Fields, read_labelled

SETS = Path(__file__).parents[1] / "benchmarks" / "data"


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SETS / f"{name}.jsonl").read_text().splitlines()]


def test_every_passage_holds_its_answer_and_no_two_rows_share_one() -> None:
    rows = rows_of("context")
    assert Counter(row["split"] for row in rows) == {"train": 192, "dev": 48, "test": 80}
    assert all(row["output"] in row["context"] for row in rows)
    assert not any(row["output"] in row["input"] for row in rows)
    assert len({row["context"] for row in rows}) == len(rows)
    # Every answer of a test row occurs in training: what is new is where it stands.
    known = {row["output"] for row in rows if row["split"] == "train"}
    assert {row["output"] for row in rows} == known


def test_no_message_is_in_two_splits_and_no_reply_is_both_wanted_and_rejected() -> None:
    rows = rows_of("safety")
    assert Counter(row["split"] for row in rows) == {"train": 120, "dev": 36, "test": 84}
    assert len({row["input"] for row in rows}) == len(rows)
    wanted = {row["output"] for row in rows}
    assert wanted.isdisjoint(reply for row in rows for reply in row["rejected"])


def test_a_user_could_register_them() -> None:
    for name in ("context", "safety"):
        file = read_labelled(SETS / f"{name}.jsonl", Fields(), with_output=True)
        assert len(file.examples) == len(rows_of(name))
