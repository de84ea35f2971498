"""The threshold table, on its own split; after LoRA, since that moves the margins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...config.recipe import Recipe
from ..reading import Reading
from .base import Stage

if TYPE_CHECKING:
    from ..run import Run


class Calibrate(Stage):
    """Ends every fit: its name in a recipe matters only where it stands alone."""

    name = "calibrate"
    place = 90
    settings = ("calibration",)
    checkpoints = ("calibrate",)

    def applies(self, recipe: Recipe) -> bool:
        return True

    def reads(self, recipe: Recipe) -> dict[str, Reading]:
        config = recipe.calibration
        return {
            "calibrate": Reading.aside("calibration", config.sequence_length, config.tokens, "calibrate", even=True)
        }

    def run(self, run: Run) -> dict[str, Any]:
        from ...config.folder import ThresholdRow
        from ..calibrate import calibrate

        config, route = run.recipe.calibration, run.recipe.route
        rows = run.text.read(self.reads(run.recipe)["calibrate"])

        def work() -> dict[str, Any]:
            table = calibrate(run.model, rows, config, route.budget, run.progress)
            return {"tokens": rows.numel(), "thresholds": [row.model_dump() for row in table]}

        found = run.phase("calibrate", {}, work)
        table = tuple(ThresholdRow(**row) for row in found["thresholds"])
        highest = max(getattr(row, route.budget) for row in table)
        run.model.with_thresholds(table, route.budget, min(route.sparsity, highest), config.sequence_length)
        return found


KIND = Calibrate
