"""`benchmark`: wall-clock prefill and decode, routed against dense."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from informed_routing.errors import InputError

from .common import BaseOption, Common, check_at_least, check_sparsities, dtype_name, session, with_common


@with_common
def benchmark(
    common: Common,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Routing folder, or Hub id of one.")],
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", "-s", help="Repeatable [default: 0.25 and 0.4].")
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option("--prompt-tokens", help="Repeatable [default: 512].")
    ] = None,
    new_tokens: Annotated[
        list[int] | None,
        typer.Option("--new-tokens", help="Decode steps; 0 measures prefill only. Repeatable [default: 32]."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="Repeatable [default: 1].")] = None,
    budget: Annotated[
        Literal["units", "macs", "latency"] | None,
        typer.Option("--budget", help="What --sparsity is measured in [default: as trained]."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            "-e",
            help="native is the CPU engine, torch the routed model in PyTorch, transformers the dense model, compiled "
            "that through torch.compile (slow start). Repeatable [default: native where it runs, torch, transformers].",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            help="Of the native engine. Repeatable [default: the model's dtype].",
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the native engine spends its time.")] = False,
    repeats: Annotated[int, typer.Option("--repeats", help="Measured runs of each engine.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", help="Unmeasured runs of each engine before.")] = 1,
    kv: Annotated[
        Literal["keep", "drop"] | None, typer.Option("--kv", help="Keys and values of approximated tokens.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="DATA", help="Text of the prompts (held-out part) [default: demo:wiki]."),
    ] = None,
    base: BaseOption = None,
) -> None:
    """Time prefill and decode, routed beside dense, with the limit that memory and arithmetic set.

    Engines run in turns on the same text; speed-ups are against the fastest dense engine with the same weights.

    Example: informed-routing benchmark out --sparsity 0.25 --prompt-tokens 512 --new-tokens 32 --repeats 10
    """
    targets = check_sparsities(sparsity or [0.25, 0.4])
    lengths, counts, batches = prompt_tokens or [512], new_tokens or [32], batch or [1]
    check_at_least("--prompt-tokens", lengths, 1)
    check_at_least("--new-tokens", counts, 0)
    check_at_least("--batch", batches, 1)
    check_at_least("--repeats", [repeats], 1)
    check_at_least("--warmup", [warmup], 0)
    with session("benchmark", common) as run:
        from informed_routing.evaluation.engines import make_engines
        from informed_routing.evaluation.environment import environment
        from informed_routing.evaluation.speed import benchmark_rows, prompt_text
        from informed_routing.execution.native import native_reason

        from .loading import load_base_of, load_routed
        from .tables import phase_table, speed_table

        loaded = load_routed(folder, run, base)
        loaded.model.set_execution("sparse", kv=kv)
        for target in targets:
            # A value out of range is refused before anything is timed.
            loaded.model.set_sparsity(target, budget, "threshold")
        names: list[str] = list(engine or ["native", "torch", "transformers"])
        reason = native_reason(loaded.model, run.progress) if kv != "drop" else "kv='drop' needs the torch engine"
        if reason is not None and "native" in names:
            if engine:
                raise InputError(f"the native engine cannot run {folder}: {reason}", "Leave out --engine native")
            run.progress.message(f"no native engine: {reason}")
            names.remove("native")
        formats = list(weights or ["bfloat16" if dtype_name(loaded.model) == "bfloat16" else "float32"])
        rows = benchmark_rows(
            make_engines(load_base_of(loaded, run), loaded.model, names, formats),
            prompt_text(data or ["demo:wiki"], loaded.tokenizer, (max(lengths) + max(counts)) * max(batches)),
            sparsities=targets,
            prompt_tokens=lengths,
            new_tokens=counts,
            batches=batches,
            budget=budget,
            repeats=repeats,
            warmup=warmup,
            profile=profile,
            progress=run.progress,
        )

        def show(console: Any) -> None:
            console.print(speed_table(rows, "Speed against dense (medians of interleaved runs)"))
            if profile:
                console.print(phase_table(rows, "Where the native engine's time goes (share of the forward)"))

        run.finish({"environment": environment(), "rows": rows}, show, model=folder, dtype=dtype_name(loaded.model))
