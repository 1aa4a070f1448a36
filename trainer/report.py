"""Writes an evaluation to a folder: for programs (JSON, CSV), for people (Markdown, HTML)."""

from __future__ import annotations

import base64
import csv
import dataclasses
import enum
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np

from router.errors import StorageError
from trainer.evaluate_routing import RoutedText

DECISION_COLUMNS = (
    "row",
    "true_task",
    "decision",
    "best_task",
    "outcome",
    "score",
    "margin",
    "threshold",
    "probability",
    "truncated",
)

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff;
         max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin-bottom: .3rem; }
  h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
  p, figcaption { color: #52606d; margin: .2rem 0; }
  figure { margin: 0; }
  img { max-width: 100%; height: auto; }
  .rows { max-height: 32rem; overflow: auto; border: 1px solid #e4e7eb; display: inline-block;
          max-width: 100%; }
  table { border-collapse: collapse; font-size: .87rem; }
  th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #eef1f4;
           vertical-align: top; }
  th { position: sticky; top: 0; background: #f5f7fa; white-space: nowrap; }
  td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  td.text { max-width: 38rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows for people. Numbers are formatted by whoever makes the table.

    A table that is only `in_files` is not printed by the command.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    note: str = ""
    in_files: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file, with what it shows."""

    title: str
    caption: str
    png: bytes


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation, ready to be written or printed.

    `facts` are sentences. The first table is the summary; the rows of the others come with those
    first that need attention.
    """

    title: str
    facts: tuple[str, ...]
    document: Mapping[str, object]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    decisions: Sequence[RoutedText]


def write_report(folder: Path, report: Report, *, with_text: bool = False) -> list[Path]:
    """Write report.json, report.md, report.html and decisions.csv; returns the files.

    `with_text` adds the inputs to decisions.csv.

    Raises:
        StorageError: the folder cannot be made, or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents = {
            folder / "report.json": to_json(report.document),
            folder / "report.md": to_markdown(report),
            folder / "report.html": to_html(report),
        }
        for path, content in contents.items():
            path.write_text(content, encoding="utf-8")
        decisions = folder / "decisions.csv"
        write_decisions(decisions, report.decisions, with_text=with_text)
    except OSError as error:
        raise StorageError(
            f"report folder {folder}", error.strerror or error, "give a writable one with --report"
        ) from error
    return [*contents, decisions]


def to_json(document: object) -> str:
    """JSON of dataclasses, mappings, sequences and arrays. What is not finite becomes null."""
    return json.dumps(_plain(document), indent=2, ensure_ascii=False) + "\n"


def to_markdown(report: Report) -> str:
    """The report without its pictures, which are in report.html."""
    lines = [f"# {_cell(report.title)}", ""]
    for fact in report.facts:
        lines += [_cell(fact), ""]
    for table in report.tables:
        lines += [f"## {_cell(table.title)}", ""]
        if table.note:
            lines += [_cell(table.note), ""]
        lines.append(_markdown_row(table.columns))
        lines.append(_markdown_row(["---:" if n else "---" for n in _numeric(table)]))
        lines += [_markdown_row(row) for row in table.rows]
        lines.append("")
    lines.append("Pictures: `report.html`. Every decision: `decisions.csv`.")
    return "\n".join(lines) + "\n"


def to_html(report: Report) -> str:
    """One page that needs no other file: the pictures are part of it."""
    parts = [f"<p>{html.escape(fact)}</p>" for fact in report.facts]
    summary, *others = report.tables
    parts.append(_html_table(summary))
    for picture in report.pictures:
        data = base64.b64encode(picture.png).decode()
        parts.append(
            f"<h2>{html.escape(picture.title)}</h2>\n<figure>\n"
            f"<figcaption>{html.escape(picture.caption)}</figcaption>\n"
            f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{data}">\n'
            "</figure>"
        )
    parts += [_html_table(table) for table in others]
    return _PAGE.substitute(title=html.escape(report.title), body="\n".join(parts))


def write_decisions(
    path: Path, decisions: Sequence[RoutedText], *, with_text: bool = False
) -> None:
    """One line a decision. `true_task` is empty out of scope, `decision` where it is unknown."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*DECISION_COLUMNS, *(["text"] if with_text else [])])
        for routed in decisions:
            writer.writerow(
                [
                    routed.row.number,
                    routed.row.task or "",
                    "" if routed.is_rejected else routed.best,
                    routed.best,
                    routed.outcome.value,
                    f"{routed.score:.6g}",
                    f"{routed.margin:.6g}",
                    f"{routed.threshold:.6g}",
                    "" if routed.probability is None else f"{routed.probability:.6g}",
                    str(routed.truncated).lower(),
                    *([routed.row.text] if with_text else []),
                ]
            )


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _html_table(table: Table) -> str:
    numeric = _numeric(table)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td class="{"number" if is_number else "text"}">{html.escape(cell)}</td>'
            for cell, is_number in zip(row, numeric, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>\n" if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>\n{note}"
        f'<div class="rows"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, and so are aligned to the right."""
    return [
        bool(table.rows) and all(_is_number(row[column]) for row in table.rows)
        for column in range(len(table.columns))
    ]


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.lstrip("-+").replace(",", "")[:1].isdigit()


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """`text` as one line that Markdown leaves alone."""
    line = " ".join(text.split())
    for mark in "\\`*_|<[":
        line = line.replace(mark, f"\\{mark}")
    return line
