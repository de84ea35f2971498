"""`whatif`: measure a routed model on one workload, and predict it on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.errors import InputError
from informed_routing.extras import need

from .arguments import check_file, check_folder, named_values
from .common import (
    BaseOption,
    Common,
    ExecutionOption,
    Session,
    WeightsOption,
    check_at_least,
    check_sparsities,
    dtype_name,
    session,
    with_common,
)

if TYPE_CHECKING:
    from rich.console import Console

    from informed_routing.whatif import Metric, Predictions
    from informed_routing.whatif.check import Comparison
    from informed_routing.whatif.measure import Dial

    from .loading import Loaded

app = typer.Typer(no_args_is_help=True, help="Estimate a routed model's cost and loss on workloads that were not run.")

WorkloadOption = Annotated[
    Path | None, typer.Option("--workload", metavar="FILE", help="YAML of the workload that is (or was) measured.")
]
TargetsOption = Annotated[Path, typer.Option("--targets", metavar="FILE", help="YAML of the workloads to predict.")]
MetricsOption = Annotated[
    Path | None,
    typer.Option("--metrics", metavar="FILE", help="YAML list of metrics [default: executed, MACs, loss, seconds]."),
]
DeltaOption = Annotated[float, typer.Option("--delta", help="All intervals hold together with probability 1 - delta.")]
DomainOption = Annotated[
    list[str] | None,
    typer.Option("--domain", metavar="NAME=DATA", help="Text of a domain [default: demo:NAME]. Repeatable."),
]
PromptsOption = Annotated[int, typer.Option("--prompts", "-n", help="Prompts to run.")]
SparsityOption = Annotated[
    float | None, typer.Option("--sparsity", "-s", help="Share approximated [default: trained].")
]
BudgetOption = Annotated[
    Literal["units", "macs", "latency"] | None,
    typer.Option("--budget", help="What --sparsity is measured in [default: as trained]."),
]


@with_common
def measure(
    common: Common,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Routing folder.")],
    workload: Annotated[Path, typer.Option("--workload", metavar="FILE", help="YAML of the workload to run.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="TABLE", help="Parquet table to write.")],
    prompts: PromptsOption = 1000,
    sparsity: SparsityOption = None,
    budget: BudgetOption = None,
    domain: DomainOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted table.")] = False,
    execution: ExecutionOption = "auto",
    weights: WeightsOption = None,
    base: BaseOption = None,
) -> None:
    """Run prompts of a workload once, routed and dense, and keep what each cost.

    Example: informed-routing whatif measure out --workload nominal.yaml --prompts 1000 --out table.parquet
    """
    check_at_least("--prompts", [prompts], 1)
    check_sparsities([] if sparsity is None else [sparsity])
    check_file("--out", out)
    with session("whatif measure", common) as run:
        _need_extra()
        from informed_routing.whatif import read_workload
        from informed_routing.whatif.measure import Measurer, domain_texts

        if out.exists() and not resume:
            raise InputError(f"{out} exists", "Give another --out, or --resume to go on with it")
        nominal = read_workload(workload)
        texts = domain_texts([nominal], _domains(domain))
        _check_dial(folder, sparsity, budget)
        loaded = _loaded(folder, run, execution, weights, base)
        measurer = Measurer(loaded.model, loaded.tokenizer, texts, run.seed, run.progress)
        rows = measurer.run(nominal, prompts, _dial(loaded, sparsity, budget), out, resume=resume)
        executed, possible = (sum(getattr(row, name) for row in rows) for name in ("executed", "possible"))
        result = {"table": str(out), "prompts": len(rows), "executed_fraction": executed / possible}
        run.finish(
            result,
            lambda console: console.print(
                f"{len(rows)} prompts, {100 * executed / possible:.1f} % executed: {out}", soft_wrap=True
            ),
            model=folder,
            dtype=dtype_name(loaded.model),
        )


@with_common
def predict(
    common: Common,
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Parquet table of `whatif measure`.")],
    targets: TargetsOption,
    workload: WorkloadOption = None,
    metrics: MetricsOption = None,
    delta: DeltaOption = 0.05,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", help="Half-width that is good enough, as a share of a metric's range."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw estimates and intervals.")
    ] = None,
) -> None:
    """Predict metrics of other workloads from a measured table, each with an interval and a traffic light.

    Example: informed-routing whatif predict table.parquet --targets targets.yaml --plot what-if.svg
    """
    if plot is not None:
        check_file("--plot", plot)
    with session("whatif predict", common) as run:
        _need_extra()
        from informed_routing.whatif import predict as run_predict
        from informed_routing.whatif import read_workloads
        from informed_routing.whatif.measure import measured_workload
        from informed_routing.whatif.plot import check_plot

        check_plot(plot)
        found = run_predict(
            table,
            measured_workload(table, workload),
            read_workloads(targets),
            _metrics(metrics),
            delta=delta,
            tolerance=tolerance,
            seed=run.seed,
            progress=run.progress,
        )
        if plot is not None:
            from informed_routing.whatif.plot import draw

            draw(found, plot)
        run.finish(found.as_dict(), lambda console: show(console, found), model=str(table), dtype="")


@with_common
def check(
    common: Common,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Routing folder that the table was measured with.")],
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Parquet table of `whatif measure`.")],
    targets: TargetsOption,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for the targets' own tables.")],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Targets to measure. Repeatable [default: all].")
    ] = None,
    prompts: PromptsOption = 1000,
    workload: WorkloadOption = None,
    metrics: MetricsOption = None,
    delta: DeltaOption = 0.05,
    domain: DomainOption = None,
    execution: ExecutionOption = "auto",
    weights: WeightsOption = None,
    base: BaseOption = None,
) -> None:
    """Measure some targets directly and compare with what was predicted. Tables that are there are used again.

    Example: informed-routing whatif check out table.parquet --targets targets.yaml --only longer --out checks
    """
    check_at_least("--prompts", [prompts], 1)
    check_folder("--out", out)
    with session("whatif check", common) as run:
        _need_extra()
        from informed_routing.whatif import predict as run_predict
        from informed_routing.whatif import read_workloads
        from informed_routing.whatif.check import check as run_check
        from informed_routing.whatif.check import named_targets
        from informed_routing.whatif.measure import Measurer, about_table, domain_texts, measured_workload

        nominal, everything, wanted = measured_workload(table, workload), read_workloads(targets), _metrics(metrics)
        chosen = named_targets(everything, only or ())
        texts = domain_texts(chosen, _domains(domain), everything)
        about = about_table(table)
        predicted = run_predict(table, nominal, chosen, wanted, delta=delta, seed=run.seed, progress=run.progress)
        loaded = _loaded(folder, run, execution, weights, base)
        dial = _dial(loaded, about.get("sparsity"), about.get("budget"))
        measurer = Measurer(loaded.model, loaded.tokenizer, texts, run.seed, run.progress)
        found = run_check(predicted, chosen, wanted, measurer, dial, out, prompts)
        result = {"prompts": prompts, "rows": [one.as_dict() for one in found]}
        run.finish(result, lambda console: show_check(console, found), model=folder, dtype=dtype_name(loaded.model))


for command in (measure, predict, check):
    app.command(command.__name__)(command)


# -- shared by the commands -----------------------------------------------------------------------------------


def _need_extra() -> None:
    need("arviz_stats", "pyarrow", "scipy", extra="whatif", for_what="The `whatif` commands")


def _loaded(folder: str, run: Session, execution: Any, weights: Any, base: str | None) -> Loaded:
    from .loading import choose_execution, load_routed

    loaded = load_routed(folder, run, base)
    choose_execution(run, loaded.model, execution, weights)
    return loaded


def _check_dial(folder: str, sparsity: float | None, budget: str | None) -> None:
    """Refuse a share that was not calibrated before the base model is loaded."""
    from .loading import check_routed, check_shares

    check_routed(folder)
    check_shares(folder, check_sparsities([] if sparsity is None else [sparsity]), budget)


def _metrics(path: Path | None) -> Sequence[Metric]:
    from informed_routing.whatif import DEFAULT_METRICS, metrics_from_sequence
    from informed_routing.whatif.settings import read_yaml

    return DEFAULT_METRICS if path is None else metrics_from_sequence(read_yaml(path, "metrics file"))


def _domains(given: Sequence[str] | None) -> Mapping[str, str]:
    return named_values(given or (), "--domain", "wiki=demo:wiki")


def _dial(loaded: Loaded, sparsity: float | None, budget: Any) -> Dial:
    """What was asked for, else the share that the model was fitted for."""
    from informed_routing.whatif.measure import Dial

    share = loaded.model.routing_config.sparsity if sparsity is None else sparsity
    return Dial(check_sparsities([share])[0], budget)


# -- for people -----------------------------------------------------------------------------------------------


_STYLES = {"green": "green", "amber": "yellow", "red": "red"}


def show(console: Console, found: Predictions) -> None:
    """A table of predictions, and below it why some are not green."""
    from rich.text import Text

    from .tables import new_table

    columns = ["target", "metric", "estimate", "interval", "light", "ESS", "lost mass"]
    table = new_table(f"Predictions from {found.prompts} prompts", columns, left=2)
    for row in found.rows:
        estimate = "-" if row.estimate is None else f"{row.estimate:.4g}"
        light = Text(row.colour, _STYLES[row.colour])
        interval = f"{row.lower:.4g} to {row.upper:.4g}"
        table.add_row(row.target, row.metric, estimate, interval, light, f"{row.ess:.0f}", f"{row.lost_mass:.3f}")
    console.print(table)
    for row in found.rows:
        if row.colour != "green":
            console.print(f"{row.target}, {row.metric}: {'; '.join(row.reasons)}. {row.advice}", soft_wrap=True)


def show_check(console: Console, rows: Sequence[Comparison]) -> None:
    """Predictions beside direct measurements."""
    from .tables import new_table

    table = new_table("Predicted and measured", ["target", "metric", "predicted", "interval", "measured", "inside"], 2)
    for row in rows:
        estimate = row.colour if row.estimate is None else f"{row.estimate:.4g}"
        measured = f"{row.direct:.4g} ± {row.direct_standard_error:.2g}"
        interval = f"{row.lower:.4g} to {row.upper:.4g}"
        table.add_row(row.target, row.metric, estimate, interval, measured, "yes" if row.covered else "NO")
    console.print(table)
