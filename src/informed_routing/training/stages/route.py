"""Stage 2: the routers, from their closed-form start through training to the refit of the forecasters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...config.recipe import Recipe
from ..reading import Reading
from ..start import CHECKPOINT, begin_routing, refits, start_reads
from .base import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..run import Run


class Route(Stage):
    """Trains routers with sampled or hard decisions towards a sparsity."""

    name = "route"
    place = 20
    settings = ("route",)
    checkpoints = (CHECKPOINT, "route", "refit")
    trains_routers = True

    def reads(self, recipe: Recipe) -> dict[str, Reading]:
        config, found = recipe.route, start_reads(recipe)
        if config.steps:
            found["route"] = Reading.steps(config)
        if refits(recipe) and not config.train_forecasters:
            length = recipe.forecast.sequence_length
            found["refit"] = Reading.once("train", length, recipe.forecaster.tokens, "refit")
        return found

    def run(self, run: Run) -> dict[str, Any]:
        from ..forecast import forecaster_parameters
        from ..methods import route_objective
        from ..report import routing_summary
        from ..route import freeze_all_but, learning_rates, router_parameters

        config, reads = run.recipe.route, self.reads(run.recipe)
        tensors = router_parameters(run.model, config.train_forecasters)
        freeze_all_but(run.model, tensors)
        report = begin_routing(run, reads)
        if "route" in reads:
            objective = route_objective(run.model, config, run.meter)
            rates, rows = learning_rates(config, tensors), run.text.read(reads["route"])
            report["train"] = routing_summary(run, run.train("route", objective, tensors, rows, config, rates))
        if "refit" in reads:
            rows = run.text.read(reads["refit"])
            report["refit"] = run.phase("refit", forecaster_parameters(run.model), lambda: refit(run, rows))
        return report


KIND = Route


def refit(run: Run, rows: Tensor) -> dict[str, Any]:
    """Solve the forecasters again on the tokens, and at the inputs, that routing gives them."""
    from ...routing.decision import Threshold
    from ..calibrate import threshold_at
    from ..forecast import fit_closed_form

    recipe = run.recipe
    run.progress.stage("refit", len(rows))
    some = rows[: max(len(rows) // 8, 2)]
    threshold = threshold_at(run.model, some, recipe.route.sparsity, recipe.route.budget)
    fit_closed_form(
        run.model,
        rows,
        recipe.forecaster,
        accelerator=run.accelerator,
        progress=run.progress,
        decision=Threshold(threshold),
    )
    return {"tokens": rows.numel(), "threshold": threshold}
