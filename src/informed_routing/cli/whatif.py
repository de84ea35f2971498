"""`whatif`: measure a routed model on one workload, and predict it on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.errors import InputError
from informed_routing.files.user_files import file_name
from informed_routing.finite import written

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

    from informed_routing.whatif import AnyWorkload, Metric, Predictions

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
        from informed_routing.evaluation.workload import read_rows
        from informed_routing.whatif import read_workload

        if out.exists() and not resume:
            raise InputError(f"{out} exists", "Give another --out, or --resume to go on with it")
        nominal = read_workload(workload)
        texts = _texts([nominal], domain)
        _check_dial(folder, sparsity, budget)
        loaded = _loaded(folder, run, execution, weights, base)
        _run_workload(run, loaded, nominal, prompts, out, resume, sparsity, budget, texts)
        rows = read_rows(out)
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
        from informed_routing.whatif import predict as run_predict
        from informed_routing.whatif import read_workloads
        from informed_routing.whatif.plot import check_plot

        check_plot(plot)
        nominal = _nominal(table, workload)
        found = run_predict(
            table,
            nominal,
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
        from informed_routing.whatif import predict as run_predict
        from informed_routing.whatif import read_workloads

        nominal, everything, wanted = _nominal(table, workload), read_workloads(targets), _metrics(metrics)
        chosen = everything
        if only:
            known = [target.name for target in chosen]
            for name in only:
                if name not in known:
                    raise InputError(f"no target is called {name}", f"There are {', '.join(known)}")
            chosen = [target for target in chosen if target.name in only]
        for target in chosen:
            file_name(target.name, "the target")
        texts = _texts(chosen, domain, everything)
        about = _about(table)
        predicted = run_predict(table, nominal, chosen, wanted, delta=delta, seed=run.seed, progress=run.progress)
        loaded = _loaded(folder, run, execution, weights, base)
        rows: list[dict[str, Any]] = []
        for target in chosen:
            own = out / f"{target.name}.parquet"
            dial = (about.get("sparsity"), about.get("budget"))
            _run_workload(run, loaded, target, prompts, own, own.exists(), *dial, texts)
            direct = run_predict(own, target, [target], wanted, delta=delta, seed=run.seed)
            for one in wanted:
                rows.append(compared(predicted.row(target.name, one.name), direct.row(target.name, one.name)))
        limits = ("lower", "upper")  # a quantile's may be infinite
        shown = [{**row, **{name: written(row[name]) for name in limits}} for row in rows]
        result = {"prompts": prompts, "rows": shown}
        run.finish(result, lambda console: show_check(console, rows), model=folder, dtype=dtype_name(loaded.model))


for command in (measure, predict, check):
    app.command(command.__name__)(command)


# -- shared by the commands -----------------------------------------------------------------------------------


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


def _nominal(table: Path, workload: Path | None) -> AnyWorkload:
    """The workload that a table was measured with: the one given, else the one stored in it."""
    from informed_routing.whatif import read_workload, workload_from_mapping

    if workload is not None:
        return read_workload(workload)
    if not table.exists():
        raise InputError(f"table {table} does not exist", "Run `informed-routing whatif measure` first")
    stored = _about(table).get("workload")
    if stored is None:
        raise InputError(f"{table} does not say which workload it was measured with", "Give --workload")
    return workload_from_mapping(stored)


def _about(table: Path) -> Mapping[str, Any]:
    """What was stored beside the rows of a table. Raises InputError for a damaged one."""
    from informed_routing.evaluation.workload import read_about
    from informed_routing.whatif.table import readable

    with readable(table):
        return read_about(table)


def _metrics(path: Path | None) -> Sequence[Metric]:
    from informed_routing.whatif import DEFAULT_METRICS, metrics_from_sequence
    from informed_routing.whatif.settings import read_yaml

    return DEFAULT_METRICS if path is None else metrics_from_sequence(read_yaml(path, "metrics file"))


def _run_workload(
    run: Session,
    loaded: Loaded,
    workload: AnyWorkload,
    prompts: int,
    out: Path,
    resume: bool,
    sparsity: float | None,
    budget: Any,
    texts: Mapping[str, str],
) -> None:
    """Sample requests of a workload and measure them."""
    import numpy

    from informed_routing.evaluation.workload import Request, measure_workload

    config = loaded.model.routing_config
    target = check_sparsities([config.sparsity if sparsity is None else sparsity])[0]
    inputs = workload.sample(prompts, numpy.random.default_rng(run.seed))
    columns = (inputs.domain.tolist(), inputs.prompt_tokens.tolist(), inputs.output_tokens.tolist())
    requests = [Request(*request) for request in zip(*columns, strict=True)]
    measure_workload(
        loaded.model,
        _streams(loaded.tokenizer, sorted(set(columns[0])), texts),
        requests,
        sparsity=target,
        budget=budget,
        seed=run.seed,
        out=out,
        resume=resume,
        about={"workload": workload.model_dump(mode="json"), "sparsity": target, "budget": budget, "seed": run.seed},
        progress=run.progress,
    )


def _texts(
    workloads: Sequence[AnyWorkload], given: Sequence[str] | None, known: Sequence[AnyWorkload] = ()
) -> Mapping[str, str]:
    """The text of each domain of the workloads. InputError for one without, and for text of no domain that is known."""
    from informed_routing.assets.text import DEMO_TEXTS

    texts = named_values(given or (), "--domain", "wiki=demo:wiki")
    names = sorted({name for workload in workloads for name in workload.support()})
    possible = {name for workload in (*workloads, *known) for name in workload.support()}
    for name in texts:
        if name not in possible:
            raise InputError(f"--domain {name}: no workload has such a domain", f"There are {', '.join(names)}")
    for name in names:
        if name not in texts and f"demo:{name}" not in DEMO_TEXTS:
            raise InputError(f"domain {name!r} has no text", f"Give --domain {name}=DATA")
    return {name: texts.get(name, f"demo:{name}") for name in names}


def _streams(tokenizer: Any, names: Sequence[str], texts: Mapping[str, str]) -> Mapping[str, Any]:
    """The held-out text of each domain as one stream of tokens."""
    import torch

    from informed_routing.assets import load_texts

    streams = {}
    for name in names:
        documents = load_texts(texts[name], "heldout")
        ids = [tokenizer.encode(document, add_special_tokens=False) for document in documents]
        streams[name] = torch.tensor([token for document in ids for token in document], dtype=torch.long)
    return streams


# -- for people -----------------------------------------------------------------------------------------------


def compared(predicted: Any, direct: Any) -> dict[str, Any]:
    """A prediction beside the direct measurement of the same target and metric."""
    measured = direct.truncated_self_normalised
    return {
        "target": predicted.target,
        "metric": predicted.metric,
        "estimate": predicted.estimate,
        "lower": predicted.lower,
        "upper": predicted.upper,
        "colour": predicted.colour,
        "direct": measured,
        "direct_standard_error": direct.standard_error,
        "covered": predicted.lower <= measured <= predicted.upper,
    }


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


def show_check(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Predictions beside direct measurements."""
    from .tables import new_table

    table = new_table("Predicted and measured", ["target", "metric", "predicted", "interval", "measured", "inside"], 2)
    for row in rows:
        estimate = row["colour"] if row["estimate"] is None else f"{row['estimate']:.4g}"
        measured = f"{row['direct']:.4g} ± {row['direct_standard_error']:.2g}"
        interval = f"{row['lower']:.4g} to {row['upper']:.4g}"
        table.add_row(row["target"], row["metric"], estimate, interval, measured, "yes" if row["covered"] else "NO")
    console.print(table)
