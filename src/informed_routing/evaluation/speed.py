"""Wall-clock speed, routed against dense.

Every engine runs dense too, and a speed-up is stated against the fastest dense one with the same weights, so that a
slow dense engine cannot flatter it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from informed_routing.assets import load_texts
from informed_routing.errors import InputError
from informed_routing.evaluation.engines import Engine
from informed_routing.evaluation.numbers import not_finite
from informed_routing.evaluation.perplexity import sparsity_record
from informed_routing.evaluation.timing import Workload, measure
from informed_routing.progress import NullProgress, Progress
from informed_routing.routing.limits import limit_speedup


def prefill_callable(engine: Engine, ids: Tensor, before: Callable[[], Any] = lambda: None) -> Workload:
    """Prefill of prompts `[B, N]` with a fresh cache and the logits of the last position only."""

    def prepare() -> Any:
        before()
        return engine.fresh_cache(ids.shape[0], ids.shape[1])

    def run(cache: Any) -> Tensor:
        with torch.inference_mode():
            return engine.step(ids, cache)

    return Workload(run, prepare)


def decode_callable(
    engine: Engine, ids: Tensor, following: Tensor, before: Callable[[], Any] = lambda: None
) -> Workload:
    """One-token steps after prompts `[B, N]`, each with its argmax; the prefill is not on the clock.

    Step t reads token t of `following` `[B, new]` whatever the model says, so that all engines and sparsities work on
    the same text. Returns the greedy tokens `[B, new]`.
    """

    def prepare() -> Any:
        before()
        with torch.inference_mode():
            cache = engine.fresh_cache(ids.shape[0], ids.shape[1] + following.shape[1])
            engine.step(ids, cache)
        return cache

    def run(cache: Any) -> Tensor:
        with torch.inference_mode():
            steps = following.split(1, dim=1)
            return torch.cat([engine.step(token.contiguous(), cache).argmax(-1) for token in steps], dim=1)

    return Workload(run, prepare)


def benchmark_rows(
    engines: Sequence[Engine],
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
    profile: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Rows of `benchmark --json`, for every combination of the settings.

    `engines` hold the same base model on one device; those that route run dense and at every sparsity. `text` int64
    `[tokens]` is real text, since what is approximated depends on it (it is repeated when too short). Prefill is
    measured once per batch and prompt length; a `new_tokens` of 0 gives no decode rows. Decode rows carry
    `new_tokens`, all rows `weights`, and with `profile` those of an engine with `phases` `phase_seconds`, besides the
    fields that all have. Speed-ups are against the fastest dense engine with the same weights; limits are the roofline
    of the row's own engine. Weights do not change meanwhile: engines compare them once, as `generate` does for each
    text. Raises InputError for settings that cannot be measured, WorkError where an engine's logits
    are not finite.
    """
    _check_settings(text, prompt_tokens, new_tokens, batches)
    progress = progress or NullProgress()
    rows: list[dict[str, Any]] = []
    counts = [0] if "prefill" in phases else []
    counts += [count for count in new_tokens if count and "decode" in phases]
    with ExitStack() as unchanged:
        for engine in engines:
            unchanged.enter_context(engine.fixed())
        for batch, length, count in product(batches, prompt_tokens, counts):
            name = f"decode {count}" if count else "prefill"
            progress.stage(f"{name}, {length}-token prompt, batch {batch}", warmup + repeats)
            ids = take_prompts(text, batch, length + count).to(engines[0].model.device)
            case = _Case(ids[:, :length].contiguous(), ids[:, length:].contiguous(), budget)
            targets = [0.0, *(s for s in sparsities if s)]
            rows += _compare(engines, case, targets, repeats, warmup, profile, progress)
    return rows


def prompt_text(refs: Sequence[str], tokenizer: Any, needed: int) -> Tensor:
    """At least `needed` tokens, if there are so many, of the held-out part of texts: int64 `[tokens]`."""
    return tokens_of(load_texts(refs, "heldout"), tokenizer, needed)


def tokens_of(documents: Iterable[str], tokenizer: Any, needed: int) -> Tensor:
    """The tokens of documents, until there are `needed`: int64 `[tokens]`."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document, add_special_tokens=False)
        if len(ids) >= needed:
            break
    return torch.tensor(ids, dtype=torch.long)


def take_prompts(text: Tensor, batch: int, length: int) -> Tensor:
    """`[batch, length]` consecutive prompts from the start of `text` `[tokens]`, repeated if too short."""
    needed = batch * length
    return text.repeat(-(-needed // len(text)))[:needed].view(batch, length)


@dataclass(frozen=True)
class _Case:
    """One workload: prompts [B, N] and the tokens that follow them [B, new] (none: prefill is timed)."""

    ids: Tensor
    following: Tensor
    budget: str | None

    @property
    def new_tokens(self) -> int:
        return self.following.shape[1]

    def workload(self, engine: Engine, sparsity: float) -> Workload:
        before = functools.partial(engine.use, sparsity, self.budget)
        if self.new_tokens:
            return decode_callable(engine, self.ids, self.following, before)
        return prefill_callable(engine, self.ids, before)


def _compare(
    engines: Sequence[Engine],
    case: _Case,
    sparsities: Sequence[float],
    repeats: int,
    warmup: int,
    profile: bool,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Every engine at every sparsity that it can do on one workload, timed together."""
    runs = [(engine, s) for engine in engines for s in (sparsities if engine.routes else [0.0])]
    for engine, s in runs:
        _check_numbers(engine, case, s)
    workloads = {f"{engine.name} {s}": case.workload(engine, s) for engine, s in runs}
    timings = measure(workloads, repeats, warmup, progress)
    best: dict[str, float] = {}
    for engine, s in runs:
        if s == 0:
            best[engine.weights] = min(best.get(engine.weights, float("inf")), timings[f"{engine.name} {s}"].median)
    batch, prompt = case.ids.shape
    rows = []
    for engine, s in runs:
        timing = timings[f"{engine.name} {s}"]
        speedup = best[engine.weights] / timing.median
        details: dict[str, Any] = {"sparsity": sparsity_record(None, 0.0), "limit_speedup": 1.0}
        if engine.routes:
            details = _realised(engine, workloads[f"{engine.name} {s}"], case, s, profile)
        rows.append(
            {
                "engine": engine.name,
                "weights": engine.weights,
                "phase": "decode" if case.new_tokens else "prefill",
                "batch": batch,
                "prompt_tokens": prompt,
                **({"new_tokens": case.new_tokens} if case.new_tokens else {}),
                "seconds": asdict(timing),
                "tokens_per_second": batch * (case.new_tokens or prompt) / timing.median,
                "speedup_vs_dense": speedup,
                **details,
                "fraction_of_limit": speedup / details["limit_speedup"],
            }
        )
    return rows


def _check_numbers(engine: Engine, case: _Case, sparsity: float) -> None:
    """Raise WorkError when what would be timed computes no numbers: such a forward may be faster than a right one."""
    engine.use(sparsity, case.budget)
    with torch.inference_mode():
        logits = engine.step(case.ids, engine.fresh_cache(*case.ids.shape))
    bad = ~logits[:, -1].float().isfinite().all(-1)
    if bool(bad.any()):
        prompt = case.ids[int(bad.nonzero()[0])][None]
        share = f"at sparsity {sparsity:g}" if sparsity else "dense"
        what = f"{engine.name}, {share}: a logit after a prompt of {prompt.shape[1]} tokens"
        raise not_finite(what, engine.model, prompt)


def _realised(engine: Engine, workload: Workload, case: _Case, sparsity: float, profile: bool) -> dict[str, Any]:
    """What the timed part (not the prefill before a decode) approximates, and its limit; off the clock."""
    state = workload.prepare()
    model = engine.model
    model.reset_routing_stats()
    native = engine.native if profile else None
    with nullcontext({}) if native is None else native.profiled() as phases:
        workload.run(state)
    stats = model.stats
    limit = 1.0
    if sparsity:
        head, rows = model.get_output_embeddings().weight.numel(), case.ids.shape[0] * max(case.new_tokens, 1)
        limit = limit_speedup(stats, engine.storage, engine.balance, head, rows, decode=bool(case.new_tokens))
    found: dict[str, Any] = {
        "sparsity": sparsity_record(model.routing_stats() if sparsity else None, sparsity),
        "limit_speedup": limit,
    }
    if stats.routed:
        found["rounded_up"] = float(stats.calls[:, 3].sum() / stats.calls.sum().clamp(min=1))
    if phases:
        found["phase_seconds"] = dict(phases)
    return found


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
