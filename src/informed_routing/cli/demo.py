"""`demo`: the main job on the embedded default, end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from informed_routing.files.user_files import read_json

from .arguments import check_folder
from .common import Common, Session, check_at_least, dtype_name, session, with_common

if TYPE_CHECKING:
    from rich.console import Console

    from informed_routing.config.parts import Budget
    from informed_routing.config.recipe import Recipe

    from .loading import Loaded

SPARSITIES = (0.15, 0.25, 0.4)
SHARES = (0.15, 0.25, 0.35)
"""Of multiply-accumulates, at which the routing that comes with the package is shown."""
PROMPT = "The river rises in the mountains and"
PROMPT_TEXTS = ["demo:wiki"]
SEQUENCE = 512  # tokens of a scored sequence
_PREFILL, _DECODE, _DECODE_PROMPT = 512, 24, 128  # tokens


@with_common
def demo(
    common: Common,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Routing folder to write.")] = Path(
        "demo-out"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Fit again, even if DIR holds a finished fit.")
    ] = False,
    steps: Annotated[int | None, typer.Option("--steps", help="Router training steps [default: the recipe's].")] = None,
    rows: Annotated[int, typer.Option("--rows", help="Held-out sequences of 512 tokens per text.")] = 8,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured runs of each engine.")] = 3,
) -> None:
    """Fit, evaluate and time a routed SmolLM2-135M on embedded text, in minutes on a CPU.

    A finished fit in DIR is used again, an interrupted one is continued. Beside it stands demo:smollm2-135m-routed,
    which comes with the package and has been trained for longer.

    Example: informed-routing demo --out demo-out
    """
    from .fit import build_recipe, in_stages

    check_folder("--out", out)
    check_at_least("--rows", [rows], 1)
    check_at_least("--repeats", [repeats], 1)
    overrides = {"seed": common.seed, "dtype": None if common.dtype == "auto" else common.dtype}
    recipe = build_recipe("demo", {**overrides, **in_stages("steps", steps, ("route",))})
    with session("demo", common, recipe.seed) as run:
        from informed_routing.assets import DEMO_ROUTED
        from informed_routing.evaluation.environment import environment

        from .evaluate import DEFAULT_TEXTS, evaluate_runs, load_all
        from .generate import generate_sample, show_samples
        from .loading import load_routed

        report = _fit(run, recipe, out, overwrite)
        loaded = load_routed(str(out), run)
        targets = _attainable(run, loaded, SPARSITIES, "units")
        texts = load_all(DEFAULT_TEXTS, "heldout", loaded.tokenizer, SEQUENCE, rows)
        runs = evaluate_runs(run, loaded, str(out), texts, [0.0, *targets], "units", SEQUENCE, 4)
        speed = _speed(run, loaded, targets, repeats, "units")
        loaded.model.set_sparsity(targets[len(targets) // 2] if targets else 0.0, "units")
        sample = generate_sample(run, loaded, PROMPT, 32, routing=True)
        trained = load_routed(DEMO_ROUTED, run)
        shares = _attainable(run, trained, SHARES, "macs")
        trained_runs = [runs[0], *evaluate_runs(run, trained, DEMO_ROUTED, texts, shares, "macs", SEQUENCE, 4)]
        trained_speed = _speed(run, trained, shares, repeats, "macs")
        trained.model.set_sparsity(shares[len(shares) // 2] if shares else 0.0, "macs")
        trained_sample = generate_sample(run, trained, PROMPT, 32, routing=True)

        def show(console: Console) -> None:
            show_samples(console, [sample])
            console.print()
            console.print(demo_table(runs, speed))
            console.print()
            console.print(
                f"{DEMO_ROUTED}: the same base model, routed by longer training (shares of MACs)", markup=False
            )
            show_samples(console, [trained_sample])
            console.print()
            console.print(demo_table(trained_runs, trained_speed))
            console.print(
                f"Routing folder: {out}. Next: informed-routing generate {out} --prompt TEXT --show-routing",
                markup=False,
                soft_wrap=True,
            )

        run.finish(
            {
                "fit": report,
                "runs": runs,
                "rows": speed,
                "samples": [sample],
                "embedded": {"runs": trained_runs, "rows": trained_speed, "samples": [trained_sample]},
                "environment": environment(),
            },
            show,
            model=recipe.model,
            dtype=dtype_name(loaded.model),
        )


def demo_table(runs: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]]) -> Any:
    """One row per sparsity: what was approximated, perplexity, and speed against dense with its limit."""
    from .tables import main_metric, new_table, share_cells, target_label, with_ratio

    dense = runs[0]["tasks"]
    columns = [
        "sparsity",
        "units",
        "attention",
        "ffn",
        "MACs saved",
        *(f"perplexity {task}" for task in dense),
    ]
    title = "Perplexity (ratio to dense), approximated shares, speed against the fastest dense engine (limit)"
    table = new_table(title, [*columns, f"prefill {_PREFILL}", "decode"])
    for run in runs:
        target = run["sparsity"]["target"]
        perplexities = [with_ratio(main_metric(run["tasks"][task]), main_metric(dense[task])) for task in dense]
        cells = [_speed_cell(speed, phase, target) for phase in ("prefill", "decode")]
        table.add_row(target_label(run["sparsity"]), *share_cells(run["sparsity"]), *perplexities, *cells)
    return table


def _speed_cell(rows: Sequence[Mapping[str, Any]], phase: str, target: float) -> str:
    for row in rows:
        routes = row["engine"] != "transformers"
        if routes and (row["phase"], row["sparsity"]["target"]) == (phase, target):
            limit = f" ({row['limit_speedup']:.2f}x)" if target else ""
            return f"{row['tokens_per_second']:.0f}/s {row['speedup_vs_dense']:.2f}x{limit}"
    return ""


def _fit(run: Session, recipe: Recipe, out: Path, overwrite: bool) -> dict[str, Any]:
    """The report of a finished fit in `out`: found there, or made now (from a checkpoint if there is one)."""
    from informed_routing.training.fit import fit

    finished, interrupted = fit_state(out)
    if finished and not overwrite:
        run.progress.message(f"{out} already holds a finished fit: using it (--overwrite fits again)")
        return cast(dict[str, Any], read_json(out / "fit.json", "the fit's report"))
    if interrupted and not overwrite:
        run.progress.message(f"continuing the interrupted fit in {out}")
    return fit(
        recipe,
        out,
        resume=interrupted and not overwrite,
        overwrite=overwrite,
        device=run.device,
        progress=run.progress,
    )


def fit_state(out: Path) -> tuple[bool, bool]:
    """(finished, interrupted) of a routing folder."""
    finished = (out / "routing_config.json").is_file() and (out / "fit.json").is_file()
    return finished, not finished and (out / "checkpoints").is_dir()


def _attainable(run: Session, loaded: Loaded, wanted: Sequence[float], budget: Budget) -> list[float]:
    """The shares of a budget that lie in the table that the fit was calibrated for."""
    low, high = loaded.model.calibrated_range(budget)
    kept = [target for target in wanted if low <= target <= high]
    if len(kept) < len(wanted):
        run.progress.message(f"calibrated for {low:.0%} to {high:.0%} of the {budget}: leaving out what lies outside")
    return kept


def _speed(run: Session, loaded: Loaded, targets: Sequence[float], repeats: int, budget: str) -> list[dict[str, Any]]:
    """Prefill at 512 tokens and batch-1 decode; the decode starts from a shorter prompt."""
    from informed_routing.evaluation.engines import make_engines
    from informed_routing.evaluation.speed import benchmark_rows, prompt_text
    from informed_routing.execution.choose import choose_engine

    from .loading import load_base_of

    choice = choose_engine(loaded.model, progress=run.progress)
    names = ["native" if choice.native else "torch", "transformers"]
    engines = make_engines(load_base_of(loaded, run), loaded.model, names, [choice.weights])
    text = prompt_text(PROMPT_TEXTS, loaded.tokenizer, _PREFILL)
    rows: list[dict[str, Any]] = []
    for length, new, phase in ((_PREFILL, 0, "prefill"), (_DECODE_PROMPT, _DECODE, "decode")):
        measured = benchmark_rows(
            engines,
            text,
            sparsities=targets,
            prompt_tokens=[length],
            new_tokens=[new],
            phases=[phase],
            budget=budget,
            repeats=repeats,
            progress=run.progress,
        )
        rows += measured
    return rows
