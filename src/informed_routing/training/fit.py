"""The whole pipeline: from a dense model to a routing folder. Each part leaves a file, so a killed run goes on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..assets.models import resolve_dtype
from ..config.recipe import Recipe
from ..files.atomic import disk_error
from ..files.folders import only_writer
from ..progress import NullProgress, Progress
from .loop import accelerator_for
from .report import result_of
from .result import write_result
from .setup import recipe_of, set_up
from .stages import stages_of


def fit(
    model: str | Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit forecasters and routers (and LoRA) to a model and write the routing folder `out`.

    `model` is a model reference, with settings such as `sparsity=0.25`, `budget="macs"`, `data=[...]` or dotted recipe
    keys in a mapping `overrides`, or a whole `Recipe`. Returns the content of `fit.json`. With `overwrite` an earlier
    result stays until the new one is whole. Raises InputError before any work for what cannot work (an existing folder,
    or another run that writes into it, among it), WorkError for what fails on the way.
    """
    recipe = model if isinstance(model, Recipe) else recipe_of(model, settings)
    out, progress = Path(out), progress or NullProgress()
    accelerator = accelerator_for(device, resolve_dtype(recipe.dtype, device))
    with only_writer(out) if accelerator.is_main_process else nullcontext():
        run = set_up(
            recipe,
            out,
            device=device,
            progress=progress,
            resume=resume,
            overwrite=overwrite,
            accelerator=accelerator,
        )
        try:
            for stage in stages_of(run.recipe):
                run.report[stage.name] = stage.run(run)
            result = result_of(run)
            write_result(run, result, keep_checkpoints=keep_checkpoints)
            return result
        except OSError as error:
            raise disk_error(out, error) from error
        finally:
            progress.done()
