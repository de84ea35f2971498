"""Tables as Markdown for people and CSV for programs. Numbers are not computed here, only placed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .results import Value

Text = str
Content = Value | Text | None
"""A number, a word such as `failed`, or nothing."""


@dataclass(frozen=True)
class Column:
    """`better` says which end is best, and is None where none is."""

    key: str
    title: str
    better: Literal["high", "low"] | None = None
    digits: int = 2


@dataclass(frozen=True)
class Row:
    """A row of ours, or one that the paper prints. Reference rows (the dense model) compete for nothing."""

    label: str
    cells: dict[str, Content]
    source: Literal["ours", "paper"] = "ours"
    reference: bool = False
    recovered: bool = False
    method: str = ""


@dataclass(frozen=True)
class Block:
    """Rows that are compared with one another: those of one model and one sparsity."""

    title: str
    rows: tuple[Row, ...]
    model: str = ""
    sparsity: float | None = None


@dataclass(frozen=True)
class Table:
    """A table with its columns, blocks of rows and notes."""

    name: str
    title: str
    columns: tuple[Column, ...]
    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = field(default=())


def markdown(table: Table) -> str:
    """The table with the best number of each column and block bold, the second best underlined."""
    parts = [f"# {table.title}"]
    for block in table.blocks:
        marks = {column.key: _places(block.rows, column) for column in table.columns}
        lines = [["", *(column.title for column in table.columns)], ["---"] * (len(table.columns) + 1)]
        for number, row in enumerate(block.rows):
            name = _cell(row.label)
            label = f"*{name} (paper)*" if row.source == "paper" else name
            shown = [
                _marked(_shown(row.cells.get(column.key), column), marks[column.key].get(number))
                for column in table.columns
            ]
            lines.append([label, *shown])
        parts.append(f"## {block.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    parts += [note for note in table.notes if note]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    """Text in a cell, where a bar would begin the next one."""
    return " ".join(text.replace("|", r"\|").split())


def comma_separated(table: Table) -> str:
    """One line for each number: table, model, sparsity, method, recovered, source, column, value, standard error."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["table", "model", "sparsity", "method", "label", "recovered", "source", "column", "value", "stderr"]
    )
    for block in table.blocks:
        for row in block.rows:
            for column in table.columns:
                content = row.cells.get(column.key)
                value, error = (content.value, content.stderr) if isinstance(content, Value) else (content, None)
                if value is None:
                    continue
                sparsity = "" if block.sparsity is None else block.sparsity
                start = [table.name, block.model, sparsity, row.method, row.label, row.recovered, row.source]
                writer.writerow([*start, column.key, value, "" if error is None else error])
    return out.getvalue()


def _shown(content: Content, column: Column) -> str:
    if content is None:
        return "-"
    if isinstance(content, str):
        return _cell(content)
    number = f"{content.value:,.{column.digits}f}"
    return number if content.stderr is None else f"{number} ± {content.stderr:.{column.digits}f}"


def _marked(text: str, place: int | None) -> str:
    return {0: f"**{text}**", 1: f"<u>{text}</u>"}.get(place if place is not None else -1, text)


def _places(rows: Sequence[Row], column: Column) -> dict[int, int]:
    """Row number -> 0 (best) or 1 (second best), among our rows that compete; equal numbers share a place."""
    if column.better is None:
        return {}
    numbers = {
        place: content.value
        for place, row in enumerate(rows)
        if row.source == "ours" and not row.reference and isinstance(content := row.cells.get(column.key), Value)
    }
    order = sorted(set(numbers.values()), reverse=column.better == "high")
    if len(numbers) < 2:
        return {}
    return {place: order.index(value) for place, value in numbers.items() if value in order[:2]}
