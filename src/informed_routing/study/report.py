"""Write everything that can be said of a study: its tables, plots, and the page of agreement with the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files.atomic import write_text
from .agreement import agreement
from .grid import Grid
from .layouts import build_table
from .plan import Cell
from .results import entries
from .store import Store
from .tables import Table, comma_separated, markdown


@dataclass(frozen=True)
class Report:
    """Files written, tables as JSON values by name, and the texts to show."""

    files: list[Path]
    tables: dict[str, Any]
    texts: list[str]


def write_report(grids: Sequence[Grid], expanded: Mapping[str, Sequence[Cell]], store: Store) -> Report:
    """GRID.md, .csv and .svg of each grid, in the store's folder; agreement.md where they judge some of the claims."""
    from .figures import draw

    found = {grid.name: entries(expanded[grid.name], store) for grid in grids}
    report = Report([], {}, [])
    for grid in grids:
        plots = draw(grid, found[grid.name], store.root)
        shown = "".join(f"\n![{grid.title}]({path.name})\n" for path in plots)
        write_table(build_table(grid, found[grid.name]), store.root, report, shown)
        report.files.extend(plots)
    models = list(dict.fromkeys(entry.model for one in found.values() for entry in one))
    pages = [page for model in models if (page := agreement(found, model)) is not None]
    if pages:
        path = store.root / "agreement.md"
        write_text(path, "\n".join(pages))
        report.files.append(path)
        report.texts.extend(pages)
    return report


def write_table(table: Table, folder: Path, report: Report, more: str = "") -> None:
    """TABLE.md (ending with `more`) and TABLE.csv in a folder; `report` is told."""
    text = markdown(table)
    report.texts.append(text)
    for suffix, content in ((".md", text + more), (".csv", comma_separated(table))):
        path = folder / f"{table.name}{suffix}"
        write_text(path, content)
        report.files.append(path)
    report.tables[table.name] = as_json(table)


def as_json(table: Table) -> list[dict[str, Any]]:
    """The rows of a table as JSON values, each with its model and sparsity."""
    rows = []
    for block in table.blocks:
        for row in block.rows:
            cells = {
                key: content if isinstance(content, str) else asdict(content)
                for key, content in row.cells.items()
                if content is not None
            }
            head = {"model": block.model, "sparsity": block.sparsity, "method": row.method, "label": row.label}
            rows.append({**head, "recovered": row.recovered, "source": row.source, "cells": cells})
    return rows
