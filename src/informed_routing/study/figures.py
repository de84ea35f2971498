"""Plots of the tables and figures, as SVG. Imports matplotlib: load this module only to draw."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from ..files.atomic import write_atomically
from . import results
from .grid import Grid
from .results import Entry, Value

_STYLE = {"svg.hashsalt": "informed-routing", "svg.fonttype": "none", "font.size": 9, "axes.grid": True}
_COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
_MARKERS = "osD^vPX*<>"


def draw(grid: Grid, found: Sequence[Entry], folder: Path) -> list[Path]:
    """Write the plots of a grid, one file for each model (named in it when there are several); returns the files.

    Entries without results are left out; without any, nothing is drawn.
    """
    files = []
    models = list(dict.fromkeys(entry.model for entry in found))
    for number, model in enumerate(models):
        own = [entry for entry in found if entry.model == model and entry.records]
        if not own:
            continue
        with plt.rc_context(_STYLE):  # type: ignore[arg-type]
            figure = _DRAWINGS[grid.layout](own)
            if figure is None:
                continue
            figure.suptitle(plain(f"{grid.title or grid.name}: {model.rstrip('/').rsplit('/', 1)[-1]}"))
            path = folder / f"{grid.name}{f'-{number + 1}' if len(models) > 1 else ''}.svg"
            write_atomically(path, functools.partial(_save, figure))
            plt.close(figure)
            files.append(path)
    return files


def plain(name: str) -> str:
    """A name as matplotlib shows it as it is: between dollar signs it would read formulas."""
    return name.replace("$", r"\$")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})  # a date would make every run another file


def _axes(count: int) -> tuple[Any, Any]:
    return plt.subplots(1, count, figsize=(4.6 * count, 3.6), layout="constrained", squeeze=False)


def _trade_off(own: Sequence[Entry]) -> Any:
    """Perplexity and mean accuracy over the MACs that were really saved; lines join the sparsities of a method."""
    panels: list[tuple[str, Callable[[Entry], Value | None]]] = [
        ("WikiText-2 word perplexity", results.perplexity),
        ("mean accuracy, %", results.average),
    ]
    panels = [panel for panel in panels if any(panel[1](entry) for entry in own)]
    if not panels:
        return None
    figure, axes = _axes(len(panels))
    names = list(dict.fromkeys(entry.name for entry in own))
    for axis, (title, read) in zip(axes[0], panels, strict=True):
        for place, name in enumerate(names):
            points = [
                (cost.value, value)
                for entry in own
                if entry.name == name
                and (cost := results.cost(entry, "macs_saved", 100.0)) is not None
                and (value := read(entry)) is not None
            ]
            _line(axis, points, name, place)
        axis.set_xlabel("MACs of the body saved, %")
        axis.set_ylabel(title)
    if panels[0][1] is results.perplexity:
        axes[0][0].set_yscale("log")
    # beside the panels: with ten methods it would cover some of them
    figure.legend(*axes[0][-1].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    return figure


def _line(axis: Any, points: Sequence[tuple[float, Value]], name: str, place: int) -> None:
    if points:
        xs, values = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        bars = [value.stderr or 0.0 for value in values]
        axis.errorbar(
            xs,
            [value.value for value in values],
            yerr=bars if any(bars) else None,
            label=plain(name),
            color=_COLOURS[place % len(_COLOURS)],
            marker=_MARKERS[place % len(_MARKERS)],
            capsize=2,
        )


def _over_sparsity(own: Sequence[Entry]) -> Any:
    """Validation loss and perplexity over sparsity (Table 4)."""
    figure, axes = _axes(2)
    for axis, title, read in (
        (axes[0][0], "validation loss", results.loss),
        (axes[0][1], "WikiText-2 word perplexity", results.perplexity),
    ):
        _curves(axis, own, read)
        axis.set_ylabel(title)
    axes[0][1].set_yscale("log")
    axes[0][0].legend(fontsize=7)
    return figure


def _curves(axis: Any, own: Sequence[Entry], read: Callable[[Entry], Value | None]) -> None:
    """One line a method over sparsity, all beginning at the dense model."""
    dense = next(((0.0, value) for entry in own if entry.kind == "dense" and (value := read(entry))), None)
    names = list(dict.fromkeys(entry.name for entry in own if entry.kind != "dense"))
    for place, name in enumerate(names):
        points = [
            (100 * entry.sparsity, value) for entry in own if entry.name == name and (value := read(entry)) is not None
        ]
        _line(axis, ([dense] if dense and points else []) + points, name, place)
    axis.set_xlabel("units approximated or dropped, %")


def _figure_1(own: Sequence[Entry]) -> Any:
    """(a) perplexity over sparsity, (b) cosine of the routed features to the dense ones, layer by layer."""
    figure, axes = _axes(2)
    _curves(axes[0][0], own, results.perplexity)
    axes[0][0].set_ylabel("WikiText-2 word perplexity")
    axes[0][0].set_yscale("log")
    axes[0][0].set_title("a")
    axes[0][0].legend(fontsize=7)
    with_features = [entry for entry in own if "features" in entry.records[0]]
    lowest = min((entry.sparsity for entry in with_features), default=None)
    for place, entry in enumerate(entry for entry in with_features if entry.sparsity == lowest):
        features = entry.records[0]["features"]
        label = f"{plain(entry.name)} ({100 * features['similar']:.1f} % above 0.95)"
        axes[0][1].plot(features["layers"], label=label, color=_COLOURS[place], marker=_MARKERS[place], markersize=3)
    axes[0][1].set_xlabel("layer")
    axes[0][1].set_ylabel("cosine to the dense features")
    axes[0][1].set_title("b" if lowest is None else f"b: at {100 * lowest:g} %")
    if with_features:
        axes[0][1].legend(fontsize=7)
    return figure


def _parts(own: Sequence[Entry]) -> Any:
    """How the approximated units divide into attention and FFN (Table 2)."""
    figure, axes = _axes(1)
    axis = axes[0][0]
    labels = [f"{plain(entry.name)}\n{100 * entry.sparsity:g} %" for entry in own]
    bottoms = [0.0] * len(own)
    for name, colour in (("attention", "tab:green"), ("ffn", "tab:orange")):
        heights = [50 * entry.records[0]["sparsity"].get(name, 0.0) for entry in own]
        axis.bar(labels, heights, bottom=bottoms, color=colour, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axis.set_ylabel("approximated, % of all units")
    axis.tick_params(axis="x", labelsize=6)
    axis.legend(fontsize=7)
    return figure


def _bars(own: Sequence[Entry]) -> Any:
    """Perplexity of each entry (Tables 8 and 9)."""
    shown = [(entry, value) for entry in own if (value := results.perplexity(entry) or results.loss(entry))]
    if not shown:
        return None
    figure, axes = _axes(1)
    axes[0][0].bar([plain(entry.name) for entry, _ in shown], [value.value for _, value in shown], color="tab:blue")
    axes[0][0].set_ylabel("WikiText-2 word perplexity" if results.perplexity(own[0]) else "validation loss")
    axes[0][0].tick_params(axis="x", labelsize=7)
    return figure


def _allocation(own: Sequence[Entry]) -> Any:
    """Share of the tokens that each unit executes; the hatched rest is approximated (Figure 3)."""
    shown = [entry for entry in own if "allocation" in entry.records[0]]
    if not shown:
        return None
    figure, axes = plt.subplots(
        len(shown), 2, figsize=(9.2, 2.6 * len(shown) + 0.4), layout="constrained", squeeze=False, sharey=True
    )
    for line, entry in zip(axes, shown, strict=True):
        for axis, kind, colour in zip(line, ("attention", "ffn"), ("tab:green", "tab:orange"), strict=True):
            units = [unit for unit in entry.records[0]["allocation"] if unit["kind"] == kind]
            layers, executed = [unit["layer"] for unit in units], [100 * unit["executed"] for unit in units]
            axis.bar(layers, executed, color=colour)
            rest = [100 - share for share in executed]
            axis.bar(layers, rest, bottom=executed, color="white", edgecolor=colour, hatch="///", linewidth=0.3)
            axis.set_title(f"{plain(entry.name)}, {100 * entry.sparsity:g} %: {kind}", fontsize=8)
            axis.set_xlabel("layer")
            axis.set_ylim(0, 100)
        line[0].set_ylabel("tokens executed, %")
    return figure


_DRAWINGS: dict[str, Callable[[Sequence[Entry]], Any]] = {
    "accuracy": _trade_off,
    "split": _parts,
    "loss": _over_sparsity,
    "columns": _bars,
    "curve": _figure_1,
    "allocation": _allocation,
    "trade_off": _trade_off,
}
