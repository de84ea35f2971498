"""Stage 1: the forecasters, in closed form or by gradient, and their judgement on unseen text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...config.recipe import Recipe
from ..reading import Reading
from .base import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..run import Run

MEASURE_TOKENS = 4096
"""Unseen text on which forecasters are judged."""


class Forecast(Stage):
    """Fits what approximated tokens get; nothing to do where that is zero."""

    name = "forecast"
    place = 10
    settings = ("forecast",)
    checkpoints = ("forecast-slice", "forecast", "forecast-gradient", "forecast-quality")

    def applies(self, recipe: Recipe) -> bool:
        return super().applies(recipe) and recipe.forecaster.is_fitted

    def reads(self, recipe: Recipe) -> dict[str, Reading]:
        config, length = recipe.forecaster, recipe.forecast.sequence_length
        found: dict[str, Reading] = {}
        if config.fit == "closed-form" or config.start == "closed-form":
            once = Reading.once("train", length, config.tokens, "forecast")
            found["forecast"] = replace(once, counted=once.counted * (2 if _has_static(recipe) else 1))
        if config.fit == "gradient":
            found["forecast-gradient"] = Reading.steps(recipe.forecast, "forecast-gradient")
        found["forecast-quality"] = Reading.aside("calibration", length, MEASURE_TOKENS)
        return found

    def run(self, run: Run) -> dict[str, Any]:
        from ..forecast import forecaster_parameters
        from ..slices import slice_tensors

        config, reads = run.recipe.forecaster, self.reads(run.recipe)
        tensors = forecaster_parameters(run.model)
        report: dict[str, Any] = {"fit": config.fit, "rank": config.rank}
        if slices := slice_tensors(run.model):
            rows = run.text.read(next(iter(reads.values())))  # some of the text that the fit reads anyway
            chosen = run.phase("forecast-slice", slices, lambda: _choose(run, rows))
            report["slice"] = {"share": config.share, "neurons": len(next(iter(slices.values()))), **chosen}
        if "forecast" in reads:
            rows = run.text.read(reads["forecast"])
            report["closed_form"] = run.phase("forecast", tensors, lambda: _solve(run, rows))
        if "forecast-gradient" in reads:
            report["gradient"] = _train(run, tensors, run.text.read(reads["forecast-gradient"]))
        unseen = run.text.read(reads["forecast-quality"])
        report["quality"] = run.phase("forecast-quality", {}, lambda: _judge(run, unseen))
        return report


KIND = Forecast


def _has_static(recipe: Recipe) -> bool:
    return bool(recipe.selection.static_layers or recipe.static.layers)


def _choose(run: Run, rows: Tensor) -> dict[str, Any]:
    from ..slices import CHOICE_TOKENS, choose_slices

    rows = rows[: max(CHOICE_TOKENS // rows.shape[1], 1)]
    run.progress.stage("choose slices", len(rows))
    choose_slices(run.model, rows, run.accelerator, run.progress)
    return {}


def _solve(run: Run, rows: Tensor) -> dict[str, Any]:
    from ...routing.decision import AlwaysExecute, ExecuteRouted
    from ..forecast import fit_closed_form

    seconds, tokens = [0.0, 0.0], 0
    # Static layers are fitted to the original model first, then all once more at inputs that these have shifted.
    for rule in (AlwaysExecute(), ExecuteRouted()) if _has_static(run.recipe) else (AlwaysExecute(),):
        run.progress.stage("forecast", len(rows))
        found = fit_closed_form(
            run.model,
            rows,
            run.recipe.forecaster,
            accelerator=run.accelerator,
            progress=run.progress,
            decision=rule,
        )
        tokens += rows.numel()
        seconds = [one + other for one, other in zip(seconds, found, strict=True)]
    return {"pass_seconds": seconds[0], "solve_seconds": seconds[1], "tokens": tokens}


def _train(run: Run, tensors: dict[str, nn.Parameter], rows: Tensor) -> dict[str, Any]:
    """The paper's stage 1: AdamW on every unit's own loss at once."""
    from ..forecast import ForecastObjective, output_scales
    from ..report import summary
    from ..route import freeze_all_but

    config, stage = run.recipe.forecaster, run.recipe.forecast
    freeze_all_but(run.model, tensors)
    objective = ForecastObjective(run.model, config)
    if config.target == "normalised":
        objective.scales = output_scales(run.model, rows.to(run.model.device))
    record = run.train("forecast-gradient", objective, tensors, rows, stage)
    return summary(run, record, stage.sequence_length, "forecast")


def _judge(run: Run, unseen: Tensor) -> dict[str, Any]:
    from ..forecast import measure

    run.progress.stage("judge forecasters", len(unseen))
    return measure(run.model, unseen, run.progress).as_dict([unit.kind for unit in run.model.units])
