"""Set a model to decide as its cell says: dynamic methods are compared at equal shares."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..evaluation.precision import Precision
from ..execution.choose import EngineChoice, choose_engine
from ..models.families import FAMILIES
from ..progress import Progress
from ..routing.decision import Threshold
from .plan import Cell

CLOSE, ATTEMPTS = 0.003, 4
"""How near its target a share on calibration text has to be, and how often the threshold is placed."""


def decide(model: Any, cell: Cell, rows: Tensor, progress: Progress) -> dict[str, Any]:
    """Let a routed model approximate the cell's share of calibration rows [n, L]; what was realised there.

    One threshold for all units, moved until the share is met; MoD's top-k meets it by construction.
    """
    from ..training.calibrate import realise

    chosen = cell.decision or model.routing_config.selection.decision
    if chosen == "top-k":
        model.set_sparsity(cell.sparsity, cell.budget, "top-k")
        return {"decision": "top-k"}
    model.set_sparsity(cell.sparsity, cell.budget, "threshold")
    place = model.routing_state.decision.value
    best: dict[str, Any] = {"miss": math.inf}
    progress.stage("find threshold", ATTEMPTS)
    for attempt in range(ATTEMPTS):
        following, row = realise(model, rows, cell.sparsity, cell.budget, place)  # type: ignore[arg-type]
        miss = abs(getattr(row, cell.budget) - cell.sparsity)
        if miss < best["miss"]:
            best = {"decision": "threshold", "miss": miss, **row.model_dump(exclude={"by_context", "by_unit"})}
        progress.advance(attempt + 1, realised=getattr(row, cell.budget))
        if miss <= CLOSE:
            break
        place = following
    model.set_decision(Threshold(best["threshold"]))
    return {**best, "tokens": rows.numel()}


def engage_native(model: Any, progress: Progress, precision: Precision) -> tuple[Any, EngineChoice | None]:
    """The model in the native engine where that can run it, else as it is; and what runs it (None: transformers).

    Dense and depth-pruned models run in it as routed models that execute every token.
    """
    from ..routed_model import RoutedModelForCausalLM

    if not hasattr(model, "routing_config") and _is_ordinary(model):
        model = RoutedModelForCausalLM.attach(model).eval()
    if not hasattr(model, "routing_config"):
        return model, None
    choice = choose_engine(model, factors=precision, progress=progress)
    if choice.native:
        model.set_execution("native", weights=choice.weights, policy="exact")
    return model, choice


def engine_name(choice: EngineChoice | None) -> str:
    """What runs a model, in a cell's record."""
    if choice is None:
        return "transformers"
    return "native" if choice.native else "torch"


def _is_ordinary(model: Any) -> bool:
    """Whether its layers are those of a family, none of them lacking a part or sliced."""
    from ..baselines.remaining import dropped_units, sliced_width

    return model.config.model_type in FAMILIES and not dropped_units(model) and sliced_width(model) is None
