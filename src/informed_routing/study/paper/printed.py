"""The numbers that the paper prints. They stand beside ours, never for them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ..reference import Printed


@functools.cache
def _content() -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "printed.yaml").read_text(encoding="utf-8"))
    return content


def printed(table: str, model: str | None = None) -> tuple[Printed, ...]:
    """The rows of a table (none for one that the paper lacks), only if it is of this model where one is given."""
    found = _content().get(table, {})
    if "rows" not in found or (model is not None and not _same(model, found["model"])):
        return ()
    columns = found.get("columns", _content()["columns"])
    return tuple(
        Printed(
            row["method"],
            row["recovered"],
            float(row["sparsity"]),
            {name: value for name, value in zip(columns, row["values"], strict=True) if value is not None},
        )
        for row in found["rows"]
    )


def value(table: str, method: str, sparsity: float, recovered: bool, column: str) -> float:
    """One printed number. Raises KeyError when there is none."""
    for row in printed(table):
        if (row.method, row.sparsity, row.recovered) == (method, sparsity, recovered):
            return row.values[column]
    raise KeyError((table, method, sparsity, recovered, column))


def _same(model: str, other: str) -> bool:
    """Whether two references name the same model, wherever it is kept."""
    return model.rstrip("/").rsplit("/", 1)[-1].lower() == other.rsplit("/", 1)[-1].lower()
