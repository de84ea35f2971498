"""`calibrate`: a new threshold table for a routed model, from text of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Common, check_at_least, check_sparsities, session, with_common
from .fit import build_recipe

if TYPE_CHECKING:
    from rich.console import Console


@with_common
def calibrate(
    common: Common,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Routing folder, or its Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Routing folder to write: another one.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Text such as the model will read: files, globs, demo:wiki|c4|code, or a Hub set. Repeatable; as many "
            "rows are taken of each [default: demo:wiki and demo:c4].",
        ),
    ] = None,
    target: Annotated[
        list[float] | None, typer.Option("--target", help="Share to find thresholds for; repeatable [default: ten].")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens to read [default: 32768].")] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", help="Tokens in a row: the longest context with its own [default: 512]."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
) -> None:
    """Find the thresholds of a routed model anew on other text, so that the dial holds there; nothing is trained.

    Example: informed-routing calibrate out --data mine.jsonl --data demo:code --out out-mine
    """
    targets = check_sparsities(target or [])
    check_at_least("--tokens", [] if tokens is None else [tokens], 1)
    check_at_least("--sequence-length", [] if sequence_length is None else [sequence_length], 2)
    chosen = build_recipe(
        None,
        {
            "start": folder,
            "stages": ["calibrate"],
            "data": data or None,
            "seed": common.seed,
            "dtype": None if common.dtype == "auto" else common.dtype,
            "calibration.targets": targets or None,
            "calibration.tokens": tokens,
            "calibration.sequence_length": sequence_length,
        },
    )
    with session("calibrate", common, chosen.seed) as run:
        from informed_routing.assets.text import check_readers
        from informed_routing.training.fit import fit

        check_readers(chosen.data)
        report = fit(chosen, out, resume=resume, overwrite=overwrite, device=run.device, progress=run.progress)
        found = report["stages"]["calibrate"]
        run.finish(
            {"tokens": found["tokens"], "thresholds": found["thresholds"]},
            lambda console: _show(console, found, out),
            model=chosen.model,
            dtype=str(report.get("dtype", chosen.dtype)),
        )


def _show(console: Console, found: Mapping[str, Any], out: Path) -> None:
    from .tables import new_table, share_cells

    title = f"Shares realised on {found['tokens']:,} tokens"
    table = new_table(title, ["threshold", "units", "attention", "ffn", "MACs saved"])
    for row in found["thresholds"]:
        table.add_row(f"{row['threshold']:.3f}", *share_cells(row))
    console.print(table)
    console.print(f"The routing folder is {out}. Next: informed-routing evaluate {out}", soft_wrap=True, markup=False)
