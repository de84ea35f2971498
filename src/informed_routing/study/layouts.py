"""Which numbers each table has: from the entries of a grid to a table, with the rows of a reference beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import results
from .effort import effort
from .grid import Grid
from .reference import Reference
from .results import Entry, Value
from .tables import Block, Column, Content, Row, Table
from .trade_off import trade_off

Read = Callable[[Entry], Value | None]


@dataclass(frozen=True)
class Measure:
    """A column and where its numbers come from."""

    column: Column
    read: Read


def _task(name: str, title: str) -> Measure:
    return Measure(Column(name, title, "high"), lambda entry: results.accuracy(entry, name))


def _share(name: str, title: str) -> Measure:
    return Measure(Column(name, title, digits=1), lambda entry: results.share(entry, name))


def _cost(name: str, title: str, scale: float = 100.0, digits: int = 1) -> Measure:
    return Measure(Column(name, title, digits=digits), lambda entry: results.cost(entry, name, scale))


TASKS = (
    _task("boolq", "BoolQ"),
    _task("openbookqa", "OBQA"),
    _task("piqa", "PIQA"),
    _task("winogrande", "WinoG."),
    _task("hellaswag", "Hella."),
    _task("arc_challenge", "ARC-C"),
    _task("arc_easy", "ARC-E"),
)
TASK_UNITS = Measure(Column("task_units", "units % on tasks", digits=1), results.task_share)
AVERAGE = Measure(Column("average", "AVG", "high"), results.average)
WIKITEXT = Measure(Column("wikitext", "WT2 word PPL", "low"), results.perplexity)
LOSS = Measure(Column("loss", "validation loss", "low", digits=3), results.loss)
COSTS = (
    _share("units", "units %"),
    _share("attention", "attention %"),
    _share("ffn", "FFN %"),
    _cost("macs_saved", "MACs saved %"),
    _cost("parameters_saved", "parameters saved %"),
    _cost("kv_bytes_per_token", "KV bytes/token", 1.0, 0),
    Measure(Column("tokens", "training tokens", digits=0), lambda e: e.value(lambda r: r["training"]["tokens"])),
    Measure(Column("seconds", "training s", digits=0), lambda e: e.value(lambda r: r["training"]["seconds"])),
    Measure(Column("prefill", "prefill speed-up"), lambda entry: results.speedup(entry, "prefill")),
    Measure(Column("decode", "decode speed-up"), lambda entry: results.speedup(entry, "decode")),
)
SIMILAR = Measure(Column("similar", "cosine > 0.95, %", digits=1), results.similar)
SPLIT = (
    Measure(Column("attention_part", "attention, % of approximated", digits=1), results.attention_part),
    Measure(Column("ffn_part", "FFN, % of approximated", digits=1), lambda entry: results.part(entry, "ffn")),
)

LAYOUTS: dict[str, tuple[Measure, ...]] = {
    "accuracy": (*TASKS, AVERAGE, WIKITEXT, TASK_UNITS, *COSTS),
    "split": (*SPLIT, *COSTS[:4]),
    "loss": (LOSS, WIKITEXT, *COSTS),
    "columns": (LOSS, WIKITEXT, *COSTS),
    "curve": (LOSS, WIKITEXT, SIMILAR, *COSTS[:4]),
    "allocation": COSTS[:4],
}

_NOTES = (
    "± is the standard error: of the items of a task, and with several seeds also of their mean. The best number is "
    "bold, the second best underlined, within a block only; the dense model and the paper's rows do not compete.",
    "Shares are those realised on all evaluated text, of which WikiText-2 is most, and on the tasks alone; thresholds "
    "were placed on other text. MACs saved are net of routers, forecasters, and keys and values of approximated "
    "tokens. Training tokens are all text that sets weights, read with or without gradients. Speed-ups are over the "
    "dense model in the same engine, in turns: the native one where it runs the method, else transformers (SliceGPT, "
    "MoD and D-LLM on a CPU), which is slower.",
)


def build_table(grid: Grid, found: Sequence[Entry], reference: Reference | None = None) -> Table:
    """The table of a grid. Rows that were not run or failed say so, with the errors in the notes."""
    if grid.layout == "trade_off":
        return trade_off(grid, found)
    asked = {task.partition("@")[0] for task in grid.evaluation.tasks}
    measures = [one for one in LAYOUTS[grid.layout] if one not in TASKS or one.column.key in asked]
    blocks = []
    for model in dict.fromkeys(entry.model for entry in found):
        own = [entry for entry in found if entry.model == model]
        for sparsity in sorted({entry.sparsity for entry in own if entry.kind != "dense"}) or [0.0]:
            rows = [_row(entry, measures) for entry in own if entry.sparsity == sparsity or entry.kind == "dense"]
            if reference is not None:
                rows += _printed_rows(reference, grid, own, model, sparsity)
            title = f"{model}, {100 * sparsity:g} % of the {grid.budget}" if sparsity else model
            blocks.append(Block(title, tuple(rows), model, sparsity))
    errors = [f"- {entry.name} at {100 * entry.sparsity:g} %: {error}" for entry in found for error in entry.errors]
    failed = "Failed:\n\n" + "\n".join(errors) if errors else ""
    columns = tuple(measure.column for measure in measures)
    return Table(grid.name, grid.title or grid.name, columns, tuple(blocks), (effort(found), *_NOTES, failed))


def _row(entry: Entry, measures: Sequence[Measure]) -> Row:
    cells: dict[str, Content] = {}
    if entry.records:
        cells = {measure.column.key: measure.read(entry) for measure in measures}
    else:
        cells = {measures[0].column.key: "failed" if entry.errors else "not run"}
    return Row(
        entry.name,
        cells,
        reference=entry.kind == "dense",
        recovered=entry.recovered,
        method=entry.method,
    )


def _printed_rows(reference: Reference, grid: Grid, own: Sequence[Entry], model: str, sparsity: float) -> list[Row]:
    labels = {(entry.method, entry.recovered): entry.name for entry in own}
    return [
        Row(
            labels.get((row.method, row.recovered), row.method),
            {name: Value(number) for name, number in row.values.items()},
            source="paper",
            recovered=row.recovered,
            method=row.method,
        )
        for row in reference.rows(grid.name, model)
        if row.sparsity in (0.0, sparsity)
    ]
