"""Make a stage, and load what it left."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor

from ..assets import Split, load_model
from ..config.recipe import Recipe
from ..files.folders import CHECKPOINTS
from ..files.user_files import read_json
from ..persistence.folder import is_routing_folder
from ..progress import Progress
from ..training.folder import RECIPE_FILE
from ..training.texts import Texts
from .plan import Cell
from .stages import Stage
from .store import Record, Store


def ensure(stage: Stage, store: Store, *, device: str, progress: Progress) -> Record:
    """The report of a stage, which is made unless it is there. Its parent has to be there."""
    report = store.stage_report(stage)
    if report is None:
        work = {"fit": _fit, "prune": _prune, "recover": _recover}[stage.kind]
        found = work(stage, store, device, progress)
        known = {"stage": stage.kind, "key": stage.key, "tokens": stage.tokens, "threads": torch.get_num_threads()}
        report = {**known, **found}
        store.finish_stage(stage, report)
    return report


def load(cell: Cell, store: Store, *, device: str) -> tuple[Any, Any]:
    """The model that a cell's stages made, in evaluation mode, and its tokenizer."""
    dtype = cell.training["dtype"]
    if cell.stage is None:
        return load_model(cell.model, dtype=dtype, device=device)
    folder = store.stage_folder(cell.stage)
    if cell.stage.kind == "fit":
        from ..assets import load_tokenizer
        from ..routed_model import RoutedModelForCausalLM

        model = RoutedModelForCausalLM.from_pretrained(folder, dtype=dtype, device=device)
        return model.eval(), load_tokenizer(cell.model)
    from ..baselines.static import load_static

    return load_static(folder, dtype=dtype, device=device)


def text_rows(
    data: list[str], split: Split, tokenizer: Any, length: int, tokens: int | None, seed: int, name: str
) -> Tensor:
    """Packed text [n, length] of a split: all of it, or a seeded choice of rows worth `tokens` tokens."""
    text = Texts(data, tokenizer, seed)
    return text.rows(split, length) if tokens is None else text.some(split, length, tokens, name)


def _fit(stage: Stage, store: Store, device: str, progress: Progress) -> Record:
    from ..training.fit import fit

    folder = store.stage_folder(stage)
    started = (folder / CHECKPOINTS / RECIPE_FILE).is_file()
    if is_routing_folder(folder) and not started:  # killed after the last step of all
        report = read_json(folder / "fit.json", "the fit's report")
        return {"seconds": _seconds(report["stages"]), "fit": report["stages"]}
    if folder.is_dir() and not started:
        shutil.rmtree(folder)
    start = None if stage.parent is None else str(store.stage_folder(stage.parent))
    recipe = Recipe.from_mapping({**stage.settings, "start": start})
    report = fit(recipe, folder, resume=started, device=device, progress=progress)
    return {"seconds": _seconds(report["stages"]), "fit": report["stages"]}


def _prune(stage: Stage, store: Store, device: str, progress: Progress) -> Record:
    from ..baselines.static import prune, save_static

    settings = stage.settings
    model, tokenizer = load_model(settings["model"], dtype=settings["dtype"], device=device)
    rows = _rows(stage, tokenizer, settings["tokens"], "pruning")
    report = prune(
        model, settings["method"], settings["sparsity"], rows, progress=progress, **settings["method_settings"]
    )
    save_static(model, tokenizer, store.stage_folder(stage))
    return {"seconds": {"pruning": round(report.seconds, 2)}, "pruning": report.as_dict()}


def _recover(stage: Stage, store: Store, device: str, progress: Progress) -> Record:
    from ..baselines.recovery import recover
    from ..baselines.static import load_static, save_static

    settings, folder = stage.settings, store.stage_folder(stage)
    if stage.parent is None:
        model, tokenizer = load_model(settings["model"], dtype=settings["dtype"], device=device)
    else:
        model, tokenizer = load_static(store.stage_folder(stage.parent), dtype=settings["dtype"], device=device)
    config = Recipe.from_mapping({"lora": settings["lora"]}).lora
    rows = _rows(stage, tokenizer, None, "recovery")
    checkpoint = folder / CHECKPOINTS / "recovery.safetensors"
    found = recover(model, rows, config, seed=settings["seed"], checkpoint=checkpoint, progress=progress)
    save_static(model, tokenizer, folder)  # the checkpoint goes last
    return {"seconds": {"recovery": found["seconds"]}, "recovery": found}


def _rows(stage: Stage, tokenizer: Any, tokens: int | None, name: str) -> Tensor:
    settings = stage.settings
    length = settings["lora"]["sequence_length"] if "lora" in settings else settings["sequence_length"]
    return text_rows(settings["data"], "train", tokenizer, length, tokens, settings["seed"], name)


def _seconds(report: dict[str, Any]) -> dict[str, float]:
    """Seconds of each stage of a fit."""

    from ..training.report import seconds_of

    return {name: round(seconds_of(part), 2) for name, part in report.items()}
