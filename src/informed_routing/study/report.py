"""Write everything that can be said of a study: its tables, its plots, and how it agrees with a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..extras import need
from ..files.atomic import write_text
from .grid import Grid
from .layouts import build_table
from .plan import Cell
from .reference import Reference
from .results import Entry, entries
from .store import Store
from .tables import Table, comma_separated, markdown


@dataclass(frozen=True)
class Report:
    """Files written, tables as JSON values by name, and the texts to show."""

    files: list[Path]
    tables: dict[str, Any]
    texts: list[str]


def write_report(
    grids: Sequence[Grid], expanded: Mapping[str, Sequence[Cell]], store: Store, reference: Reference | None = None
) -> Report:
    """GRID.md, .csv and .svg of each grid, in the store's folder; agreement.md where a reference can judge them."""
    need("matplotlib", extra="study", for_what="Plots of a study")
    from .figures import draw

    found = {grid.name: entries(expanded[grid.name], store) for grid in grids}
    report = Report([], {}, [])
    for grid in grids:
        plots = draw(grid, found[grid.name], store.root)
        shown = "".join(f"\n![{grid.title}]({path.name})\n" for path in plots)
        write_table(build_table(grid, found[grid.name], reference), store.root, report, shown)
        report.files.extend(plots)
    if reference is not None:
        _write_agreement(reference, found, store.root, report)
    return report


def _write_agreement(reference: Reference, found: Mapping[str, Sequence[Entry]], folder: Path, report: Report) -> None:
    """One page for each model of which the reference can judge something; without any, nothing is written."""
    models = dict.fromkeys(entry.model for one in found.values() for entry in one)
    pages = [page for model in models if (page := reference.page(found, model)) is not None]
    if pages:
        path = folder / "agreement.md"
        write_text(path, "\n".join(pages))
        report.files.append(path)
        report.texts.extend(pages)


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
