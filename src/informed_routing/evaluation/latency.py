"""The measured cost table behind `budget="latency"`: what approximating each kind of unit saves on this machine."""

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
from informed_routing.routing.rules.base import ByKind

_PATTERNS = {"dense": None, "execute": (True, True), "attention": (False, True), "ffn": (True, False)}


def measure_latency(
    model: Any, ids: Tensor, *, choice: EngineChoice | None = None, repeats: int = 7, progress: Progress | None = None
) -> LatencyGains:
    """Time forwards of `ids` int64 [B, N] through the body: dense, deciding but executing all, and with all attention
    or all FFN units approximated.

    In the engine that `choose_engine` gives for the model, unless a `choice` is given. Routers need not be trained:
    choices are given. The model is left as it was.
    """
    state = model.routing_state
    choice = choose_engine(model, progress=progress) if choice is None else choice
    engine = make_engine(model, choice.weights, None, "exact") if choice.native else None

    def forward(pattern: tuple[bool, bool] | None) -> None:
        rule: DecisionRule = AlwaysExecute()
        if pattern is not None:  # an engine is told what executes: any rule that it understands will do
            rule = ByKind(*pattern) if engine is None else Threshold(0.0)
        state.choose(decision=rule)
        if engine is None:
            model.hidden_states(ids)
        else:
            forced_states(model, engine, ids, None if pattern is None else torch.tensor(pattern))

    was_training = model.training
    model.eval()
    try:
        if progress is not None:
            progress.stage("measure latency", repeats + 1)
        own = state.using(decision=state.decision, execution="sparse", native=None)
        with own, torch.inference_mode():
            work = {name: (lambda pattern=pattern: forward(pattern)) for name, pattern in _PATTERNS.items()}
            seconds = {name: timing.median for name, timing in measure(work, repeats, 1, progress).items()}  # type: ignore[arg-type]
    finally:
        model.train(was_training)
        model.reset_routing_stats()
    return LatencyGains(
        attention=(seconds["execute"] - seconds["attention"]) / seconds["dense"],
        ffn=(seconds["execute"] - seconds["ffn"]) / seconds["dense"],
        overhead=max(seconds["execute"] / seconds["dense"] - 1, 0.0),
        seconds=seconds["dense"],
        tokens=ids.numel(),
        engine=f"native {choice.weights}" if choice.native else "torch",
        cpu=str(environment()["cpu"] if model.device.type == "cpu" else environment()["accelerator"]),
    )
