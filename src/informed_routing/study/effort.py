"""What a study took: cells, training text and seconds, each stage counted once however many cells share it."""

from __future__ import annotations

from collections.abc import Iterable

from .results import Entry
from .store import stage_seconds


def effort(found: Iterable[Entry]) -> str:
    """One sentence on the finished cells of entries; empty where there are none."""
    records = {record["key"]: record for entry in found for record in entry.records}
    stages = {stage["key"]: stage for record in records.values() for stage in record["training"]["stages"]}
    if not records:
        return ""
    tokens = sum(stage["tokens"] for stage in stages.values())
    training = sum(stage_seconds(stage) for stage in stages.values())
    evaluation = sum(record["wall_seconds"]["evaluation"] for record in records.values())
    threads = sorted({record["threads"] for record in records.values()})
    return (
        f"{len(records)} cells: {tokens:,} tokens of training in {training:,.0f} s, shared stages counted once; "
        f"evaluation {evaluation:,.0f} s; {(training + evaluation) / 3600:.1f} h in all, with "
        f"{' or '.join(map(str, threads))} {'thread' if threads == [1] else 'threads'} a cell."
    )
