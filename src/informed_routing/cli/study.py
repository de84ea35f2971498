"""`study`: the paper's tables and figures, or a user's grid of methods, sparsities and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from informed_routing.errors import InputError, WorkError
from informed_routing.extras import need

from .arguments import check_folder
from .common import Common, Session, check_at_least, session, with_common

if TYPE_CHECKING:
    from informed_routing.study.grid import Grid
    from informed_routing.study.plan import Cell
    from informed_routing.study.report import Report
    from informed_routing.study.store import Store

SHAPES = "shapes"
SAMPLING = "importance-sampling"


@with_common
def study(
    common: Common,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="table1, table2, table3, table4, table5, table8, table9, figure1, figure3, control (static dropping), "
            "equal-cost (pruned and routed at equal MACs and time), all of them (all), a YAML grid of your own; or "
            "shapes: parameters and MACs on the paper's models, without weights; or importance-sampling: experiments "
            "with known truth behind `whatif`.",
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="Repeatable [default: the grid's: demo:smollm2-135m]."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where cells, stages and tables go.")] = Path(
        "study"
    ),
    scale: Annotated[
        str | None,
        typer.Option("--scale", help="cpu (hours on two cores) or full (the paper's, on a GPU) [default: the grid's]."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option("--data-dir", metavar="DIR", help="Files of the tasks [default: from the Hub]."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Documents of each task [default: the grid's].")
    ] = None,
    cells: Annotated[
        str | None, typer.Option("--cells", metavar="PATTERN", help="Only cells with such names: '*informed*'.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Run cells in parallel through Ray, on this machine.")] = False,
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", metavar="ADDRESS", help="A Ray cluster to use; it has to see --out."),
    ] = None,
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Time finished cells, in turns, instead of running any: on an idle machine."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells, their state, and the time that they will take.")
    ] = False,
    tables_only: Annotated[
        bool, typer.Option("--tables-only", help="Write the tables from what is there; run nothing.")
    ] = False,
) -> None:
    """Reproduce tables and figures of the paper on any model, cell by cell; run it again to continue.

    Finished cells are kept and not repeated, stages that cells share are trained once, and a cell that fails does not
    stop the others. Cells give the same numbers through Ray if --threads is the same.

    Example: informed-routing study table1 --out study --data-dir data --threads 2
    Example: informed-routing study table1 --out study --data-dir data --dry-run
    Example: informed-routing study table1 --out study --data-dir data --cells '*informed*' --ray --threads 1
    Example: informed-routing study my-grid.yaml --model path/to/model --out mine
    """
    check_at_least("--limit", [] if limit is None else [limit], 1)
    check_folder("--out", out)
    of_cells = {"--model": model, "--scale": scale, "--data-dir": data_dir, "--limit": limit, "--cells": cells}
    to_run = {"--ray": ray, "--ray-address": ray_address}
    modes = {"--speed": speed, "--dry-run": dry_run, "--tables-only": tables_only}
    _refuse_idle(names, of_cells, to_run, modes)
    with session("study", common) as run:
        for alone, command in ((SHAPES, _shapes), (SAMPLING, _importance_sampling)):
            if alone in names:
                command(run, out)
                return
        from informed_routing.study.plan import expand, matching
        from informed_routing.study.store import Store

        seeds = () if common.seed is None else (common.seed,)
        grids = _grids(names, tuple(model or ()), scale, seeds, limit, common.dtype)
        folder = None if data_dir is None else str(data_dir)
        if data_dir is not None and not data_dir.is_dir():
            raise InputError(f"--data-dir {data_dir} does not exist", "Give the folder with the tasks' files")
        expanded = {grid.name: expand(grid, folder) for grid in grids}
        chosen = matching([cell for found in expanded.values() for cell in found], cells)
        store = Store(out)
        if dry_run:
            _dry_run(run, chosen, store)
            return
        need("matplotlib", extra="study", for_what="Plots of a study")
        failed: dict[str, str] = {}
        if speed:
            _speed(run, grids, expanded, set(chosen), store)
        elif not tables_only:
            from informed_routing.study.parallel import LOCAL
            from informed_routing.study.runner import run as run_cells

            address = ray_address or (LOCAL if ray else None)
            _check_references(chosen, store)
            failed = run_cells(chosen, store, device=run.device, ray=address, progress=run.progress).failed
        _finish(run, grids, expanded, store)
    if failed:
        raise WorkError(
            f"{len(failed)} of {len(chosen)} cells failed, first {next(iter(failed))}: {next(iter(failed.values()))}",
            f"See {store.root / 'failed'}; run again to repeat only these",
        )


def _refuse_idle(names: Sequence[str], *groups: Mapping[str, Any]) -> None:
    """Raise InputError for options that would change nothing: of cells where there are none, two modes at once."""
    of_cells, to_run, modes = ([flag for flag, value in group.items() if value] for group in groups)
    for alone in (SHAPES, SAMPLING):
        if alone in names:
            if len(names) > 1:
                raise InputError(f"{alone} stands alone", "Run it on its own")
            for flag in [*of_cells, *to_run, *modes]:
                raise InputError(f"{flag} has no effect on {alone}", "Leave it out")
    if len(modes) > 1:
        raise InputError(f"{modes[0]} and {modes[1]} exclude each other", "Give one of them")
    if modes and to_run:
        raise InputError(f"{to_run[0]} has no effect with {modes[0]}, which runs no cells", "Leave it out")


def _check_references(cells: Sequence[Cell], store: Store) -> None:
    """Raise InputError for models, texts and tasks that cells still to be run need and that are not there."""
    from informed_routing.assets import resolve_model
    from informed_routing.assets.text import check_readers
    from informed_routing.evaluation.harness_tasks import local_files
    from informed_routing.evaluation.tasks import WIKITEXT, TaskSpec
    from informed_routing.study.identity import check_text

    waiting = [cell for cell in cells if store.record(cell) is None]
    for model in dict.fromkeys(cell.model for cell in waiting):
        resolve_model(model)
    for text in dict.fromkeys(text for cell in waiting for text in cell.training["data"]):
        check_text(text)
        check_readers(text)
    for cell in {(cell.data_dir, cell.evaluation.tasks, cell.evaluation.wikitext): cell for cell in waiting}.values():
        tasks = [*cell.evaluation.tasks, *([WIKITEXT] if cell.evaluation.wikitext else [])]
        if tasks:
            need("lm_eval", extra="study", for_what="Tasks of a study")
        if cell.data_dir is not None:
            for task in tasks:
                local_files(TaskSpec.parse(task), Path(cell.data_dir))


def _grids(
    names: Sequence[str],
    models: tuple[str, ...],
    scale: str | None,
    seeds: tuple[int, ...],
    limit: int | None,
    dtype: str,
) -> list[Grid]:
    """The grids of the command line. InputError for two of one name: their tables would be one file."""
    from informed_routing.study.grid import built_in_grids, load_grid

    wanted = [one for name in names for one in (built_in_grids() if name == "all" else [name])]
    grids = [load_grid(name, models=models, scale=scale, seeds=seeds) for name in dict.fromkeys(wanted)]
    if limit is not None:
        grids = [
            grid.model_copy(update={"evaluation": grid.evaluation.model_copy(update={"limit": limit})})
            for grid in grids
        ]
    if dtype != "auto":
        grids = [
            grid.model_copy(update={"training": grid.training.model_copy(update={"dtype": dtype})}) for grid in grids
        ]
    taken = [grid.name for grid in grids]
    for name in taken:
        if taken.count(name) > 1:
            raise InputError(f"two grids have the name {name}", "Give one of them another `name`")
    return grids


def _dry_run(run: Session, cells: Sequence[Cell], store: Store) -> None:
    from informed_routing.study.estimate import listing

    from .tables import new_table

    rows = listing(cells, store)

    def show(console: Any) -> None:
        table = new_table("Cells", ["cell", "state", "tokens", "time left"])
        for row in rows:
            left = "?" if row["seconds"] is None else _minutes(row["seconds"])
            table.add_row(row["name"], row["state"], f"{row['tokens']:,}", "" if row["state"] == "done" else left)
        console.print(table)
        known = [row["seconds"] for row in rows if row["seconds"] is not None]
        unknown = len(rows) - len(known)
        rest = [_minutes(sum(known))] if known else []
        rest += [f"{unknown} cells of which nothing like has been timed"] if unknown else []
        console.print("Time left, one after the other: " + ", and ".join(rest))

    run.finish({"cells": rows}, show, model=_models(cells), dtype=run.common.dtype)


def _speed(
    run: Session, grids: Sequence[Grid], expanded: dict[str, list[Cell]], chosen: set[Cell], store: Store
) -> None:
    from informed_routing.study.speed import run_speed

    for grid in grids:
        cells = [cell for cell in expanded[grid.name] if cell in chosen]
        run_speed(cells, store, grid.speed, device=run.device, progress=run.progress)


def _finish(run: Session, grids: Sequence[Grid], expanded: dict[str, list[Cell]], store: Store) -> None:
    """Write the tables and show them."""
    from informed_routing.study.paper.entry import Paper
    from informed_routing.study.report import write_report

    cells = [cell for found in expanded.values() for cell in found]
    _tables(run, write_report(grids, expanded, store, Paper()), _models(cells))


def _tables(run: Session, report: Report, model: str) -> None:
    """Show what was written."""

    def show(console: Any) -> None:
        for text in report.texts:  # as they are: so many columns are cut short in a drawn table
            console.print(text, soft_wrap=True, markup=False)
        console.print("Written: " + ", ".join(str(path) for path in report.files), soft_wrap=True)

    result = {"tables": report.tables, "files": [str(path) for path in report.files]}
    run.finish(result, show, model=model, dtype=run.common.dtype)


def _shapes(run: Session, out: Path) -> None:
    from informed_routing.study.paper.entry import write_shapes

    _tables(run, write_shapes(out), "shapes")


def _importance_sampling(run: Session, out: Path) -> None:
    """Minutes on one core; writes tables and figures into `out`."""
    need("arviz_stats", "matplotlib", "scipy", extra="study", for_what="Experiments of importance sampling")
    from informed_routing.study.paper.entry import write_importance_sampling

    rows = write_importance_sampling(out, run.progress)
    run.finish(
        {"experiments": rows},
        lambda console: console.print(f"Written: {out / 'importance_sampling.md'}", soft_wrap=True),
        model="",
        dtype="float64",
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _models(cells: Sequence[Cell]) -> str:
    return ", ".join(dict.fromkeys(cell.model for cell in cells))
