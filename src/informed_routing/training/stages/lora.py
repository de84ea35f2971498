"""Stage 3: LoRA on the base model, at the routing of one sparsity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...config.recipe import Recipe
from ..reading import Reading
from .base import Stage

if TYPE_CHECKING:
    from ...routing.decision import DecisionRule
    from ..run import Run

THRESHOLD_TOKENS = 16_384
"""Unseen text on which the threshold is placed."""


class Lora(Stage):
    """Trains an adapter; routers and forecasters stay as they are."""

    name = "lora"
    place = 40
    settings = ("lora", "calibration.sequence_length")
    checkpoints = ("lora-threshold", "lora")
    adapts = True

    def sparsities(self, recipe: Recipe) -> dict[str, float]:
        return {} if recipe.lora.sparsity is None else {"lora.sparsity": recipe.lora.sparsity}

    def reads(self, recipe: Recipe) -> dict[str, Reading]:
        found: dict[str, Reading] = {}
        if _sparsity(recipe) and recipe.selection.decision != "top-k":
            length = recipe.calibration.sequence_length
            found["lora-threshold"] = Reading.aside("calibration", length, THRESHOLD_TOKENS, "lora")
        found["lora"] = Reading.steps(recipe.lora)
        return found

    def run(self, run: Run) -> dict[str, Any]:
        from ...execution.cpu.fused_unit import is_fused
        from ..lora import LoraObjective, new_lora
        from ..report import summary
        from ..route import freeze_all_but

        config, sparsity, reads = run.recipe.lora, _sparsity(run.recipe), self.reads(run.recipe)
        rule = _rule(run, sparsity, reads)
        tensors = new_lora(run.model, config, run.recipe.seed)
        freeze_all_but(run.model, tensors)
        objective = LoraObjective(run.model, config, rule)
        # Fused units do both branches of all tokens in less time than it takes to pick those that one branch needs.
        state, both = run.model.routing_state, is_fused(run.model)
        with state.using(execution="masked" if both else state.execution):
            record = run.train("lora", objective, tensors, run.text.read(reads["lora"]), config)
        found = summary(
            run,
            record,
            config.sequence_length,
            "lora",
            objective=config.objective,
            sparsity=0.0 if both else sparsity,
            adapter_weights=sum(tensor.numel() for tensor in tensors.values()),
        )
        return {"rank": config.rank, "sparsity": sparsity, **found}


KIND = Lora


def _sparsity(recipe: Recipe) -> float:
    """Where the adapter is tuned; 0 is the dense model."""
    return recipe.route.sparsity if recipe.lora.sparsity is None else recipe.lora.sparsity


def _rule(run: Run, sparsity: float, reads: dict[str, Reading]) -> DecisionRule:
    """Who decides while the adapter learns: what decides at inference, at its sparsity."""
    from ...routing.decision import AlwaysExecute, Threshold, TopK
    from ...routing.rules.top_k import capacity_for
    from ..calibrate import threshold_at

    if not sparsity:
        return AlwaysExecute()
    if "lora-threshold" not in reads:
        return TopK(capacity_for(run.model.units, sparsity))

    def find() -> dict[str, Any]:
        rows = run.text.read(reads["lora-threshold"])
        return {"threshold": threshold_at(run.model, rows, sparsity, run.recipe.route.budget)}

    return Threshold(run.phase("lora-threshold", {}, find)["threshold"])
