"""Predictions as a picture: one panel for each metric, one interval for each target."""

from __future__ import annotations

import io
from pathlib import Path

from ..extras import need
from ..files.outputs import check_output, write_output
from .predictions import Predictions

COLOURS = {"green": "#2a7f3f", "amber": "#c98a00", "red": "#b3261e"}
CREATOR = "informed-routing whatif"


def check_plot(path: Path | None) -> None:
    """Raises InputError when `--plot` cannot be drawn or written; only plots of this program are replaced."""
    if path is not None:
        need("matplotlib", extra="plots", for_what="Plots")
        check_output("--plot", path, lambda beginning: CREATOR.encode() in beginning)


def draw(found: Predictions, path: Path) -> None:
    """Write an SVG of estimates (dots; none for red rows) and simultaneous intervals (bars)."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "what-if"  # the same file for the same predictions
    from matplotlib import pyplot

    metrics = list(dict.fromkeys(row.metric for row in found.rows))
    targets = list(dict.fromkeys(row.target for row in found.rows))
    height = 1.2 + 0.35 * len(targets)
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(3.2 * len(metrics), height), layout="constrained")
    for place, metric in enumerate(metrics):
        axis = axes[place] if len(metrics) > 1 else axes
        for row in found.rows:
            if row.metric != metric:
                continue
            at, colour = targets.index(row.target), COLOURS[row.colour]
            axis.plot([row.lower, row.upper], [at, at], color=colour, linewidth=2)
            if row.estimate is not None:
                axis.plot([row.estimate], [at], "o", color=colour, markersize=5)
        axis.set(title=_plain(metric), ylim=(len(targets) - 0.5, -0.5))
        axis.set_yticks(range(len(targets)), [_plain(name) if place == 0 else "" for name in targets])
        axis.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": CREATOR})
    pyplot.close(figure)
    write_output(path, content.getvalue())


def _plain(name: str) -> str:
    """A name as matplotlib shows it as it is: between dollar signs it would read formulas."""
    return name.replace("$", r"\$")
