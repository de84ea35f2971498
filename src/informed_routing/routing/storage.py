"""Bytes that engines read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """Bytes that one element of each kind occupies where an engine reads it."""

    body: float
    forecaster: float
    head: float
    kv: float
    router: float = 4.0
    stream: float = 4.0
