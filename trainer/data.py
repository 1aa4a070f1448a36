"""Reads and checks labelled files: JSON Lines (also .gz), CSV, Parquet."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from router.errors import InvalidInputError
from router.limits import Limits
from router.tasks import DataSummary
from trainer.answer_metrics import LABEL_SEPARATOR, join_labels, same_text

MAX_FILE_BYTES = 2 << 30
MAX_INPUT_BYTES = 32 << 10
MAX_OUTPUT_BYTES = 8 << 10
MAX_REJECTED = 8
MAX_PASSAGES = Limits().max_context_passages
_SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True)
class Fields:
    """What the columns are called."""

    input: str = "input"
    output: str = "output"
    context: str = "context"
    rejected: str = "rejected"


@dataclass(frozen=True, slots=True, order=True)
class Example:
    """One labelled input, the passages that came with it, the best first, and undesired outputs."""

    input: str
    output: str
    context: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """The checked rows of a file, in an order that does not depend on the file's.

    `multi_label`: the outputs are sets of labels, written as `answer_metrics.join_labels` does.
    """

    examples: tuple[Example, ...]
    sha256: str
    duplicates_dropped: int
    multi_label: bool = False


def read_labelled(
    path: Path,
    fields: Fields = Fields(),
    *,
    with_output: bool = True,
    drop_duplicates: bool = False,
    min_rows: int = 2,
) -> LabelledFile:
    """Read and check the rows of `path`.

    Routing alone needs no outputs (`with_output`). With `drop_duplicates` the first of repeated
    inputs stays; otherwise they are refused. A task needs `min_rows` different rows.

    Raises:
        InvalidInputError: missing, unreadable, too few rows, a field missing, empty or too long,
            or repeated inputs; the message names the file and the line.
    """
    examples: list[Example] = []
    seen: dict[str, int] = {}
    repeated: list[str] = []
    lists: dict[bool, int] = {}  # whether an output is a list, and the first such row
    for number, row in read_rows(path):
        example = Example(
            read_cell(path, number, row, fields.input, MAX_INPUT_BYTES),
            read_output(path, number, row, fields.output) if with_output else "",
            read_context(path, number, row, fields) if with_output else (),
            read_rejected(path, number, row, fields) if with_output else (),
        )
        if with_output:
            lists.setdefault(isinstance(row.get(fields.output), list), number)
        if example.input in seen:
            repeated.append(f"{number} (as {seen[example.input]})")
            continue
        seen[example.input] = number
        examples.append(example)
    if repeated and not drop_duplicates:
        raise InvalidInputError(
            f"{path}: field {fields.input!r}",
            f"{len(repeated)} repeated inputs, rows {', '.join(repeated[:_SHOWN_ROWS])}",
            "remove them, or pass --drop-duplicates to keep the first of each",
        )
    if len(examples) < min_rows:
        raise InvalidInputError(
            f"{path}", f"{len(examples)} different rows", f"give at least {min_rows}"
        )
    if len(lists) > 1:
        raise InvalidInputError(
            f"{path}: field {fields.output!r}",
            f"a list in row {lists[True]}, a text in row {lists[False]}",
            "give lists in all rows, or in none",
        )
    examples.sort(key=_canonical_order)
    content = "".join(map(_digested, examples)).encode()
    return LabelledFile(
        tuple(examples), hashlib.sha256(content).hexdigest(), len(repeated), True in lists
    )


def read_rows(path: Path) -> Generator[tuple[int, Mapping[str, object]]]:
    """The rows of a file as (number from 1, fields).

    Raises:
        InvalidInputError: missing, too large, unreadable, or of an unknown kind.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InvalidInputError(f"{path}", f"{size} bytes", "split files over 2 GiB")
        if not size:
            raise InvalidInputError(f"{path}", "an empty file", "give at least two rows")
        kind = path.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
        if kind in ("jsonl", "ndjson", "json"):
            yield from _json_rows(path)
        elif kind == "csv":
            yield from _csv_rows(path)
        elif kind == "parquet":
            yield from _parquet_rows(path)
        else:
            raise InvalidInputError(f"{path}", f".{kind}", "give .jsonl, .jsonl.gz, .csv, .parquet")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{path}", f"the byte {error.object[error.start]:#04x}", "save the file as UTF-8"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: NUL in the path
        raise InvalidInputError(
            f"{path}", getattr(error, "strerror", None) or error, "check the path and the file"
        ) from error


def read_cell(path: Path, number: int, row: Mapping[str, object], field: str, limit: int) -> str:
    """The text in one field of row `number`, of at most `limit` bytes of UTF-8.

    Raises:
        InvalidInputError: missing, not a text, empty or too long.
    """
    where = f"{path}: row {number}, field {field!r}"
    value = row.get(field)
    if field not in row:
        raise InvalidInputError(
            where,
            f"missing; the row has {', '.join(map(str, row))}",
            "add it, or say what the columns are called, with --input-field and the like",
        )
    if value is None:
        raise InvalidInputError(where, "no value", "fill it in, or remove the row")
    if not isinstance(value, str | int | float | bool):
        raise InvalidInputError(where, type(value).__name__, "give a text")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    size = len(text.encode(errors="surrogatepass"))
    if size > limit:
        raise InvalidInputError(where, f"{size} bytes", f"shorten it to at most {limit}")
    if not text.strip():
        raise InvalidInputError(where, "empty", "fill it in, or remove the row")
    if "\x00" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidInputError(where, "not valid text", "remove NUL and surrogate characters")
    return text


def read_output(path: Path, number: int, row: Mapping[str, object], field: str) -> str:
    """The output of row `number`: a text, or a list of labels as one text.

    Raises:
        InvalidInputError: see `read_cell`; an empty list, or a label with the separator in it.
    """
    labels = row.get(field)
    if not isinstance(labels, list):
        return read_cell(path, number, row, field, MAX_OUTPUT_BYTES)
    where = f"{path}: row {number}, field {field!r}"
    if not labels:
        raise InvalidInputError(where, "an empty list", "give a label for that, such as 'none'")
    texts = [
        read_cell(path, number, {field: label}, field, MAX_OUTPUT_BYTES).strip() for label in labels
    ]
    for text in texts:
        if LABEL_SEPARATOR in text:
            raise InvalidInputError(where, text, f"rename labels with {LABEL_SEPARATOR!r} in them")
    joined = join_labels(texts)
    size = len(joined.encode())
    if size > MAX_OUTPUT_BYTES:
        raise InvalidInputError(
            where, f"{size} bytes of labels", f"give at most {MAX_OUTPUT_BYTES} bytes"
        )
    return joined


def read_context(
    path: Path, number: int, row: Mapping[str, object], fields: Fields
) -> tuple[str, ...]:
    """The passages of row `number`: one text, a list of them, or none.

    They are limited as those of a request are.

    Raises:
        InvalidInputError: see `read_cell`; too many of them, or too long with the input.
    """
    value = row.get(fields.context)
    if value is None or value in ("", []):
        return ()
    where = f"{path}: row {number}, field {fields.context!r}"
    passages = value if isinstance(value, list) else [value]
    if len(passages) > MAX_PASSAGES:
        raise InvalidInputError(
            where, f"{len(passages)} passages", f"give at most {MAX_PASSAGES}, the best first"
        )
    read = tuple(
        read_cell(path, number, {fields.context: passage}, fields.context, MAX_INPUT_BYTES)
        for passage in passages
    )
    size = sum(len(part.encode()) for part in (*read, str(row[fields.input])))
    if size > MAX_INPUT_BYTES:
        raise InvalidInputError(
            where,
            f"{size} bytes with the input",
            f"shorten them to at most {MAX_INPUT_BYTES} bytes together",
        )
    return read


def read_rejected(
    path: Path, number: int, row: Mapping[str, object], fields: Fields
) -> tuple[str, ...]:
    """The undesired outputs of row `number`: one text, a list of them, or none.

    Raises:
        InvalidInputError: see `read_cell`; too many of them, or one that is the output.
    """
    value = row.get(fields.rejected)
    if value is None or value in ("", []):
        return ()
    where = f"{path}: row {number}, field {fields.rejected!r}"
    texts = value if isinstance(value, list) else [value]
    if len(texts) > MAX_REJECTED:
        raise InvalidInputError(where, f"{len(texts)} outputs", f"give at most {MAX_REJECTED}")
    read = tuple(
        read_cell(path, number, {fields.rejected: text}, fields.rejected, MAX_OUTPUT_BYTES)
        for text in texts
    )
    for text in read:
        if same_text(text, str(row[fields.output])):
            raise InvalidInputError(where, text, "it is the row's output: remove one of the two")
    return read


def split(
    examples: Sequence[Example], validation_share: float = 0.2
) -> tuple[list[Example], list[Example]]:
    """Train and validation examples: each output keeps its share, the same split on every run."""
    by_output: dict[str, list[Example]] = {}
    for example in examples:
        by_output.setdefault(example.output, []).append(example)
    if len(by_output) * 2 > len(examples):  # free text: nothing to stratify by
        by_output = {"": list(examples)}
    train: list[Example] = []
    validation: list[Example] = []
    for rows in by_output.values():
        ordered = sorted(rows, key=_canonical_order)
        held = round(len(ordered) * validation_share) if len(ordered) > 1 else 0
        held = min(max(held, 1), len(ordered) - 1) if len(ordered) > 1 else 0
        validation += ordered[:held]
        train += ordered[held:]
    return train, validation


def closed_outputs(examples: Sequence[Example]) -> tuple[str, ...] | None:
    """The closed set of outputs, or None where the outputs are free text.

    Closed: at most a third as many different outputs as rows, at most 256, and none longer than 64
    characters.
    """
    outputs = sorted({example.output for example in examples})
    few = len(outputs) <= max(2, len(examples) // 3) and len(outputs) <= 256
    return tuple(outputs) if few and all(len(output) <= 64 for output in outputs) else None


def summarise(file: LabelledFile, train: int, validation: int) -> DataSummary:
    """What a record says of its data."""
    return DataSummary(file.sha256, len(file.examples), train, validation, file.duplicates_dropped)


def _canonical_order(example: Example) -> bytes:
    return hashlib.sha256(f"{example.input}\x00{example.output}".encode()).digest()


def _digested(example: Example) -> str:
    """What the digest of a file says of a row."""
    context = "".join(f"\x01{passage}" for passage in example.context)
    rejected = "".join(f"\x02{text}" for text in example.rejected)
    return f"{example.input}\x00{example.output}{context}{rejected}\x00"


def _open_text(path: Path) -> io.TextIOBase:
    if path.name.endswith(".gz"):
        return cast("io.TextIOBase", gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    # A byte of text can take six characters of JSON, as in \u0007.
    limit = 8 * (MAX_INPUT_BYTES + (1 + MAX_REJECTED) * MAX_OUTPUT_BYTES)
    with _open_text(path) as lines:
        number = 0
        while line := lines.readline(limit):
            number += 1
            where = f"{path}: line {number}"
            if len(line) >= limit and not line.endswith("\n"):
                raise InvalidInputError(
                    where, f"over {limit} characters", f"inputs are at most {MAX_INPUT_BYTES} bytes"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InvalidInputError(where, line, "give one JSON object a line") from error
            if not isinstance(row, dict):
                raise InvalidInputError(where, line, "give one JSON object a line")
            yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with _open_text(path) as lines:
        rows = csv.DictReader(lines)
        try:
            for number, row in enumerate(rows, start=1):
                _check_width(path, rows, number, row)
                yield number, row
        except csv.Error as error:
            where = f"{path}: line {rows.line_num}"
            raise InvalidInputError(
                where, error, f"inputs are at most {MAX_INPUT_BYTES} bytes"
            ) from error


def _check_width(
    path: Path, rows: csv.DictReader[str], number: int, row: Mapping[str | None, object]
) -> None:
    """Refuse a row with more cells than columns: a text with a comma would be cut in silence."""
    surplus = row.get(None)
    if isinstance(surplus, list) and any(cell.strip() for cell in surplus):
        columns = len(rows.fieldnames or ())
        raise InvalidInputError(
            f"{path}: row {number}",
            f"{columns + len(surplus)} cells under {columns} columns",
            'put texts that have commas in quotes: "like, this"',
        )


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise InvalidInputError(f"{path}", error, "give a Parquet file") from error
