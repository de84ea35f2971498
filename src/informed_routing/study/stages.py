"""What has to be made before a model can be judged: a chain of training stages, each known by all that determines it.

Cells that begin alike share stages: routers that serve several sparsities, or that are recovered, are trained once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from ..baselines.methods import METHODS
from ..config.recipe import LoraStage, Recipe, RouteStage, StageConfig
from ..config.types import describe
from ..errors import InputError
from ..files.user_files import shown
from ..recipes import recipe_path
from ..training.reading import Reading, tokens_a_step
from ..training.stages import text_read
from .grid import Grid, Method
from .identity import content_id, digest

VERSION = 1
"""Of what stages and cells compute: raise it when the same settings give other results."""

StageKind = Literal["fit", "prune", "recover"]

_OF_THE_GRID = ("model", "data", "dtype", "seed", "stages")
_LIST = ", ".join(METHODS)


@dataclass(frozen=True)
class Stage:
    """One link of a chain. `settings` are JSON values: a recipe for `fit`, else what `build.py` reads."""

    kind: StageKind
    settings: dict[str, Any] = field(hash=False)
    tokens: int
    """Text that sets its weights, each token counted as often as it is read."""
    parent: Stage | None = None

    @cached_property
    def key(self) -> str:
        """Digest of all that determines what the stage makes."""
        settings = {**self.settings, "model": content_id(self.settings["model"])}
        settings["data"] = [content_id(text) for text in self.settings["data"]]
        return digest(
            {
                "version": VERSION,
                "kind": self.kind,
                "settings": settings,
                "parent": None if self.parent is None else self.parent.key,
            }
        )

    @property
    def name(self) -> str:
        """Readable and distinct: also the name of its folder."""
        label = "-".join(self.settings["stages"]) if self.kind == "fit" else self.kind
        return f"{label}-{self.key[:16]}"

    @property
    def chain(self) -> tuple[Stage, ...]:
        """This stage and those before it, first one first."""
        return (*(self.parent.chain if self.parent else ()), self)

    @property
    def total_tokens(self) -> int:
        """Text that set weights, in this stage and those before it."""
        return sum(stage.tokens for stage in self.chain)


@dataclass(frozen=True)
class Variant:
    """What one cell needs to be trained: a method at a sparsity, on one model with one seed."""

    grid: Grid
    method: Method
    model: str
    sparsity: float
    recovered: bool
    seed: int

    @property
    def budget(self) -> int | None:
        """Text for this variant, None where the recipes decide. Raises InputError when only half of it is set."""
        training = self.grid.training
        if training.tokens is None:
            return None
        if not self.recovered:
            return training.tokens
        if training.recovery_tokens is None:
            raise InputError("training.tokens is set without recovery_tokens", "Set both, or neither")
        return training.tokens + training.recovery_tokens


def last_stage(variant: Variant) -> Stage | None:
    """The end of a variant's chain; None for the dense model as it is.

    Raises InputError for settings that cannot work, such as closed forms that read more text than there is to be.
    """
    if variant.method.kind == "dynamic":
        return _fitted(variant)
    stage = _pruned(variant) if variant.method.kind == "static" else None
    return _recovered(variant, stage) if variant.recovered else stage


# -- methods that route ------------------------------------------------------------------------------------


def _fitted(variant: Variant) -> Stage:
    """A recipe as a chain of fits: each is a routing folder that others can start from."""
    recipe = _with_steps(variant, _recipe(variant))
    read = _text_read(recipe)
    stage: Stage | None = None
    for names in _fits(recipe):
        settings = recipe.model_dump(mode="json") | {"stages": list(names)}
        # What means nothing here shall not tell keys apart.
        if names == ("forecast",):
            length = settings["forecast"]["sequence_length"]
            settings["calibration"] |= {"targets": [0.5], "tokens": settings["calibration"]["sequence_length"]}
            settings["route"] = RouteStage(sequence_length=length).model_dump(mode="json")
        if names[-1] in ("forecast", "route"):
            settings["lora"] = LoraStage().model_dump(mode="json")
        elif names == ("lora",):
            settings["lora"]["sparsity"] = variant.sparsity
            settings["calibration"]["targets"] = [variant.sparsity]
        stage = Stage("fit", settings, sum(read[name] for name in names), stage)
    assert stage is not None
    return stage


def _fits(recipe: Recipe) -> list[tuple[str, ...]]:
    """The stages of each fit in a recipe's chain."""
    found: list[tuple[str, ...]] = []
    for name in recipe.stages:
        # Closed forms of the routers and the forecasters solve for one another: one fit.
        closed = recipe.router.warm_start or recipe.forecaster.refit
        if name == "route" and found and found[-1] == ("forecast",) and closed:
            found[-1] = ("forecast", "route")
        else:
            found.append((name,))
    return found


def _recipe(variant: Variant) -> Recipe:
    """The method's recipe with what the grid says, before the steps are worked out."""
    grid, method, training = variant.grid, variant.method, variant.grid.training
    assert method.recipe is not None
    recipe = Recipe.from_yaml(recipe_path(method.recipe))
    joint = "joint" in recipe.stages
    if joint and not variant.recovered:
        raise InputError(
            f"{method.label} trains routers and LoRA at once: there is none without recovery",
            "Give it `recovered: [true]`",
        )
    stages: list[str] = [name for name in recipe.stages if name != "lora"]
    if variant.recovered and not joint:
        stages.append("lora")
    shared = {
        f"{stage}.{key}": getattr(training, key)
        for stage in ("route", "lora")
        for key in ("sequence_length", "batch_size", "gradient_accumulation")
    }
    recovery = {} if joint else {f"lora.{key}": value for key, value in training.recovery.items()}
    # Routers that are trained at one sparsity for all cells get a threshold for each.
    shared_routers = "route.sparsity" in {**training.overrides, **method.overrides}
    targets = list(method.sparsities or grid.sparsities) if shared_routers else [variant.sparsity]
    for key in (*training.overrides, *method.overrides):
        if key in _OF_THE_GRID:
            raise InputError(f"{method.label}: {key} cannot be overridden", "The grid sets it: change it there")
    overrides = {
        "forecast.sequence_length": training.sequence_length,
        **shared,
        "route.sparsity": variant.sparsity,
        "route.budget": grid.budget,
        **recovery,
        "calibration.tokens": training.calibration_tokens,
        "calibration.sequence_length": training.sequence_length,
        "calibration.targets": targets,
        **training.overrides,
        **method.overrides,
        "model": variant.model,
        "data": list(training.data),
        "dtype": training.dtype,
        "seed": variant.seed,
        "stages": stages,
    }
    try:
        return recipe.with_overrides(overrides, none_counts=True)
    except InputError as error:
        raise InputError(f"{method.label}: {error.what}", error.remedy) from None


def _with_steps(variant: Variant, recipe: Recipe) -> Recipe:
    """The recipe with as many steps as its text allows, unless the method's own settings say how many."""
    own = {**variant.grid.training.overrides, **variant.method.overrides}
    training = variant.grid.training
    if training.tokens is None:
        return recipe
    main = "route.steps"  # also those of the joint stage
    if main not in own:
        first = variant.budget if "joint" in recipe.stages else training.tokens
        recipe = recipe.with_overrides({main: _affordable(variant, recipe, "route", first or 0)})
    if "lora" in recipe.stages and "lora.steps" not in own and "steps" not in training.recovery:
        # A method that sets its own steps gets recovery all the same; whether texts are equal is checked for all cells.
        before = sum(read for name, read in _text_read(recipe).items() if name != "lora")
        budget = max(variant.budget or 0, before + (training.recovery_tokens or 0))
        recipe = recipe.with_overrides({"lora.steps": _affordable(variant, recipe, "lora", budget)})
    return recipe


def _affordable(variant: Variant, recipe: Recipe, stage: str, budget: int) -> int:
    """Steps of a stage that the text still allows after the stages before it."""
    config: StageConfig = getattr(recipe, stage)
    read = _text_read(recipe.with_overrides({f"{stage}.steps": 1}))
    names: list[str] = list(recipe.stages)
    place = names.index("joint" if "joint" in names and stage == "route" else stage)
    step = tokens_a_step(config)
    before = sum(read[name] for name in names[: place + 1]) - step
    steps = (budget - before) // step
    if steps < 1:
        raise InputError(
            f"{variant.method.label} reads {before} tokens before its first {stage} step, of {budget} that it may",
            "Raise training.tokens, or lower forecaster.tokens, router.warm_start_tokens and router.sweep_tokens",
        )
    return steps


def _text_read(recipe: Recipe) -> dict[str, int]:
    """Tokens that set weights in each stage of a recipe, as the fits of its chain will read them."""
    found: dict[str, int] = {}
    for names in _fits(recipe):
        start = "the fit before" if found else None
        found |= text_read(recipe.model_copy(update={"stages": names, "start": start}))
    return found


# -- methods that prune ------------------------------------------------------------------------------------


def _shared(variant: Variant) -> dict[str, Any]:
    training = variant.grid.training
    return {
        "model": variant.model,
        "data": list(training.data),
        "dtype": training.dtype,
        "seed": variant.seed,
        "sequence_length": training.sequence_length,
    }


def _pruned(variant: Variant) -> Stage:
    training, method = variant.grid.training, variant.method
    _check_pruning(method)
    wanted = method.prune_tokens or training.prune_tokens
    tokens = Reading.once("train", training.sequence_length, wanted, "pruning").tokens
    settings = {
        **_shared(variant),
        "method": method.prune,
        "sparsity": variant.sparsity,
        "tokens": tokens,
        "method_settings": method.overrides,
    }
    return Stage("prune", settings, tokens)


def _check_pruning(method: Method) -> None:
    """Raises InputError for a way of pruning that there is not, or settings that it does not have."""
    if method.prune not in METHODS:
        raise InputError(f"{method.label}: there is no way of pruning {shown(method.prune)}", f"There are {_LIST}")
    try:
        METHODS[method.prune].settings.model_validate(method.overrides)
    except ValidationError as error:
        what, remedy = describe(error)
        raise InputError(f"{method.label}: {what}", remedy) from None


def _recovered(variant: Variant, parent: Stage | None) -> Stage:
    """LoRA on a pruned model, or on the dense one."""
    training = variant.grid.training
    settings = {
        "sequence_length": training.sequence_length,
        "batch_size": training.batch_size,
        "gradient_accumulation": training.gradient_accumulation,
        **training.recovery,
    }
    config = Recipe.from_mapping({"lora": settings}).lora
    step = tokens_a_step(config)
    if variant.budget is not None and "steps" not in training.recovery:
        read = parent.total_tokens if parent else 0
        config = config.model_copy(update={"steps": max((variant.budget - read) // step, 1)})
    return Stage("recover", {**_shared(variant), "lora": config.model_dump(mode="json")}, config.steps * step, parent)
