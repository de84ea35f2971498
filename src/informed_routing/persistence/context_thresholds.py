"""Thresholds by context, kept in a routing folder's config.json: versions that know none read the rest unharmed.

They find one threshold for all contexts in each row of routing_config.json, whose unknown settings they would refuse.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..config.folder import ByContext, RoutingConfig
from ..errors import InputError

KEY = "thresholds_by_context"
AUTO_FILE = "config.json"

_TABLE: TypeAdapter[list[tuple[float, ByContext]]] = TypeAdapter(list[tuple[float, ByContext]])
"""(threshold for all contexts, thresholds by context) of each row."""


def table_of(config: RoutingConfig) -> dict[str, Any]:
    """What config.json says of them; empty where there are none."""
    rows = [[row.threshold, row.by_context] for row in config.thresholds if row.by_context]
    return {KEY: rows} if rows else {}


def without_contexts(config: RoutingConfig) -> str:
    """The text of routing_config.json."""
    return config.model_dump_json(indent=2, exclude={"thresholds": {"__all__": {"by_context"}}}) + "\n"


def with_contexts(config: RoutingConfig, folder: Path, remedy: str) -> RoutingConfig:
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
    if not isinstance(stored, dict) or KEY not in stored:
        return config
    try:
        found = dict(_TABLE.validate_python(stored[KEY]))
        rows = [
            row.model_copy(update={"by_context": found.get(row.threshold, row.by_context)}) for row in config.thresholds
        ]
        return RoutingConfig.model_validate({**config.model_dump(), "thresholds": [row.model_dump() for row in rows]})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"{path} is damaged: {KEY}: {reason}", remedy) from None
