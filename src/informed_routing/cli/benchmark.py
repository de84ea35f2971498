"""`benchmark`: wall-clock prefill and decode, routed against dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.errors import InputError

from .common import BaseOption, Common, Session, check_at_least, check_sparsities, dtype_name, session, with_common
from .loading import HoldOption, PolicyOption

if TYPE_CHECKING:
    from informed_routing.config.folder import RoutingConfig
    from informed_routing.execution.choose import EngineChoice

DEFAULT_SHARES = (0.25, 0.4)
_NATIVE_ONLY = "no engine of the benchmark is native"


@with_common
def benchmark(
    common: Common,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Routing folder, or Hub id of one.")],
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            "--sparsity", "-s", help="Repeatable [default: 0.25 and 0.4, or the calibrated shares next to them]."
        ),
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
        typer.Option(
            "--data",
            metavar="DATA",
            help="Text of the prompts, as far as the fit has not read it [default: demo:wiki]. Repeatable.",
        ),
    ] = None,
    policy: PolicyOption = None,
    hold: HoldOption = False,
    base: BaseOption = None,
) -> None:
    """Time prefill and decode, routed beside dense, with the limit that memory and arithmetic set.

    Engines run in turns on the same text; speed-ups are against the fastest dense engine with the same weights.

    Example: informed-routing benchmark out --sparsity 0.25 --prompt-tokens 512 --new-tokens 32 --repeats 10
    """
    targets = check_sparsities(sparsity or [])
    lengths, counts, batches = (
        list(dict.fromkeys(given or [default]))
        for given, default in ((prompt_tokens, 512), (new_tokens, 32), (batch, 1))
    )
    check_at_least("--prompt-tokens", lengths, 1)
    check_at_least("--new-tokens", counts, 0)
    check_at_least("--batch", batches, 1)
    check_at_least("--repeats", [repeats], 1)
    check_at_least("--warmup", [warmup], 0)
    with session("benchmark", common) as run:
        from informed_routing.evaluation.engines import check_names, make_engines
        from informed_routing.evaluation.environment import environment
        from informed_routing.evaluation.speed import benchmark_rows
        from informed_routing.execution.choose import choose_engine

        from .loading import (
            check_routed,
            check_shares,
            decision_of,
            load_base_of,
            load_routed,
            refuse_idle,
            say_engine,
        )
        from .tables import phase_table, speed_table

        check_routed(folder)
        names = list(dict.fromkeys(engine or ["native", "torch", "transformers"]))
        check_names(names, weights or [])
        _refuse_idle(names, sparsity, budget, kv, policy, weights, profile, hold, targets)
        config = check_shares(folder, targets, budget if targets else None, "held" if hold else "threshold")
        if not targets and {"native", "torch"} & set(names):
            targets = default_shares(config, budget)
            shown = " and ".join(f"{100 * share:g} %" for share in targets)
            run.progress.message(
                f"timing at {shown} of the {budget or config.budget}: calibrated up to {_highest(config, budget):.1%}"
            )
            check_shares(folder, targets, budget, "held" if hold else "threshold")
        decision = decision_of(hold, kv or config.kv, policy)
        documents = _documents(run, folder, data or ["demo:wiki"])
        loaded = load_routed(folder, run, base)
        loaded.model.set_execution("sparse", kv=kv or config.kv)
        choice = choose_engine(loaded.model, decision=decision, progress=run.progress) if "native" in names else None
        names, reason = _runnable(choice, folder, names, explicit=engine is not None)
        if "native" not in names:
            _refuse_native_options(reason, weights, profile)
        formats = list(dict.fromkeys(weights or ([choice.weights] if choice else [])))
        dense = load_base_of(loaded, run) if {"transformers", "compiled"} & set(names) else None
        engines = make_engines(dense, loaded.model, names, formats, policy or "exact", decision)
        if profile and not any(one.native and one.native.phases for one in engines):
            refuse_idle("the engine of this device has no phases to time", "Leave it out", profile=profile)
        first = next((one for one in engines if one.routes), engines[0])
        described = {"name": first.name, "reason": reason}
        if {"native", "torch"} & set(names):
            described["policy"] = policy or "exact"
        say_engine(run, described)
        rows = benchmark_rows(
            engines,
            _prompts(run, documents, loaded.tokenizer, (max(lengths) + max(counts)) * max(batches)),
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

        result = {
            "environment": environment(),
            "engine": described,
            **({"decision": decision} if any(one.routes for one in engines) else {}),
            "engines": [one.name for one in engines],
            "rows": rows,
        }
        run.finish(result, show, model=folder, dtype=dtype_name(loaded.model))


def default_shares(config: RoutingConfig, budget: str | None) -> list[float]:
    """The usual shares where the routing is calibrated for them, else the nearest whole per cent that it is.

    Raises InputError for a routing that has not been calibrated.
    """
    shares = [getattr(row, budget or config.budget) for row in config.thresholds]
    if not shares:
        raise InputError("the routing has not been calibrated", "Give --sparsity 0, or run `fit` to the end")
    low, high = max(min(shares), 0.0), max(shares)
    if high <= 0:
        raise InputError(f"the routing is calibrated for no share of {budget or config.budget}", "Use another --budget")
    found = []
    for share in DEFAULT_SHARES:
        if share < low:
            share = min(math.ceil(100 * low) / 100, high)
        elif share > high:
            share = max(math.floor(100 * high) / 100, low)
        found.append(share or high)  # 0 is the dense model, which is timed anyway
    return list(dict.fromkeys(found))


def _highest(config: RoutingConfig, budget: str | None) -> float:
    return max(getattr(row, budget or config.budget) for row in config.thresholds)


def _refuse_idle(
    names: Sequence[str],
    sparsity: list[float] | None,
    budget: str | None,
    kv: str | None,
    policy: str | None,
    weights: list[str] | None,
    profile: bool,
    hold: bool,
    targets: Sequence[float],
) -> None:
    """Raise InputError for options that the engines and shares that were asked for leave without effect."""
    from .loading import refuse_idle

    leave = "Leave it out, or give the engine that it is for"
    if not {"native", "torch"} & set(names):
        reason = f"of the engines {', '.join(names)} none routes"
        refuse_idle(reason, leave, sparsity=sparsity, budget=budget, kv=kv, policy=policy, hold=hold)
    if "native" not in names:
        _refuse_native_options(_NATIVE_ONLY, weights, profile)
    if targets and not any(targets):
        idle = {"kv": kv, "policy": policy if policy == "auto" else None, "hold": hold}
        refuse_idle("at sparsity 0 all is executed", "Leave it out, or give another --sparsity", **idle)


def _refuse_native_options(reason: str, weights: list[str] | None, profile: bool) -> None:
    from .loading import refuse_idle

    refuse_idle(reason, "Leave it out, or add --engine native", weights=weights, profile=profile)


def _runnable(choice: EngineChoice | None, folder: str, names: list[str], *, explicit: bool) -> tuple[list[str], str]:
    """The engines that can run, and why the native one does or does not. InputError where it was asked for."""
    if choice is None:
        return names, "--engine leaves the native one out"
    if choice.native:
        return names, "--engine asks for it" if explicit else choice.reason
    if explicit:
        raise InputError(f"the native engine cannot run {folder}: {choice.obstacle}", "Leave out --engine native")
    return [name for name in names if name != "native"], choice.reason


def _documents(run: Session, folder: str, refs: Sequence[str]) -> list[str]:
    """The documents that prompts are taken from, all texts in turn; says which part of each text they are."""
    from informed_routing.evaluation.parts import part_of

    from .loading import fitted_of
    from .texts import part_words

    found: list[tuple[float, int, str]] = []
    for number, ref in enumerate(refs):
        part = part_of(ref, None, fitted_of(folder, "routed"))
        if not ref.startswith("demo:"):
            run.progress.message(f"prompts from {ref}: {part_words(part.split)} ({part.reason})")
        total = len(part.documents)
        found += [((place + 0.5) / total, number, document) for place, document in enumerate(part.documents)]
    return [document for *_, document in sorted(found, key=lambda item: item[:2])]


def _prompts(run: Session, documents: Sequence[str], tokenizer: Any, needed: int) -> Any:
    """At least `needed` tokens int64 [tokens] of the documents, if they have so many; says so where they have not."""
    from informed_routing.evaluation.speed import tokens_of

    text = tokens_of(documents, tokenizer, needed)
    if 0 < len(text) < needed:
        run.progress.message(f"the text has {len(text)} tokens, the largest prompts need {needed}: it is repeated")
    return text
