"""Results as JSON values. JSON has no infinity and no NaN, and a null where a number was asked for says nothing."""

from __future__ import annotations

import math
from typing import Any

from .errors import WorkError

INFINITY = "Infinity"
"""How JSON results write an infinite number, with `-` before it where it is negative: `float` and `Number` read it."""


def json_values(value: Any, where: str) -> Any:
    """`value` with string keys and lists, every number in it finite.

    Two kinds of number may be otherwise, since they say something: a perplexity too large for a number becomes
    "Infinity", and a standard error that the sample cannot give (one item) is left out. Anything else raises WorkError
    naming its place below `where`: something went wrong, and no reader should find that out from a gap.
    """
    if isinstance(value, dict):
        return {
            str(key): json_values(_infinite(str(key), item), f"{where}.{key}")
            for key, item in value.items()
            if not _missing_error(str(key), item)
        }
    if isinstance(value, (list, tuple)):
        return [json_values(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise WorkError(f"{where} is {value}, not a finite number", "Check the weights, the text and --dtype")
    return value


def written(value: float) -> float | str:
    """A number that may be infinite, for JSON."""
    return value if math.isfinite(value) else f"{'-' if value < 0 else ''}{INFINITY}"


def _missing_error(key: str, value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value) and key.endswith(("stderr", "standard_error"))


def _infinite(key: str, value: Any) -> Any:
    return written(value) if key.endswith("perplexity") and value == math.inf else value
