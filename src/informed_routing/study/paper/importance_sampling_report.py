"""Markdown tables and SVG figures of the importance-sampling experiments."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

Table = list[dict[str, Any]]


def markdown(
    results: Mapping[str, Table], experiments: Mapping[str, Callable[..., Any]], drawn: Mapping[str, str]
) -> str:
    """One section per experiment: what it is, its figure, and its rows."""
    parts = ["# Importance sampling: experiments with known truth\n"]
    for name, rows in results.items():
        summary = (experiments[name].__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {name}\n\n{summary}\n")
        if name in drawn:
            parts.append(f"![{name}]({name}.svg)\n")
        parts.append(_table(rows))
    return "\n".join(parts)


def figures(results: Mapping[str, Table]) -> dict[str, str]:
    """SVG text of each experiment that has a figure; the same for the same rows."""
    drawings: dict[str, Callable[[Table, Any], None]] = {
        "rates": _draw_rates,
        "european-call": lambda rows, axes: _draw_errors(rows, axes, "sigma", lambda row: row["rate"] == 0.02),
        "policy-evaluation": lambda rows, axes: _draw_errors(rows, axes, "gain", lambda row: True),
        "coverage": _draw_coverage,
    }
    return {name: _svg(name, draw, results[name]) for name, draw in drawings.items() if name in results}


def _svg(name: str, draw: Callable[[Table, Any], None], rows: Table) -> str:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
        draw(rows, axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return text.getvalue()


def _draw_rates(rows: Table, axes: Any) -> None:
    rows = [row for row in rows if row["target_rate"] == 0.6]
    for name, marker in (("LR", "o"), ("B0", "s"), ("B2", "^"), ("B3", "d")):
        own = [row for row in rows if row["estimator"] == name]
        label = "classical" if name == "LR" else f"truncated at {name}"
        shares = [row["over"] + row["under"] for row in own]
        line = axes.plot([row["n"] for row in own], [share or math.nan for share in shares], marker=marker, label=label)
        if name == "LR":
            axes.plot([row["n"] for row in own], [row["T1_upper"] for row in own], "k--", lw=0.8, label="T1 (upper)")
            axes.plot([row["n"] for row in own], [row["T2_lower"] for row in own], "k:", lw=0.8, label="T2 (lower)")
        else:
            upper = [row["T5_upper"] for row in own]
            axes.plot([row["n"] for row in own], upper, "--", lw=0.8, color=line[0].get_color(), label=f"T5 at {name}")
    axes.set(xscale="log", yscale="log", xlabel="sample size n", ylabel="P(|error| >= 0.3)", ylim=(1e-6, 2))
    axes.figure.legend(loc="outside lower center", ncols=4)


def _draw_errors(rows: Table, axes: Any, parameter: str, keep: Callable[[dict[str, Any]], bool]) -> None:
    rows = [row for row in rows if keep(row)]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        own = sorted((row for row in rows if row["estimator"] == name), key=lambda row: row[parameter])
        axes.plot([row[parameter] for row in own], [row["rmse"] for row in own], marker="o", label=name)
    axes.set(yscale="log", xlabel=parameter, ylabel="root mean square error")
    axes.legend(ncols=2)


def _draw_coverage(rows: Table, axes: Any) -> None:
    cells = [row for row in rows if row["target"] != "all"]
    names = [f"{row['target']}: {row['metric']}" for row in cells]
    colours = [max(("green", "amber", "red"), key=lambda colour: row[f"{colour}_share"]) for row in cells]
    shades = {"green": "tab:green", "amber": "tab:orange", "red": "tab:red"}
    axes.figure.set_size_inches(6.4, 7.0)
    axes.scatter(
        [row["normal_coverage"] for row in cells], names, c=[shades[c] for c in colours], label="normal error bar"
    )
    axes.scatter([row["interval_coverage"] for row in cells], names, c="k", marker="|", label="simultaneous limits")
    axes.axvline(0.95, color="k", lw=0.5)
    axes.set(xlabel="coverage (colour: the usual traffic light)")
    axes.invert_yaxis()
    axes.legend(loc="lower left")


def _table(rows: Table) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "| " + " | ".join("---" for _ in keys) + " |"]
    lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "; ".join(str(part) for part in value)
    return "" if value is None else str(value)
