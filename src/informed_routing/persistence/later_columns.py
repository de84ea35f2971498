"""What rows of the threshold table have that earlier versions do not know, kept in a routing folder's config.json.

These find the rest of each row in routing_config.json, whose unknown settings they would refuse.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..config.folder import ByContext, RoutingConfig
from ..errors import InputError

AUTO_FILE = "config.json"

_COLUMNS: dict[str, tuple[str, TypeAdapter[Any]]] = {
    "by_context": ("thresholds_by_context", TypeAdapter(list[tuple[float, ByContext]])),
    "by_unit": ("shares_by_unit", TypeAdapter(list[tuple[float, tuple[float, ...]]])),
}
"""Of each column its key in config.json, and what is there: (threshold for all contexts, value) of each row."""


def columns_of(config: RoutingConfig) -> dict[str, Any]:
    """What config.json says of them; empty where there are none."""
    tables = {
        key: [[row.threshold, getattr(row, name)] for row in config.thresholds if getattr(row, name)]
        for name, (key, _) in _COLUMNS.items()
    }
    return {key: rows for key, rows in tables.items() if rows}


def without_columns(config: RoutingConfig) -> str:
    """The text of routing_config.json."""
    return config.model_dump_json(indent=2, exclude={"thresholds": {"__all__": set(_COLUMNS)}}) + "\n"


def with_columns(config: RoutingConfig, folder: Path, remedy: str) -> RoutingConfig:
    """The configuration with what config.json has for its rows, which are known by their thresholds.

    A folder without that file has one threshold for all contexts. Raises InputError where it holds no such table.
    """
    path = folder / AUTO_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}", remedy) from None
    for name, (key, table) in _COLUMNS.items():
        if not isinstance(stored, dict) or key not in stored:
            continue
        try:
            found = dict(table.validate_python(stored[key]))
            rows = [
                {**row.model_dump(), name: found.get(row.threshold, getattr(row, name))} for row in config.thresholds
            ]
            config = RoutingConfig.model_validate({**config.model_dump(), "thresholds": rows})
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InputError(f"{path} is damaged: {key}: {reason}", remedy) from None
    return config
