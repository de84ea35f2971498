"""The measured cost table behind `budget="latency"`: what approximating each kind of unit saves on this machine.

Timed with a part of the tokens approximated, as routing does it: where all are, whole units with their weights, lists
of rows and waiting are left out, too, and a straight line from there promises what no mixture keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from informed_routing.config.folder import LatencyGains
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.timing import measure
from informed_routing.execution.choose import EngineChoice, choose_engine, make_engine
from informed_routing.execution.native import forced_states
from informed_routing.progress import Progress
from informed_routing.routing.decision import AlwaysExecute, DecisionRule, Threshold
from informed_routing.routing.rules.base import GivenByUnit

PART = 0.4
"""The share of tokens that a unit approximates while its kind is timed."""


def measure_latency(
    model: Any, ids: Tensor, *, choice: EngineChoice | None = None, repeats: int = 7, progress: Progress | None = None
) -> LatencyGains:
    """Time forwards of `ids` int64 [B, N] through the body: dense, deciding but executing all that is routed, and with
    a part of the tokens approximated in all attention or in all FFN units.

    In the engine that `choose_engine` gives for the model, unless a `choice` is given. Routers need not be trained:
    choices are given. Static layers are what they are but in the dense forward. The model is left as it was.
    """
    state = model.routing_state
    choice = choose_engine(model, progress=progress) if choice is None else choice
    engine = make_engine(model, choice.weights, None, "exact") if choice.native else None
    everything = torch.ones(len(model.units), *ids.shape, dtype=torch.bool)
    part = _part(everything)
    of_ffn = torch.tensor([unit.kind == "ffn" for unit in model.units])[:, None, None]
    patterns = {
        "dense": None,
        "execute": everything,
        "attention": part | of_ffn,
        "ffn": part | ~of_ffn,
    }

    def forward(gates: Tensor | None) -> None:
        rule: DecisionRule = AlwaysExecute()
        if gates is not None:  # an engine is told what executes: any rule that it understands will do
            rule = GivenByUnit(gates) if engine is None else Threshold(0.0)
        state.choose(decision=rule)
        if engine is None:
            model.hidden_states(ids)
        else:
            forced_states(model, engine, ids, gates)

    was_training = model.training
    model.eval()
    try:
        if progress is not None:
            progress.stage("measure latency", repeats + 1)
        own = state.using(decision=state.decision, execution="sparse", native=None)
        with own, torch.inference_mode():
            work = {name: (lambda pattern=pattern: forward(pattern)) for name, pattern in patterns.items()}
            seconds = {name: timing.median for name, timing in measure(work, repeats, 1, progress).items()}  # type: ignore[arg-type]
    finally:
        model.train(was_training)
        model.reset_routing_stats()
    attention, ffn = (
        (seconds["execute"] - seconds[kind]) / seconds["dense"] / share if share else 0.0
        for kind, share in ((kind, _approximated(model, kind, part)) for kind in ("attention", "ffn"))
    )
    static = sum(unit.is_static for unit in model.units) / len(model.units)
    overhead = seconds["execute"] / seconds["dense"] - 1
    return LatencyGains(
        attention=attention,
        ffn=ffn,
        overhead=overhead + (attention + ffn) * static if static else max(overhead, 0.0),
        seconds=seconds["dense"],
        tokens=ids.numel(),
        engine=f"native {choice.weights}" if choice.native else "torch",
        cpu=str(environment()["cpu"] if model.device.type == "cpu" else environment()["accelerator"]),
    )


def _part(like: Tensor) -> Tensor:
    """Gates bool like [units, B, N]: false for PART of a unit's tokens, others in each unit."""
    order = torch.rand(like.shape, generator=torch.Generator().manual_seed(0)).flatten(1).argsort(1).argsort(1)
    return (order >= round(order.shape[1] * PART)).view(like.shape)


def _approximated(model: Any, kind: str, gates: Tensor) -> float:
    """The share of a kind's tokens, static ones among them, that its routed units approximate by these gates."""
    mine = [unit for unit in model.units if unit.kind == kind]
    return sum(float((~gates[unit.index]).float().mean()) for unit in mine if unit.is_routed) / len(mine)
