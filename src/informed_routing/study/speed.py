"""The speed pass: prefill and decode of all finished cells, in turns with the dense model, after all training.

Cells are timed a few at a time, since many models do not fit into memory; each group has the dense model among it, and
speed-ups are over the fastest dense engine of the same group.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..assets import load_model
from ..evaluation.engines import Engine, RoutedEngine
from ..evaluation.environment import environment
from ..evaluation.precision import Precision, factors_in
from ..evaluation.speed import decode_callable, prefill_callable, prompt_text, take_prompts
from ..evaluation.timing import Timing, Workload, measure
from ..progress import NullProgress, Progress
from ..routing.decision import AlwaysExecute, Threshold
from .build import load
from .decide import engage_native
from .grid import Speed
from .plan import Cell
from .store import Record, Store

DENSE = "dense"


def run_speed(
    cells: Sequence[Cell], store: Store, settings: Speed, *, device: str, progress: Progress | None = None
) -> int:
    """Time all finished cells that have no seconds yet; returns how many. Nothing else should run on the machine."""
    progress = progress or NullProgress()
    waiting = [cell for cell in cells if store.record(cell) is not None and store.speed(cell) is None]
    with store.locked():
        for model in dict.fromkeys(cell.model for cell in waiting):
            group = [cell for cell in waiting if cell.model == model]
            for start in range(0, len(group), settings.at_once):
                chosen = group[start : start + settings.at_once]
                with factors_in(chosen[0].evaluation.precision):
                    _time(chosen, store, settings, device, progress)
                gc.collect()
    return len(waiting)


def _time(cells: Sequence[Cell], store: Store, settings: Speed, device: str, progress: Progress) -> None:
    first = cells[0]
    dense, tokenizer = load_model(first.model, dtype=first.training["dtype"], device=device)
    precision = first.evaluation.precision
    engines = {DENSE: list(_engines(dense, None, precision, progress))}
    for cell in cells:
        model, _ = load(cell, store, device=device)
        engines[cell.key] = list(_engines(model, store.record(cell), precision, progress))
    ids = _prompts(first, tokenizer, settings).to(device)
    prompts, following = ids.split([settings.prompt_tokens, settings.new_tokens], dim=1)
    found: dict[str, dict[str, Timing]] = {}
    for phase in ("prefill", "decode"):
        workloads = {
            f"{key} {engine.name}": _workload(phase, engine, prompts.contiguous(), following.contiguous())
            for key, group in engines.items()
            for engine in group
        }
        progress.stage(f"{phase} of {', '.join(cell.name for cell in cells)}", settings.repeats + 1)
        found[phase] = measure(workloads, settings.repeats, 1, progress)
    for cell in cells:
        phases = {phase: _compared(timings, cell.key) for phase, timings in found.items()}
        record = {
            "workload": settings.model_dump(exclude={"at_once"}),
            "precision": precision,
            "threads": torch.get_num_threads(),
        }
        store.keep_speed(cell, {"cell": cell.labels(), **phases, **record, "environment": environment()})


def _compared(timings: dict[str, Timing], key: str) -> Record:
    """The fastest engine of a cell and of the dense model, and the seconds of all."""

    def of(owner: str) -> dict[str, Timing]:
        return {name.split(" ", 1)[1]: timing for name, timing in timings.items() if name.startswith(f"{owner} ")}

    own, dense = of(key), of(DENSE)
    best, fastest = (min(group, key=lambda name: group[name].median) for group in (own, dense))
    return {
        "engine": best,
        "seconds": own[best].median,
        "dense_engine": fastest,
        "dense_seconds": dense[fastest].median,
        "speedup_vs_dense": dense[fastest].median / own[best].median,
        "engines": {name: asdict(timing) for name, timing in own.items()},
        "dense_engines": {name: asdict(timing) for name, timing in dense.items()},
    }


class _Placed(RoutedEngine):
    """A routed model by one back end, deciding as in its evaluation (MoD by its causal predictor)."""

    def __init__(self, model: Any, weights: str | None, rule: Any) -> None:
        super().__init__(model, weights)
        self.rule = rule

    def use(self, sparsity: float, budget: str | None) -> None:
        self.place()
        self.model.routing_state.choose(decision=self.rule)


def _engines(model: Any, record: Record | None, precision: Precision, progress: Progress) -> Iterator[Engine]:
    """Every way in which this model can run here."""
    routed = hasattr(model, "routing_config")
    if not routed:
        yield Engine(_unattached(model))
    model, choice = engage_native(model, progress, precision)
    threshold = (record or {}).get("threshold")
    if routed:
        yield _Placed(model, None, _rule(model, threshold))
    if choice is not None and choice.native:
        yield _Placed(model, choice.weights, _rule(model, threshold))


def _unattached(model: Any) -> Any:
    """A second model around the same weights, which stays plain when the first one is given routers."""
    import copy

    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo=shared)


def _rule(model: Any, threshold: dict[str, Any] | None) -> Any:
    if threshold is None:
        return AlwaysExecute()
    if "threshold" in threshold:
        return Threshold(threshold["threshold"])
    model.set_sparsity(model.routing_config.sparsity, None, "threshold")  # top-k cannot generate
    return model.routing_state.decision


def _workload(phase: str, engine: Engine, prompts: Tensor, following: Tensor) -> Workload:
    def before() -> None:
        engine.use(0.0, None)

    if phase == "decode":
        return decode_callable(engine, prompts, following, before)
    return prefill_callable(engine, prompts, before)


def _prompts(cell: Cell, tokenizer: Any, settings: Speed) -> Tensor:
    """Held-out text [batch, prompt + new]: what is approximated depends on it."""
    length = settings.prompt_tokens + settings.new_tokens
    data = list(dict.fromkeys(cell.training["data"]))
    return take_prompts(prompt_text(data, tokenizer, length * settings.batch_size), settings.batch_size, length)
