"""Labelled files: the good ones whatever their format, the bad ones with a clear error."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from router.errors import InvalidInputError
from tests.forks import ForkServer
from tests.mounts import other_user
from trainer.data import (
    MAX_INPUT_BYTES,
    MAX_OUTPUT_BYTES,
    Example,
    Fields,
    LabelledFile,
    closed_outputs,
    read_labelled,
    read_rows,
    split,
    summarise,
)

Row = Mapping[str, object]

ROWS: list[Row] = [
    {"input": "the sun shines", "output": "weather"},
    {"input": "a late goal", "output": "sport"},
    {"input": 'quoted "text", with a comma', "output": "weather"},
    {"input": "two\nlines", "output": "sport"},
    {"input": "größe 天気 🙂", "output": "weather"},
]
FORMATS = ("jsonl", "ndjson", "json", "jsonl.gz", "csv", "csv.gz", "parquet")


def write(path: Path, rows: Sequence[Row]) -> Path:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return path
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def read(path: Path, **options: object) -> LabelledFile:
    return read_labelled(path, **options)  # type: ignore[arg-type]


def refused(path: Path, *parts: str, **options: object) -> str:
    """Reading fails, and the message says all of `parts`."""
    with pytest.raises(InvalidInputError) as caught:
        read(path, **options)
    message = str(caught.value)
    for part in (str(path), *parts):
        assert part in message
    assert len(message) < 500
    assert "\n" not in message
    return message


# Good files


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    file = read(write(tmp_path / f"rows.{kind}", ROWS))
    assert set(file.examples) == {Example(str(r["input"]), str(r["output"])) for r in ROWS}
    assert file.sha256 == read(write(tmp_path / "again.jsonl", ROWS)).sha256
    assert file.duplicates_dropped == 0


@settings(max_examples=20)
@given(rng=st.randoms(use_true_random=False))
def test_neither_order_nor_digest_depend_on_the_order_of_the_file(
    rng: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("order")
    shuffled = list(ROWS)
    rng.shuffle(shuffled)
    file = read(write(folder / "shuffled.jsonl", shuffled))
    expected = read(write(folder / "rows.jsonl", ROWS))
    assert file.examples == expected.examples
    assert file.sha256 == expected.sha256


def test_the_digest_is_that_of_the_rows_and_nothing_else(tmp_path: Path) -> None:
    digests = {
        read(write(tmp_path / f"{n}.jsonl", rows)).sha256
        for n, rows in enumerate(
            [
                ROWS,
                ROWS[:-1],
                [*ROWS[:-1], {**ROWS[-1], "output": "sport"}],
                [*ROWS[:-1], {**ROWS[-1], "input": "other"}],
            ]
        )
    }
    assert len(digests) == 4
    more = [{**row, "comment": "not read"} for row in ROWS]
    assert read(write(tmp_path / "more.jsonl", more)).sha256 in digests
    # The border between input and output counts.
    pair = [
        [{"input": "ab", "output": "c"}, {"input": "x", "output": "y"}],
        [{"input": "a", "output": "bc"}, {"input": "x", "output": "y"}],
    ]
    first, second = (read(write(tmp_path / f"pair{n}.jsonl", r)).sha256 for n, r in enumerate(pair))
    assert first != second


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x", "input": "?"}, {"text": "b", "label": "y", "input": "?"}]
    file = read(write(tmp_path / "rows.csv", rows), fields=Fields("text", "label"))
    assert set(file.examples) == {Example("a", "x"), Example("b", "y")}


def test_for_routing_alone_outputs_are_not_read(tmp_path: Path) -> None:
    rows = [{"input": "a"}, {"input": "b", "output": ["anything"]}]
    file = read(write(tmp_path / "rows.jsonl", rows), with_output=False)
    assert set(file.examples) == {Example("a", ""), Example("b", "")}


def test_numbers_and_truth_values_are_labels_too(tmp_path: Path) -> None:
    rows = [
        {"input": 1, "output": True},
        {"input": 2.5, "output": False},
        {"input": "a", "output": 0},
    ]
    file = read(write(tmp_path / "rows.jsonl", rows))
    assert set(file.examples) == {Example("1", "true"), Example("2.5", "false"), Example("a", "0")}


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = "\r\n\r\n".join(json.dumps(row) for row in ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read(path).sha256 == read(write(tmp_path / "plain.jsonl", ROWS)).sha256
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbfinput,output\r\na,x\r\nb,y\r\n")
    assert set(read(path).examples) == {Example("a", "x"), Example("b", "y")}


def test_the_longest_input_is_accepted_in_every_format_and_escaped_too(tmp_path: Path) -> None:
    for text in ("x" * MAX_INPUT_BYTES, "é" * (MAX_INPUT_BYTES // 2), "\x07" * MAX_INPUT_BYTES):
        rows = [{"input": text, "output": "y" * MAX_OUTPUT_BYTES}, {"input": "b", "output": "z"}]
        for kind in FORMATS:
            assert len(read(write(tmp_path / f"long.{kind}", rows)).examples) == 2
        path = tmp_path / "escaped.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert len(read(path).examples) == 2


def test_rows_are_numbered_from_one(tmp_path: Path) -> None:
    for kind in ("csv", "parquet"):
        path = write(tmp_path / f"rows.{kind}", ROWS)
        assert [number for number, _ in read_rows(path)] == [1, 2, 3, 4, 5]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [number for number, _ in read_rows(path)] == [1, 3]


# Bad files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none.jsonl", "No such file or directory", "check the path")


@pytest.mark.parametrize("kind", FORMATS)
def test_an_empty_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    path.touch()
    refused(path, "an empty file", "give at least two rows")


def test_files_with_nothing_in_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n \n\t\n")
    (tmp_path / "header.csv").write_text("input,output\n")
    (tmp_path / "nothing.jsonl.gz").write_bytes(gzip.compress(b""))
    parquet.write_table(
        pyarrow.table({"input": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet"
    )
    for path in tmp_path.iterdir():
        refused(path, "0 different rows", "give at least 2")


@pytest.mark.parametrize("kind", FORMATS)
def test_one_row_is_not_enough(tmp_path: Path, kind: str) -> None:
    refused(write(tmp_path / f"rows.{kind}", ROWS[:1]), "1 different rows", "give at least 2")


def test_a_task_with_a_prompt_may_ask_for_more_rows(tmp_path: Path) -> None:
    refused(write(tmp_path / "rows.jsonl", ROWS), "5 different rows; give at least 8", min_rows=8)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_column_is_named_with_the_columns_that_are_there(
    tmp_path: Path, kind: str
) -> None:
    rows = [{"text": "a", "output": "x"}, {"text": "b", "output": "y"}]
    refused(
        write(tmp_path / f"rows.{kind}", rows),
        "row 1, field 'input': missing; the row has text, output",
        "--input-field",
    )


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input": "c"}, "row 3, field 'output': missing"),
        ({"input": None, "output": "x"}, "row 3, field 'input': no value; fill it in"),
        ({"input": "", "output": "x"}, "row 3, field 'input': empty"),
        ({"input": " \n\t", "output": "x"}, "row 3, field 'input': empty"),
        ({"input": "c", "output": ""}, "row 3, field 'output': empty"),
        ({"input": ["c"], "output": "x"}, "row 3, field 'input': list; give a text"),
        ({"input": "c", "output": {"a": 1}}, "row 3, field 'output': dict; give a text"),
        ({"input": "a\x00b", "output": "x"}, "row 3, field 'input': not valid text"),
        (
            {"input": "x" * (MAX_INPUT_BYTES + 1), "output": "x"},
            f"row 3, field 'input': {MAX_INPUT_BYTES + 1} bytes; shorten it",
        ),
        (
            {"input": "c", "output": "é" * (MAX_OUTPUT_BYTES // 2 + 1)},
            f"row 3, field 'output': {MAX_OUTPUT_BYTES + 2} bytes; shorten it",
        ),
        ({}, "row 3, field 'input': missing"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_line_and_field(
    tmp_path: Path, row: Row, problem: str
) -> None:
    good = [{"input": "a", "output": "x"}, {"input": "b", "output": "y"}]
    refused(write(tmp_path / "rows.jsonl", [*good, row]), problem)


def test_a_csv_row_with_too_few_cells_has_a_field_without_a_value(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("input,output\na,x\nb\n")
    refused(path, "row 2, field 'output': no value; fill it in, or remove the row")


def test_a_csv_text_with_a_comma_that_is_not_quoted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("input,output\na,x\nlate, and broken,y\n")
    refused(path, "row 2: 3 cells under 2 columns", "in quotes")
    path.write_text('input,output\na,x\n"late, and broken",y\n')
    assert "late, and broken" in [example.input for example in read(path).examples]


def test_empty_cells_at_the_end_of_a_csv_row_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("input,output\na,x,,\nb,y, \n")
    assert len(read(path).examples) == 2


def test_half_of_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "a \\ud83d b", "output": "x"}\n{"input": "b", "output": "y"}\n')
    refused(path, "row 1, field 'input': not valid text; remove NUL and surrogate characters")


@pytest.mark.parametrize("kind", FORMATS)
def test_repeated_inputs_are_refused_with_their_rows_or_dropped_when_asked(
    tmp_path: Path, kind: str
) -> None:
    rows = [*ROWS, {"input": "a late goal", "output": "weather"}, ROWS[0]]
    path = write(tmp_path / f"rows.{kind}", rows)
    refused(
        path,
        "field 'input': 2 repeated inputs, rows 6 (as 2), 7 (as 1)",
        "--drop-duplicates to keep the first of each",
    )
    file = read(path, drop_duplicates=True)
    assert file.duplicates_dropped == 2
    assert Example("a late goal", "sport") in file.examples
    assert file.sha256 == read(write(tmp_path / "once.jsonl", ROWS)).sha256


def test_duplicates_of_a_single_row_are_one_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [ROWS[0]] * 30)
    refused(path, "29 repeated inputs")
    refused(path, "1 different rows", drop_duplicates=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_of_ten_megabytes_is_refused_with_its_place(tmp_path: Path, kind: str) -> None:
    rows = [*ROWS, {"input": "x" * 10_000_000, "output": "y"}]
    message = refused(write(tmp_path / f"rows.{kind}", rows), str(MAX_INPUT_BYTES))
    assert "row 6" in message or "line 6" in message or "line 7" in message


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb") as file:  # 300 MB of text in a small file
        for _ in range(300):
            file.write(b"x" * 1_000_000)
    refused(path, "line 1: over ")


@pytest.mark.parametrize(
    "line",
    ["{", "not json", "[1, 2]", '"text"', "7", "null", '{"input": "a",}', "[" * 30_000, "9" * 5000],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    refused(path, "line 2", "give one JSON object a line")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_that_is_not_utf_8_names_the_byte(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    row = (
        '{"input": "caf\xe9", "output": "x"}\n' if kind == "jsonl" else "input,output\ncaf\xe9,x\n"
    )
    path.write_bytes(row.encode("latin-1"))
    refused(path, "the byte 0xe9; save the file as UTF-8")
    path.write_bytes(("\ufeff" + row).encode("utf-16"))
    refused(path, "save the file as UTF-8")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip", "garbage behind"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "rows.jsonl.gz", ROWS)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:-12],
            "flipped": content[:40] + bytes([content[40] ^ 0xFF]) + content[41:],
            "not gzip": b"plain text\n",
            "garbage behind": content + b"garbage",
        }[damage]
    )
    refused(path, "check the path and the file")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "short"])
def test_a_damaged_parquet_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "rows.parquet", ROWS)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "flipped": content[:4] + b"\xff" * 10 + content[14:],
            "text": b"input,output\na,x\nb,y\n",
            "short": b"PAR1",
        }[damage]
    )
    refused(path)


def test_parquet_values_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"input": [b"a", b"b"], "output": ["x", "y"]}), path)
    refused(path, "row 1, field 'input': bytes; give a text")


@pytest.mark.parametrize(
    "name", ["rows.txt", "rows", "rows.xlsx", "rows.gz", "rows.jsonl.bz2", ".csv~"]
)
def test_an_unknown_kind_of_file_is_told_the_known_ones(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("input,output\n")
    refused(path, "give .jsonl, .jsonl.gz, .csv, .parquet")


@pytest.mark.parametrize("name", ["folder.jsonl", "folder.csv", "folder.parquet", "folder"])
def test_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    refused(path)


def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="check the path and the file"):
        read(tmp_path / "nul\0.jsonl")
    with pytest.raises(InvalidInputError, match="File name too long"):
        read(tmp_path / f"{'x' * 300}.jsonl")


def test_a_file_that_may_not_be_read_is_refused(public_folder: Path, forks: ForkServer) -> None:
    path = write(public_folder / "rows.jsonl", ROWS)
    path.chmod(0o000)
    [message] = forks.call("read_data_file", str(path), user=other_user())
    assert f"{path}: Permission denied; check the path and the file" in message


# Splitting


Examples = st.lists(
    st.builds(Example, st.text(min_size=1, max_size=5), st.sampled_from("abc")),
    min_size=2,
    max_size=60,
    unique_by=lambda example: example.input,
)


@settings(max_examples=50)
@given(Examples, st.randoms(use_true_random=False))
def test_the_split_keeps_every_row_once_and_does_not_depend_on_the_order(
    examples: list[Example], rng: random.Random
) -> None:
    train, validation = split(examples)
    assert sorted([*train, *validation]) == sorted(examples)
    assert train
    shuffled = list(examples)
    rng.shuffle(shuffled)
    again_train, again_validation = split(shuffled)
    assert set(again_train) == set(train)
    assert set(again_validation) == set(validation)


@settings(max_examples=50)
@given(Examples)
def test_every_output_keeps_its_share(examples: list[Example]) -> None:
    if len({example.output for example in examples}) * 2 > len(examples):
        return  # treated as free text
    _, validation = split(examples)
    for output in {example.output for example in examples}:
        rows = sum(example.output == output for example in examples)
        held = sum(example.output == output for example in validation)
        assert held == (0 if rows == 1 else min(max(round(rows * 0.2), 1), rows - 1))


def test_free_text_is_split_as_a_whole() -> None:
    examples = [Example(f"input {n}", f"answer {n}") for n in range(50)]
    train, validation = split(examples)
    assert (len(train), len(validation)) == (40, 10)


def test_the_split_looks_random_in_the_order_of_the_file() -> None:
    examples = [Example(f"input {n}", "ab"[n % 2]) for n in range(200)]
    _, validation = split(examples)
    places = sorted(examples.index(example) for example in validation)
    assert len(places) == 40
    assert 70 < sum(places) / len(places) < 130


# Closed sets of outputs


def outputs(*names: str, times: int = 1) -> list[Example]:
    return [Example(f"{name} {n}", name) for name in names for n in range(times)]


def test_few_different_short_outputs_are_a_closed_set() -> None:
    assert closed_outputs(outputs("yes", "no", times=5)) == ("no", "yes")
    assert closed_outputs(outputs("only", times=9)) == ("only",)
    assert closed_outputs(outputs("b", "a")) == ("a", "b")


def test_many_different_or_long_outputs_are_free_text() -> None:
    assert closed_outputs(outputs("a", "b", "c", times=2)) is None
    assert closed_outputs(outputs("a", "b", "c", times=3)) == ("a", "b", "c")
    assert closed_outputs(outputs("x" * 64, "y", times=9)) == ("x" * 64, "y")
    assert closed_outputs(outputs("x" * 65, "y", times=9)) is None
    many = [f"label-{n}" for n in range(257)]
    assert closed_outputs(outputs(*many, times=3)) is None
    assert len(closed_outputs(outputs(*many[:256], times=3)) or ()) == 256


def test_a_summary_says_how_the_rows_were_used(tmp_path: Path) -> None:
    file = read(write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0]]), drop_duplicates=True)
    summary = summarise(file, 4, 1)
    assert (summary.rows, summary.train_rows, summary.validation_rows) == (5, 4, 1)
    assert summary.duplicates_dropped == 1
    assert summary.sha256 == file.sha256
    assert len(summary.sha256) == len(hashlib.sha256().hexdigest())
