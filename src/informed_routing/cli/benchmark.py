"""`benchmark`: wall-clock prefill and decode, routed against dense."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

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
        Literal["units", "macs"] | None,
        typer.Option("--budget", help="What --sparsity is measured in [default: as trained]."),
    ] = None,
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
    """Time prefill and decode of the routed model beside the dense one, with the limit set by its arithmetic.

    Engines run in turns; the speed-up is against the faster of transformers and the routed model at 0.

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
        from informed_routing.evaluation.environment import environment
        from informed_routing.evaluation.speed import benchmark_rows

        from .loading import load_base_of, load_routed, prompt_text
        from .tables import speed_table

        loaded = load_routed(folder, run, base)
        if kv is not None:
            loaded.model.set_execution("sparse", kv=kv)
        for target in targets:
            loaded.model.set_sparsity(target, budget)  # a value out of range is refused before anything is timed
        rows = benchmark_rows(
            load_base_of(loaded, run),
            loaded.model,
            prompt_text(data or ["demo:wiki"], loaded.tokenizer, max(lengths) * max(batches)),
            sparsities=targets,
            prompt_tokens=lengths,
            new_tokens=counts,
            batches=batches,
            budget=budget,
            repeats=repeats,
            warmup=warmup,
            progress=run.progress,
        )
        run.finish(
            {"environment": environment(), "rows": rows},
            lambda console: console.print(speed_table(rows, "Speed against dense (medians of interleaved runs)")),
            model=folder,
            dtype=dtype_name(loaded.model),
        )
