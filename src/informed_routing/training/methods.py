"""Which objective trains which routers."""

from __future__ import annotations

from ..config.recipe import RouteStage
from ..routed_model import RoutedModelForCausalLM
from ..routing.target import BudgetMeter
from .route import RouteObjective
from .token_target import TokenTargetObjective
from .top_k import TopKObjective


def route_objective(model: RoutedModelForCausalLM, config: RouteStage, meter: BudgetMeter) -> RouteObjective:
    """The objective of stage 2 for a model's decision rule and the stage's penalty."""
    if model.routing_config.selection.decision == "top-k":
        return TopKObjective(model, config, meter)
    if config.penalty == "token":
        return TokenTargetObjective(model, config, meter)
    return RouteObjective(model, config, meter)
