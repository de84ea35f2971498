"""How the stages that train routers begin: with the closed form, unless a start brings routers or it is not wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config.recipe import Recipe
from .reading import Reading

if TYPE_CHECKING:
    from torch import Tensor

    from .run import Run

CHECKPOINT = "warm-start"


def start_reads(recipe: Recipe) -> dict[str, Reading]:
    """The text of all sweeps in one choice; empty where there is no closed-form start."""
    if not recipe.router.warm_start or recipe.start:
        return {}
    first, further = _sweep_rows(recipe)
    rows, length = first + further * recipe.router.sweeps, recipe.route.sequence_length
    return {CHECKPOINT: Reading.once("train", length, rows * length, "warm start")}


def refits(recipe: Recipe) -> bool:
    """Whether forecasters are solved again once there is routing."""
    config = recipe.forecaster
    return config.refit and config.fit == "closed-form" and config.is_fitted


def begin_routing(run: Run, reads: dict[str, Reading]) -> dict[str, Any]:
    """What is known of a stage before its training, with the closed-form start if it is among what the stage reads."""
    recipe = run.recipe
    report: dict[str, Any] = {"sparsity": recipe.route.sparsity, "budget": recipe.route.budget}
    if CHECKPOINT in reads:
        rows = run.text.read(reads[CHECKPOINT])
        tensors = dict(run.model.routing_parameters())
        report["warm_start"] = run.phase(CHECKPOINT, tensors, lambda: _start_routers(run, rows))
    return report


def _sweep_rows(recipe: Recipe) -> tuple[int, int]:
    """Rows of the first sweep and of each further one."""
    length = recipe.route.sequence_length
    return max(recipe.router.warm_start_tokens // length, 1), max(recipe.router.sweep_tokens // length, 1)


def _start_routers(run: Run, rows: Tensor) -> dict[str, Any]:
    """A sweep over the dense model, then some over the routed one."""
    from .warm_start import warm_start

    recipe = run.recipe
    first, further = _sweep_rows(recipe)
    run.progress.stage("start routers", len(rows))
    found = warm_start(
        run.model,
        [part for part in (rows[:first], *rows[first:].split(further)) if len(part)],
        run.meter,
        recipe.route.sparsity,
        batch_size=recipe.route.batch_size,
        refit_ridge=recipe.forecaster.ridge if refits(recipe) else None,
        progress=run.progress,
    )
    return {**found, "tokens": rows.numel()}
