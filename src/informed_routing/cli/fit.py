"""`fit`: a pre-trained model into a routing folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Common, check_at_least, check_sparsities, session, with_common

if TYPE_CHECKING:
    from rich.console import Console

    from informed_routing.config.recipe import Recipe

_SIZES = "Stages and sizes"


@with_common
def fit(
    common: Common,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Routing folder to write.")],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Hub id, local folder, .gguf file or demo:smollm2-135m [default: the recipe's].",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="FILE", help="YAML file, or the name of a built-in recipe."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "-s", help="Share to approximate, such as 0.25.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Share of what: units (the paper), macs, or latency (measured)."),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option("--stages", help="Some of static,forecast,route,lora, or calibrate.", rich_help_panel=_SIZES),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start",
            metavar="DIR",
            help="Begin with the forecasters and routers of this routing folder; --stages says what to do.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of every gradient stage.", rich_help_panel=_SIZES)
    ] = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="lm, distill or mixed.", rich_help_panel=_SIZES)
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the forecasters.", rich_help_panel=_SIZES)] = None,
    fallback: Annotated[
        str | None,
        typer.Option(
            "--fallback",
            help="What an approximated token gets: forecaster, slim (some neurons and a forecast) or zero.",
            rich_help_panel=_SIZES,
        ),
    ] = None,
    slice_: Annotated[
        float | None,
        typer.Option("--slice", help="Of --fallback slim: share of an FFN's neurons.", rich_help_panel=_SIZES),
    ] = None,
    static_layers: Annotated[
        int | None,
        typer.Option(
            "--static-layers",
            metavar="N",
            help="Find N layers to approximate for every token, without router and keys.",
            rich_help_panel=_SIZES,
        ),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(
            "--units",
            help="Which units are routed: both, ffn or attention; the others always execute.",
            rich_help_panel=_SIZES,
        ),
    ] = None,
    router: Annotated[
        str | None, typer.Option("--router", help="mlp, linear or low-rank.", rich_help_panel=_SIZES)
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Text: demo:wiki|c4|code, files, globs, or a Hub set name:config:split:column. Repeatable; "
            "named twice, a text counts twice in training.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Sequences in a step.", rich_help_panel=_SIZES)
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", help="Tokens in a sequence.", rich_help_panel=_SIZES)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted fit in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints of a fit that succeeded.")
    ] = False,
) -> None:
    """Fit forecasters and routers to a model, and LoRA if asked for.

    Example: informed-routing fit demo:smollm2-135m --out out --sparsity 0.25 --budget macs

    Example: informed-routing fit --start out --stages lora --steps 500 --out out-lora

    Example: informed-routing fit --start out --stages calibrate --data mine.jsonl --out out-mine
    """
    target = None if sparsity is None else check_sparsities([sparsity])[0]
    chosen = build_recipe(
        recipe,
        {
            "model": model,
            "route.sparsity": target,
            "lora.sparsity": target if start else None,
            "route.budget": budget,
            "stages": None if stages is None else [part.strip() for part in stages.split(",") if part.strip()],
            "start": start,
            "forecaster.rank": rank,
            "forecaster.fallback": fallback,
            "forecaster.slice": slice_,
            "router.kind": router,
            "selection.units": units,
            "data": data or None,
            "seed": common.seed,
            "dtype": None if common.dtype == "auto" else common.dtype,
            **in_stages("steps", steps),
            **in_stages("batch_size", batch_size),
            **in_stages("sequence_length", sequence_length),
            **in_stages("objective.kind", objective, ("route", "lora")),
        },
    )
    if static_layers is not None:
        chosen = _with_search(chosen, static_layers)
    if chosen.start:
        decided = {"--rank": rank, "--fallback": fallback, "--slice": slice_, "--router": router}
        _refuse_idle_flags(chosen.stages, decided, budget, sparsity)
    with session("fit", common, chosen.seed) as run:
        from informed_routing.assets.text import check_readers
        from informed_routing.training.fit import fit as run_fit

        check_readers(chosen.data)
        report = run_fit(
            chosen,
            out,
            resume=resume,
            overwrite=overwrite,
            keep_checkpoints=keep_checkpoints,
            device=run.device,
            progress=run.progress,
        )
        run.finish(
            report,
            lambda console: show_report(console, report, out),
            model=chosen.model,
            dtype=_dtype(report, chosen),
        )


def _with_search(recipe: Recipe, layers: int) -> Recipe:
    """The recipe with the stage that looks for so many static layers, or for 0 without it."""
    check_at_least("--static-layers", [layers], 0)
    others = [name for name in recipe.stages if name != "static"]
    return recipe.with_overrides({"static.layers": layers, "stages": ["static", *others] if layers else others})


def _refuse_idle_flags(
    stages: Sequence[str], of_the_start: Mapping[str, Any], budget: str | None, sparsity: float | None
) -> None:
    """With a start some settings are its own: a flag that would change nothing is refused rather than ignored."""
    from informed_routing.errors import InputError

    for flag, value in of_the_start.items():
        if value is not None:
            raise InputError(f"{flag} {value} has no effect with --start", "Its folder has that decided: leave it out")
    if budget is not None and not {"route", "joint"} & set(stages):
        raise InputError(f"--budget {budget} has no effect without the route stage", "The folder keeps its budget")
    if sparsity is not None and list(stages) == ["calibrate"]:
        raise InputError(
            f"--sparsity {sparsity} has no effect on calibrate alone",
            "Its table serves all: give --sparsity to generate or evaluate",
        )


def _model_of(start: str) -> str:
    """The base model that a routing folder was fitted on."""
    from informed_routing.persistence.folder import locate, read_config

    return read_config(locate(start)).base_model.name


def build_recipe(name: str | None, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe of that name (or the defaults) under the flags. InputError names the first bad value."""
    from informed_routing.config.recipe import Recipe
    from informed_routing.recipes import recipe_path

    for key, value in overrides.items():
        if isinstance(value, int) and key.endswith(".steps"):
            check_at_least("--steps", [value], 1)
    recipe = Recipe.from_mapping({}) if name is None else Recipe.from_yaml(recipe_path(name))
    given, start = dict(overrides), overrides.get("start") or recipe.start
    if start and not given.get("model") and "model" not in recipe.model_fields_set:  # nobody named one
        given["model"] = _model_of(start)
    return recipe.with_overrides(given)


def in_stages(key: str, value: Any, stages: tuple[str, ...] = ("forecast", "route", "lora")) -> dict[str, Any]:
    """One flag as an override of the same setting in every stage."""
    return {f"{stage}.{key}": value for stage in stages}


def show_report(console: Console, report: Mapping[str, Any], out: Path) -> None:
    """A line per stage and the next command."""
    from informed_routing.training.report import seconds_of

    for name, stage in dict(report.get("stages", {})).items():
        console.print(f"{name}: {seconds_of(stage):.1f} s{_speed_of(stage)}")
    console.print(f"The routing folder is {out}. Next: informed-routing evaluate {out}", soft_wrap=True, markup=False)


def _speed_of(stage: Any) -> str:
    """Steps a second and MFU of a stage that took gradient steps, in parentheses."""
    if not isinstance(stage, Mapping):
        return ""
    if "mfu" in stage:
        return f" ({stage['steps_per_second']:.3g} steps/s, MFU {100 * stage['mfu']:.1f} %)"
    return next((text for part in stage.values() if (text := _speed_of(part))), "")


def _dtype(report: Mapping[str, Any], recipe: Recipe) -> str:
    return str(report.get("dtype", recipe.dtype))
