"""`inspect`: what of a model can be routed, from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .common import Common, check_at_least, session, with_common

if TYPE_CHECKING:
    from rich.console import Console

    from informed_routing.execution.inspection import Inspection


@with_common
def inspect(
    common: Common,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, local folder (a config.json is enough), .gguf file, routing folder or demo:smollm2-135m.",
        ),
    ],
    context: Annotated[
        int, typer.Option("--context", help="Keys that a token attends to, for shares of multiply-accumulates.")
    ] = 512,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Show the units of a model, how its layers use them, what can be skipped, and which engine knows it.

    No weights are read; of a Hub model only its configuration is fetched.

    Example: informed-routing inspect demo:smollm2-135m

    Example: informed-routing inspect MODEL --json units.json
    """
    check_at_least("--context", [context], 1)
    with session("inspect", common) as run:
        from informed_routing.assets.empty import load_empty
        from informed_routing.execution.inspection import inspect as look

        found = look(load_empty(model, revision=revision), context)
        run.finish(found.as_dict(), lambda console: _show(console, found, model), model=model, device="meta", dtype="")


def _show(console: Console, found: Inspection, name: str) -> None:
    from .tables import new_table

    title = f"{name}: {found.model_type}, {found.layers} layers of width {found.hidden_size}"
    table = new_table(title, ["unit", "module", "layers", "added to the stream h", "MACs", "skippable", "neurons"], 4)
    for unit in found.units:
        table.add_row(
            unit.kind,
            unit.module,
            _ranges(unit.layers),
            unit.form,
            f"{unit.macs:,.0f}",
            "needs weights" if unit.needs_weights else f"{unit.skippable:.0%}" if unit.routed else "always runs",
            "-" if unit.neurons is None else f"{unit.neurons:,}",
        )
    console.print(table)
    source = "a family of the table" if found.source == "table" else "read from its code"
    engines = f"native ({', '.join(found.engines)})" if found.engines else "torch"
    console.print(
        f"{found.skippable:.1%} of {found.macs:,.0f} MACs a token (at {found.context} keys) can be skipped; {source}; "
        f"engine: {engines}",
        soft_wrap=True,
    )


def _ranges(places: list[int]) -> str:
    """0-3, 5"""
    parts: list[list[int]] = []
    for place in places:
        if parts and place == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], place]
        else:
            parts.append([place])
    return ", ".join("-".join(map(str, part)) for part in parts)
