"""The routing folder that a fit leaves: it is what it was until all of the new one is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..files.atomic import write_json, write_several, write_text
from ..files.folders import CHECKPOINTS, put_folder
from ..persistence.folder import LORA_FOLDER, save
from .folder import LAST, is_ours
from .lora import merge_lora, save_lora
from .model_card import model_card
from .run import Run
from .stages import stages_of


def write_result(run: Run, result: dict[str, Any], *, keep_checkpoints: bool) -> None:
    """Write the folder with `result` as its `fit.json`; adapters are folded into the live base model."""

    def write(folder: Path) -> None:
        if any(stage.adapts for stage in stages_of(run.recipe)):
            save_lora(run.model, run.recipe.lora, folder / LORA_FOLDER, run.model.routing_config.base_model.name)
            merge_lora(run.model)
        elif run.adapter:
            shutil.copytree(run.adapter, folder / LORA_FOLDER)
        write_several(folder, run.tokenizer.save_pretrained)
        write_json(folder / "fit.json", result)
        write_text(folder / "README.md", model_card(run.model.routing_config, result))
        save(run.model, folder)

    def ours(name: str) -> bool:
        return is_ours(name) and not (keep_checkpoints and name == CHECKPOINTS)

    if run.accelerator.is_main_process:
        put_folder(run.out, write, ours=ours, last=LAST)
    run.accelerator.wait_for_everyone()
