"""Routers and LoRA at once, as MoD and D-LLM train: steps and text of stage 2, each part with its own rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...config.recipe import Recipe
from ..reading import Reading
from ..start import CHECKPOINT, begin_routing, start_reads
from .base import Stage

if TYPE_CHECKING:
    from ..run import Run


class Joint(Stage):
    """The work of route and lora in one training; from a start with an adapter, it goes on with that."""

    name = "joint"
    place = 30
    settings = ("route", "lora")
    checkpoints = (CHECKPOINT, "joint")
    trains_routers = True
    adapts = True

    def reads(self, recipe: Recipe) -> dict[str, Reading]:
        return {**start_reads(recipe), "joint": Reading.steps(recipe.route)}

    def run(self, run: Run) -> dict[str, Any]:
        from ..lora import go_on_with, new_lora
        from ..methods import route_objective
        from ..report import routing_summary
        from ..route import freeze_all_but, learning_rates, router_parameters

        config, lora, reads = run.recipe.route, run.recipe.lora, self.reads(run.recipe)
        report = begin_routing(run, reads)
        routers = router_parameters(run.model, config.train_forecasters)
        adapters = new_lora(run.model, lora, run.recipe.seed)
        if run.adapter:
            go_on_with(run.adapter, adapters, lora)
        freeze_all_but(run.model, routers | adapters)
        rates = learning_rates(config, routers) | dict.fromkeys(adapters, lora.learning_rate)
        objective = route_objective(run.model, config, run.meter)
        record = run.train("joint", objective, routers | adapters, run.text.read(reads["joint"]), config, rates)
        weights = sum(tensor.numel() for tensor in adapters.values())
        return {**report, "rank": lora.rank, "train": routing_summary(run, record, weights)}


KIND = Joint
