"""Before the forecasters: which layers are approximated for every token."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...config.recipe import Recipe
from ..reading import Reading
from .base import Stage

if TYPE_CHECKING:
    from ..run import Run


class Static(Stage):
    """Finds `static.layers` layers and makes them static; the stage forecast fits what replaces them."""

    name = "static"
    place = 5
    settings = ("static",)
    checkpoints = ("static-fit", "static")

    def reads(self, recipe: Recipe) -> dict[str, Reading]:
        config, found = recipe.static, dict[str, Reading]()
        if recipe.forecaster.is_fitted:
            once = Reading.once("train", config.sequence_length, config.fit_tokens, "static-fit")
            found["static-fit"] = replace(once, counted=once.counted * config.layers)
        found["static"] = Reading.aside("train", config.sequence_length, config.tokens, "static")
        return found

    def run(self, run: Run) -> dict[str, Any]:
        import torch

        from ...execution.attach import make_static
        from ..checkpoint import StageRecord, load_checkpoint, save_checkpoint
        from ..schedule import seed_of
        from ..static import Search

        path, rows = run.checkpoints / "static.safetensors", [run.text.read(r) for r in self.reads(run.recipe).values()]
        record = load_checkpoint(path, {}) or StageRecord()
        run.accelerator.wait_for_everyone()  # nobody writes before all have looked
        search = Search(run.model, run.recipe.static, rows[-1], rows[0], record.extra)
        started = time.perf_counter() - record.seconds

        def keep() -> None:
            record.extra, record.seconds = search.record, time.perf_counter() - started
            record.finished = len(search.layers) == run.recipe.static.layers
            if run.accelerator.is_main_process:
                save_checkpoint(path, record, {})

        if not record.finished:
            search.run(keep, run.progress)
            run.accelerator.wait_for_everyone()
        torch.manual_seed(seed_of(run.recipe.seed, "static"))
        make_static(run.model, search.layers)
        run.set_meter()
        tokens = sum(reading.tokens for reading in self.reads(run.recipe).values())
        return {**search.record, "tokens": tokens, "seconds": round(record.seconds, 2)}


KIND = Static
