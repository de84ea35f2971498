"""Results as tables for people. Numbers are not computed here, only shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from informed_routing.evaluation.tasks import headline


def new_table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    """A plain table; the first `left` columns are aligned left, numbers right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < left else "right")
    return table


def perplexity_table(runs: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row per sparsity: what was approximated, and perplexity on each text with its ratio to dense."""
    tasks = list(runs[0]["tasks"])
    words = {task for task in tasks if "word_perplexity" in runs[0]["tasks"][task]}
    columns = [f"{task} (word)" if task in words else task for task in tasks]
    table = new_table(title, ["sparsity", *_SHARES, *columns])
    dense = next((run for run in runs if run["sparsity"]["target"] == 0), None)
    for run in runs:
        cells = []
        for task in tasks:
            value = main_metric(run["tasks"][task])
            cells.append(with_ratio(value, main_metric(dense["tasks"][task]) if dense else None))
        table.add_row(target_label(run["sparsity"]), *share_cells(run["sparsity"]), *cells)
    return table


def task_table(runs: Sequence[Mapping[str, Any]], names: Sequence[str], title: str) -> Table:
    """One column per sparsity: each task's headline metric, the mean accuracy, and what was approximated."""
    table = new_table(title, ["task", "shots", "metric", *(target_label(run["sparsity"]) for run in runs)], left=3)
    for name in names:
        task = runs[0]["tasks"][name]
        metric = headline(name, (key for key in task if key not in _ABOUT))
        cells = [_measured(run["tasks"][name], metric) for run in runs]
        table.add_row(name, str(task["shots"]), metric, *cells)
    if "average" in runs[0]:
        count = len(runs[0]["average"]["tasks"])
        table.add_row(f"average of {count}", "", "", *(_measured(run["average"], "accuracy", "stderr") for run in runs))
    table.add_section()
    for label, shares in zip(_SHARES, zip(*(share_cells(run["sparsity"]) for run in runs), strict=True), strict=True):
        table.add_row(label, "", "", *shares)
    return table


_ABOUT = ("shots", "documents", "seconds", "sparsity")


def _measured(values: Mapping[str, Any], metric: str, error: str | None = None) -> str:
    """A share in per cent with its standard error, or a perplexity as it is."""
    value, deviation = float(values[metric]), values.get(error or f"{metric}_stderr")
    if metric.endswith("perplexity"):
        return f"{value:.2f}"
    error_shown = "" if deviation is None or not math.isfinite(deviation) else f" ±{float(deviation) * 100:.1f}"
    return f"{value * 100:.1f}{error_shown}"


def speed_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """Seconds, tokens per second, the speed-up against dense, and the limit of the row's own selections."""
    columns = ["engine", "phase", "sparsity", "units", "MACs", "batch", "prompt", "new", "ms", "min-max", "tokens/s"]
    table = new_table(title, [*columns, "speed-up", "limit", "of limit"], left=3)
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            row["engine"],
            row["phase"],
            target_label(row["sparsity"]),
            *(share_cells(row["sparsity"])[i] for i in (0, 3)),
            str(row["batch"]),
            str(row["prompt_tokens"]),
            str(row.get("new_tokens", "")),
            f"{seconds['median'] * 1e3:.1f}",
            f"{seconds['min'] * 1e3:.1f}-{seconds['max'] * 1e3:.1f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup_vs_dense']:.2f}x",
            f"{row['limit_speedup']:.2f}x",
            f"{row['fraction_of_limit']:.0%}",
        )
    return table


def phase_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """Per cent of a forward's time in each phase, for the rows that were profiled."""
    kept = [row for row in rows if row.get("phase_seconds")]
    phases = list(kept[0]["phase_seconds"]) if kept else []
    table = new_table(title, ["engine", "phase", "sparsity", "batch", "prompt", *phases], left=3)
    for row in kept:
        seconds = row["phase_seconds"]
        total = sum(seconds.values())
        cells = [f"{seconds[phase] / total:.1%}" for phase in phases]
        label = target_label(row["sparsity"])
        table.add_row(row["engine"], row["phase"], label, str(row["batch"]), str(row["prompt_tokens"]), *cells)
    return table


_SHARES = ("units", "attention", "ffn", "MACs saved")


def share_cells(sparsity: Mapping[str, float]) -> list[str]:
    """The realised shares in the order of the column names."""
    return [f"{sparsity[key] * 100:.1f}%" for key in ("units", "attention", "ffn", "macs")]


def target_label(sparsity: Mapping[str, Any]) -> str:
    """`dense` for a target of 0, else per cent."""
    return f"{sparsity['target'] * 100:g}%" if sparsity["target"] else "dense"


def main_metric(task: Mapping[str, Any]) -> float:
    """The number of a task that stands in a table: perplexity per word where there is one, else per token."""
    return float(task.get("word_perplexity", task["token_perplexity"]))


def with_ratio(value: float, dense: float | None) -> str:
    """A perplexity and its ratio to the dense one."""
    if not dense or value == dense or not (math.isfinite(value) and math.isfinite(dense)):
        return f"{value:.2f}"
    return f"{value:.2f} ({value / dense:.3f}x)"
