"""From a recipe to a fit that can begin. All that can be found wrong is found before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..assets import load_model
from ..config.recipe import Recipe
from ..errors import InputError
from ..execution.cpu.fused_unit import fuse
from ..files.atomic import write_text
from ..files.folders import check_apart_from
from ..persistence.folder import LORA_FOLDER, TENSOR_FILE, check_base, load_routing_tensors, locate, read_config
from ..persistence.load import with_lora
from ..progress import Progress
from ..routed_model import RoutedModelForCausalLM
from .folder import LATENCY_FILE, RECIPE_FILE, check_folder, clean_checkpoints, clear_checkpoints
from .inputs import check_inputs, write_inputs
from .run import Run
from .schedule import seed_of
from .stages import stages_of
from .targets import set_targets
from .texts import Texts


def recipe_of(model: str, settings: dict[str, Any]) -> Recipe:
    """The recipe that keywords of `fit` describe. Raises InputError naming what is unknown or breaks a bound."""
    overrides = dict(settings.pop("overrides", {}))
    route = {"sparsity", "budget", "balanced"}
    for key, value in settings.items():
        overrides[f"route.{key}" if key in route else key] = value
    unknown = [key for key in overrides if key.split(".")[0] not in Recipe.model_fields]
    if unknown:
        raise InputError(f"unknown setting {unknown[0]}", "See informed_routing.Recipe for the names")
    return Recipe(model=model).with_overrides(overrides)


def set_up(
    recipe: Recipe,
    out: Path,
    *,
    device: str,
    progress: Progress,
    resume: bool,
    overwrite: bool,
    accelerator: Accelerator,
) -> Run:
    """A model with routing, texts and targets, checked and begun; a refused fit leaves no folder behind.

    Raises InputError for a recipe, folder, model or text that cannot work together.
    """
    check_apart_from(out, recipe.model)
    beginning = locate(recipe.start) if recipe.start else None
    if beginning:
        if out.resolve() == beginning.resolve():
            raise InputError(f"{out} is what the fit starts from", "Give another folder for --out")
        recipe = _with_settings_of(beginning, recipe)
    main = accelerator.is_main_process
    resumed = check_folder(out, recipe, resume=resume, overwrite=overwrite) if main else None
    accelerator.wait_for_everyone()
    base, tokenizer = load_model(recipe.model, dtype=recipe.dtype, device=device, revision=recipe.revision)
    dtype = base.dtype
    adapter = beginning / LORA_FOLDER if beginning and (beginning / LORA_FOLDER).is_dir() else None
    model = _routed(base, recipe, beginning, adapter)
    if recipe.static.layers and not all(unit.unit.family.in_parts for unit in model.units):
        raise InputError("static layers need an attention whose code is known", "Leave --static-layers out")
    if (units := model.routing_config.selection.units) != recipe.selection.units:
        progress.message(f"of this family not all can be routed: selection.units = {units}")
    elif any(model.routing_config.private):
        progress.message("attentions of this family run whole, but for matrices that only executed tokens need")
    fuse(model)
    text = Texts(recipe.data, tokenizer, recipe.seed)
    run = Run(recipe, out, model, tokenizer, text, accelerator, progress, dtype, adapter, resumed)
    _check_texts(run)
    set_targets(run)
    if main:
        _begin(run)
    accelerator.wait_for_everyone()
    wanted = recipe.activation_checkpointing
    if model.device.type != "cpu" if wanted is None else wanted:
        enable_checkpointing(model)
    return run


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; the method has two names across transformers versions."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _with_settings_of(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with the settings of the routing folder that it starts from: all that an earlier stage decided."""
    goes_on = {"joint", "calibrate"} >= set(recipe.stages)
    if (folder / LORA_FOLDER).is_dir() and not goes_on:
        raise InputError(
            f"{folder} has been through the lora stage",
            "Start from a folder without an adapter, or go on with stages: [joint]",
        )
    config = read_config(folder)
    # The closed form would solve the forecasters anew: what they learned since would be lost.
    forecaster = config.forecaster.model_copy(update={"refit": False})
    update: dict[str, Any] = {"forecaster": forecaster, "router": config.router, "kv": config.kv}
    update["selection"] = config.selection
    if not any(stage.trains_routers for stage in stages_of(recipe)):
        # The dial keeps its currency and its setting; `lora.sparsity` says where else to tune.
        goal = {"budget": config.budget, "sparsity": config.sparsity or recipe.route.sparsity}
        update["route"] = recipe.route.model_copy(update=goal)
    return recipe.model_copy(update=update)


def _routed(base: Any, recipe: Recipe, beginning: Path | None, adapter: Path | None) -> RoutedModelForCausalLM:
    """The base model with routing: with new weights, or with those of the folder that the fit starts from."""
    torch.manual_seed(seed_of(recipe.seed, "initial weights"))
    model = RoutedModelForCausalLM.attach(
        base,
        recipe.forecaster,
        recipe.router,
        selection=recipe.selection,
        kv=recipe.kv,
        name=recipe.model,
        revision=recipe.revision,
    )
    if beginning:
        check_base(beginning, model)
        load_routing_tensors(model, beginning / TENSOR_FILE)
    if adapter and "joint" not in recipe.stages:  # which goes on with it
        with_lora(model, adapter, merge=True)
    return model


def _check_texts(run: Run) -> None:
    """Read the text of every stage that will run. Raises InputError where it is less than one row."""
    for stage in stages_of(run.recipe):
        for reading in stage.reads(run.recipe).values():
            run.text.rows(reading.split, reading.length)


def _begin(run: Run) -> None:
    """Write what a resumed fit has to know. Nothing of an earlier result goes."""
    if run.resumed is None:
        clear_checkpoints(run.out)
    else:
        clean_checkpoints(run.out)
        check_inputs(run.checkpoints, run.model, run.text, run.recipe)
    write_text(run.checkpoints / RECIPE_FILE, run.recipe.model_dump_json(indent=2) + "\n")
    if run.model.routing_config.latency:
        table = run.model.routing_config.latency.model_dump_json(indent=2)
        write_text(run.checkpoints / LATENCY_FILE, table + "\n")
    write_inputs(run.checkpoints, run.model, run.text, run.recipe)
