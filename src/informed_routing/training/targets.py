"""What a fit is held to: the meter of its budget, and the shares that are refused because nothing can reach them."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list

from ..config.folder import LatencyGains
from ..errors import InputError
from ..evaluation.latency import measure_latency
from .calibrate import attainable, reachable, saved_always
from .folder import LATENCY_FILE, what_decides
from .lora import lora_targets
from .run import Run
from .stages import stages_of
from .static import eligible


def set_targets(run: Run) -> None:
    """Set the meter; raises InputError for shares that cannot be reached and layers that cannot take LoRA."""
    recipe = run.recipe
    gains = _latency_gains(run) if recipe.route.budget == "latency" else None
    run.set_meter(gains)
    if recipe.static.layers:
        _check_search(run)
    _check_sparsities(run)
    _check_calibration(run, gains)
    if any(stage.adapts for stage in stages_of(recipe)):
        lora_targets(run.model, recipe.lora)


def _check_search(run: Run) -> None:
    """Raises InputError for more static layers than there can be, or so many that routers have nothing left to save."""
    config, context = run.recipe.static, (run.recipe.route.sequence_length + 1) / 2
    places = eligible(run.model)
    if config.layers > len(places):
        raise InputError(f"static.layers {config.layers} is more than the {len(places)} that can be", "Lower it")
    costs = run.model.costs
    if run.recipe.route.budget == "units":
        saved = [2 / len(costs)] * len(places)
    else:
        dense = [cost.dense(context) for cost in costs]
        pairs = ((2 * place, 2 * place + 1) for place in places)
        saved = [(dense[one] + dense[two] - costs[two].forecaster) / sum(dense) for one, two in pairs]
    least = sum(sorted(saved)[: config.layers])
    if run.recipe.route.sparsity <= least - run.meter.overhead:
        raise InputError(
            f"sparsity {run.recipe.route.sparsity} leaves nothing to routers: {config.layers} static layers save "
            f"{least:.2f} ({run.recipe.route.budget})",
            "Choose a higher sparsity or fewer static layers",
        )


def _check_sparsities(run: Run) -> None:
    recipe = run.recipe
    ceiling = attainable(run.model, run.meter, recipe.route.sequence_length)
    floor = saved_always(run.model, run.meter)
    wanted = {"sparsity": recipe.route.sparsity}
    for stage in stages_of(recipe):
        wanted |= stage.sparsities(recipe)
    for name, value in wanted.items():
        if 0 < value <= floor:
            raise InputError(
                f"{name} {value} leaves nothing to routers: static layers save {floor:.2f} ({recipe.route.budget})",
                "Choose a higher sparsity or fewer static layers",
            )
        if value >= ceiling:
            raise InputError(
                f"{name} {value} cannot be reached: approximating everything saves "
                f"{ceiling:.2f} ({recipe.route.budget})",
                "Choose a lower sparsity, a cheaper router, or the units budget",
            )


def _check_calibration(run: Run, gains: LatencyGains | None) -> None:
    config = run.recipe.calibration
    kept = reachable(config.targets, run.model, run.meter_of(config.sequence_length, gains), config.sequence_length)
    out_of_reach = [target for target in config.targets if target not in kept]
    if out_of_reach:
        shown = ", ".join(f"{target:g}" for target in out_of_reach)
        run.progress.message(f"calibration targets beyond what the routers can reach are left out: {shown}")


def _latency_gains(run: Run) -> LatencyGains:
    """The measured table of a latency budget: this machine's, or that of the run which is being resumed."""
    found: list[Any] = [None]
    if run.accelerator.is_main_process:
        found = [_stored_gains(run)]
        if found[0] is None:
            length = run.recipe.route.sequence_length
            ids = run.text.rows("calibration", length)[:1].to(run.model.device)
            found = [measure_latency(run.model, ids, progress=run.progress)]
    gains: LatencyGains = broadcast_object_list(found)[0]
    run.model.routing_config = run.model.routing_config.model_copy(update={"latency": gains})
    return gains


def _stored_gains(run: Run) -> LatencyGains | None:
    """The table that the resumed run measured, unless routing has another recipe now."""
    path, before, recipe = run.checkpoints / LATENCY_FILE, run.resumed, run.recipe
    training = [stage.name for stage in stages_of(recipe) if stage.trains_routers]
    stage = training[0] if training else "route"
    if before is None or not path.is_file() or what_decides(before, stage) != what_decides(recipe, stage):
        return None
    try:
        return LatencyGains.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{path} is damaged", "Use --overwrite to fit anew") from None
