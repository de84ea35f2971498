"""Wall-clock speed, routed against dense. Every second that a user sees is measured here.

Engines take turns (round robin), so that a machine that slows down slows all of them; the numbers are medians
with their extremes. `dense` is the transformers model as it is, `routed` is the routed model, at sparsity 0
as well: a speed-up is stated against the faster of these two, so that a slow dense engine cannot flatter it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from informed_routing.errors import InputError
from informed_routing.evaluation.perplexity import sparsity_record
from informed_routing.progress import NullProgress, Progress


@dataclass(frozen=True)
class Timing:
    """Seconds of one engine: median, extremes, and how many runs they come from."""

    median: float
    min: float
    max: float
    runs: int


@dataclass
class Workload:
    """Something to time. `prepare` runs outside the clock before each `run`, which gets what it returned."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None

    def __call__(self) -> Any:
        return self.run(self.prepare())


def measure(
    workloads: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Time callables in turns: `warmup` unrecorded rounds, then `repeats` rounds of one run of each.

    Each round starts with another engine, so that none is always first. CUDA work is waited for. Raises
    InputError when there is nothing to time.
    """
    if not workloads or repeats < 1 or warmup < 0:
        raise InputError(f"{len(workloads)} engines, {repeats} repeats: nothing to time", "Give --repeats 1 or more")
    progress = progress or NullProgress()
    names = list(workloads)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = _timed(workloads[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
        progress.advance(turn + 1)
    return {
        name: Timing(statistics.median(values), min(values), max(values), len(values))
        for name, values in seconds.items()
    }


def prefill_callable(model: Any, ids: Tensor, before: Callable[[], Any] = lambda: None) -> Workload:
    """Prefill of prompts `[B, N]` with a fresh cache and the logits of the last position only."""

    def run(_state: Any) -> Tensor:
        return _step(model, ids, None)

    return Workload(run, before)


def decode_callable(model: Any, ids: Tensor, new_tokens: int, before: Callable[[], Any] = lambda: None) -> Workload:
    """`new_tokens` greedy one-token steps after prompts `[B, N]`; the prefill is not on the clock."""

    def prepare() -> tuple[Any, Tensor]:
        before()
        cache = _fresh_cache(model)
        return cache, _step(model, ids, cache).argmax(-1)

    def run(state: tuple[Any, Tensor]) -> Tensor:
        cache, token = state
        for _ in range(new_tokens):
            token = _step(model, token, cache).argmax(-1)
        return token

    return Workload(run, prepare)


def benchmark_rows(
    dense: Any,
    routed: Any,
    text: Tensor,
    *,
    sparsities: Sequence[float] = (0.25,),
    prompt_tokens: Sequence[int] = (512,),
    new_tokens: Sequence[int] = (64,),
    batches: Sequence[int] = (1,),
    phases: Sequence[str] = ("prefill", "decode"),
    budget: str | None = None,
    repeats: int = 5,
    warmup: int = 1,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Rows of the contract's `benchmark` result, for every combination of the settings.

    `dense` and `routed` are the same base model on one device; `text` int64 `[tokens]` is real text, since
    what is approximated depends on it (it is repeated when too short). Prefill is measured once per batch and
    prompt length; a `new_tokens` of 0 gives no decode rows. Decode rows carry `new_tokens` besides the
    contract's fields. Raises InputError for settings that cannot be measured.
    """
    _check_settings(text, prompt_tokens, new_tokens, batches)
    progress = progress or NullProgress()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for batch in batches:
            for length in prompt_tokens:
                ids = take_prompts(text, batch, length).to(dense.device)
                counts = [0] if "prefill" in phases else []
                counts += [count for count in new_tokens if count and "decode" in phases]
                for count in counts:
                    name = f"decode {count}" if count else "prefill"
                    progress.stage(f"{name}, {length}-token prompt, batch {batch}", warmup + repeats)
                    rows += _compare(
                        dense,
                        routed,
                        ids,
                        count,
                        [0.0, *(s for s in sparsities if s)],
                        budget,
                        repeats,
                        warmup,
                        progress,
                    )
    return rows


def take_prompts(text: Tensor, batch: int, length: int) -> Tensor:
    """`[batch, length]` consecutive prompts from the start of `text` `[tokens]`, repeated if too short."""
    needed = batch * length
    return text.repeat(-(-needed // len(text)))[:needed].view(batch, length)


def _compare(
    dense: Any,
    routed: Any,
    ids: Tensor,
    new_tokens: int,
    sparsities: Sequence[float],
    budget: str | None,
    repeats: int,
    warmup: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Dense and every sparsity on one workload, timed together; `new_tokens` 0 is prefill."""

    def workload(model: Any, before: Callable[[], Any] = lambda: None) -> Workload:
        if new_tokens:
            return decode_callable(model, ids, new_tokens, before)
        return prefill_callable(model, ids, before)

    workloads: dict[str, Workload] = {"dense": workload(dense)}
    for sparsity in sparsities:
        workloads[f"routed {sparsity}"] = workload(routed, functools.partial(routed.set_sparsity, sparsity, budget))
    timings = measure(workloads, repeats, warmup, progress)
    best_dense = min(timings["dense"].median, timings["routed 0.0"].median)
    per_run = ids.shape[0] * (new_tokens or ids.shape[1])

    def row(engine: str, timing: Timing, shares: dict[str, float], limit: float) -> dict[str, Any]:
        speedup = best_dense / timing.median
        return {
            "engine": engine,
            "phase": "decode" if new_tokens else "prefill",
            "batch": ids.shape[0],
            "prompt_tokens": ids.shape[1],
            **({"new_tokens": new_tokens} if new_tokens else {}),
            "sparsity": shares,
            "seconds": asdict(timing),
            "tokens_per_second": per_run / timing.median,
            "speedup_vs_dense": speedup,
            "limit_speedup": limit,
            "fraction_of_limit": speedup / limit,
        }

    rows = [row("dense", timings["dense"], sparsity_record(None, 0.0), 1.0)]
    for sparsity in sparsities:
        stats, limit = _realised(routed, workloads[f"routed {sparsity}"], ids.shape[0] * max(new_tokens, 1))
        rows.append(row("routed", timings[f"routed {sparsity}"], sparsity_record(stats, sparsity), limit))
    return rows


def _realised(routed: Any, workload: Workload, head_rows: int) -> tuple[dict[str, Any], float]:
    """What the timed part (not the prefill before a decode) approximates, and its limit; off the clock."""
    state = workload.prepare()
    routed.reset_routing_stats()
    workload.run(state)
    head = head_rows * routed.get_output_embeddings().weight.numel()
    return routed.routing_stats(), routed.stats.limit_speedup(head)


def _timed(workload: Callable[[], Any]) -> float:
    state = workload.prepare() if isinstance(workload, Workload) else None
    _wait()
    start = time.perf_counter()
    if isinstance(workload, Workload):
        workload.run(state)
    else:
        workload()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _fresh_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits `[B, 1, vocabulary]` of the last position after `ids` `[B, n]` on top of `cache`."""
    with torch.inference_mode():
        cache = _fresh_cache(model) if cache is None else cache
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits
    return logits


def _check_settings(
    text: Tensor, prompt_tokens: Sequence[int], new_tokens: Sequence[int], batches: Sequence[int]
) -> None:
    if text.ndim != 1 or len(text) == 0:
        raise InputError("there is no text to benchmark on", "Give --data with text in it")
    for name, values, least in (
        ("prompt-tokens", prompt_tokens, 1),
        ("new-tokens", new_tokens, 0),
        ("batch", batches, 1),
    ):
        for value in values:
            if value < least:
                raise InputError(f"--{name} {value} is below {least}", "Give a larger number")
