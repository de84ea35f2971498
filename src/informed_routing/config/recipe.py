"""What a user writes in YAML: the parts of a method and how they are trained, every bound checked before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ..errors import InputError
from .kinds import stages_in_order
from .parts import Budget, ForecasterConfig, RouterConfig, SelectionConfig, check_kv, check_parts
from .types import LARGEST_SIZE, Frozen, Label, Reference, Seed, Size, describe


def _is_stage(name: Any) -> Any:
    *others, last = map(repr, known := stages_in_order())
    if name not in known:
        raise ValueError(f"input should be {', '.join(others)} or {last}")
    return name


StageName = Annotated[str, BeforeValidator(_is_stage)]
"""Name of a stage (training/stages)."""


class StageConfig(Frozen):
    """What every gradient stage shares. A step sees batch_size * gradient_accumulation sequences per process."""

    steps: int = Field(2000, ge=1)
    batch_size: Size = 4
    gradient_accumulation: Size = 1
    sequence_length: int = Field(256, ge=2, le=LARGEST_SIZE)
    learning_rate: float = Field(2e-3, gt=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = Field(10, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    checkpoint_every: int = Field(25, ge=1)


class StaticSearch(Frozen):
    """The stage `static`: a greedy search for layers that are approximated for every token.

    Layer by layer the one is taken without which the model stays nearest to the original: by the KL divergence of their
    next tokens, the layer's forecaster being fitted in closed form to what the layers taken before leave.
    """

    layers: int = Field(0, ge=0, description="how many to find; 0 without the stage")
    tokens: int = Field(4096, ge=1, description="text on which candidates are compared")
    fit_tokens: int = Field(8192, ge=1, description="text on which their forecasters are fitted, anew for each layer")
    candidates: int = Field(8, ge=1, description="how many of the first round's best later rounds compare")
    sequence_length: int = Field(512, ge=2, le=LARGEST_SIZE)


class ForecastStage(StageConfig):
    """Stage 1 by gradient (ignored by the closed form). Defaults: paper A.2."""

    learning_rate: float = Field(1e-3, gt=0)
    batch_size: Size = 8
    schedule: Literal["constant", "cosine"] = "constant"


class ObjectiveConfig(Frozen):
    """Language-model loss, distillation from the dense model (KL), or their weighted sum."""

    kind: Literal["lm", "distill", "mixed"] = "lm"
    distill_weight: float = Field(0.5, ge=0, le=1, description="weight of the KL term when kind is mixed")


class RouteStage(StageConfig):
    """Stage 2: Gumbel-softmax straight-through with a sparsity target (paper 3.3, Eq. 8).

    The defaults go with the closed-form start, which leaves little to learn; the recipes paper-* have the paper's.
    """

    steps: int = Field(300, ge=0, description="0 keeps the closed-form start as it is (paper: 2000)")
    batch_size: Size = 2
    sequence_length: int = Field(512, ge=2, le=LARGEST_SIZE)
    learning_rate: float = Field(3e-4, gt=0, description="of the routers (paper: 2e-3)")

    sparsity: float = Field(0.25, gt=0, lt=1)
    budget: Budget = "units"
    balanced: bool = Field(False, description="hold attention and ffn to the target separately (paper Table 3)")
    coefficient: float = Field(8.0, ge=0, description="lambda of the sparsity term")
    penalty: Literal["mean", "token"] = Field(
        "mean",
        description="what is held to the target: the mean share (paper Eq. 8), or every token's own, with a weight "
        "that rises from 0 to the coefficient on a sine (D-LLM)",
    )
    tau_start: float = Field(3.0, gt=0, description="temperature of the gradient (paper: 5)")
    tau_end: float = Field(1.0, gt=0)
    noise_start: float = Field(1.0, ge=0, description="scale of the Gumbel noise (paper: 1 throughout)")
    noise_end: float = Field(0.3, ge=0, description="below 1 training ends near inference, which takes no samples")
    objective: ObjectiveConfig = ObjectiveConfig()
    train_forecasters: bool = Field(True, description="let stage 2 move the forecasters too (paper: frozen)")
    forecaster_learning_rate: float = Field(1e-3, gt=0, description="their peak rate, if they are trained")


class LoraStage(StageConfig):
    """Stage 3: LoRA on the base model, routers and forecasters frozen (paper 3.3, Eq. 9)."""

    learning_rate: float = Field(1e-3, gt=0)
    steps: int = Field(500, ge=1, description="(paper: 2000)")
    rank: Size = 16
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[Label, ...] | None = Field(None, min_length=1, description="default: q, k, v and gate of the family")
    sparsity: float | None = Field(
        None, ge=0, lt=1, description="where to tune; default the routed sparsity; 0 tunes the dense model"
    )
    objective: ObjectiveConfig = ObjectiveConfig()


class CalibrationConfig(Frozen):
    """Thresholds for many sparsities from one trained router, on text that training never saw."""

    targets: tuple[float, ...] = Field((0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40, 0.45, 0.50), min_length=1)
    tokens: int = Field(32_768, ge=1)
    sequence_length: int = Field(512, ge=2, le=LARGEST_SIZE)
    batch_size: Size = 2

    @field_validator("targets")
    @classmethod
    def _targets_are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for target in value:
            if not 0 < target < 1:
                raise ValueError(f"sparsity {target} is not between 0 and 1")
        return tuple(sorted(set(value)))


class Recipe(Frozen):
    """All of a `fit`: model, text, stages and their settings."""

    model: Reference = "demo:smollm2-135m"
    revision: Reference | None = None
    data: tuple[Reference, ...] = Field(("demo:wiki", "demo:c4"), min_length=1)
    stages: tuple[StageName, ...] = Field(
        ("forecast", "route"),
        description="static, forecast, route and lora; or joint, which trains routers and LoRA together, in place of "
        "the last two; or calibrate alone: a new threshold table for a routed model",
    )
    start: Reference | None = Field(
        None,
        description="routing folder whose forecasters and routers (weights and settings) to begin with, so that "
        "`stages` may leave out earlier ones",
    )
    seed: Seed = 17
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    activation_checkpointing: bool | None = Field(
        None, description="recompute activations in the backward pass; default: on a GPU, where memory is what is short"
    )
    kv: Literal["keep", "drop"] = Field("keep", description="drop: approximated tokens leave no keys (paper A.4)")
    forecaster: ForecasterConfig = ForecasterConfig()
    router: RouterConfig = RouterConfig()
    selection: SelectionConfig = SelectionConfig()
    static: StaticSearch = StaticSearch()
    forecast: ForecastStage = ForecastStage()
    route: RouteStage = RouteStage()
    lora: LoraStage = LoraStage()
    calibration: CalibrationConfig = CalibrationConfig()

    @model_serializer(mode="wrap")
    def _without_idle_search(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Left out where there is none: a study knows its cells again."""
        stored: dict[str, Any] = plain(self)
        if self.static == StaticSearch():
            stored.pop("static", None)
        return stored

    @field_validator("stages")
    @classmethod
    def _stages_in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        order = [name for name in stages_in_order() if name in value]
        if len(order) != len(value) or not value:
            raise ValueError("stages must be some of static, forecast, route, lora, each once, or calibrate alone")
        if "joint" in value and {"route", "lora"} & set(value):
            raise ValueError("stages cannot hold joint with route or lora: it does the work of both")
        # Every fit calibrates at its end: the name matters only where it stands alone.
        return tuple(order) if order == ["calibrate"] else tuple(name for name in order if name != "calibrate")

    @model_validator(mode="after")
    def _stages_have_what_they_need(self) -> Recipe:
        if self.start is not None:
            if "forecast" in self.stages:
                raise ValueError("stages cannot hold forecast with a start: that has forecasters already")
        elif "calibrate" in self.stages:
            raise ValueError("calibrate alone needs a start (a routing folder) that has been routed")
        elif "route" not in self.stages and "lora" in self.stages:
            raise ValueError("stages needs route before lora, or a start (a routing folder) that has been routed")
        elif "forecast" not in self.stages and self.forecaster.is_fitted:
            raise ValueError(
                f"stages needs forecast before {self.stages[0]}, or a start, or forecaster.fallback = zero"
            )
        return self

    @model_validator(mode="after")
    def _static_layers_are_given_or_found(self) -> Recipe:
        found, searched = self.static.layers, "static" in self.stages
        if searched and not found:
            raise ValueError("the stage static needs static.layers: how many to find")
        if found and not searched:
            raise ValueError("static.layers needs the stage static: name it first in stages")
        if found and self.selection.static_layers:
            raise ValueError("selection.static_layers names what static.layers would look for: leave one of them out")
        if found and self.start is not None:
            raise ValueError("the stage static does not go with a start, whose layers have routers already")
        if found and self.forecaster.activation != "none":
            raise ValueError("the stage static fits in closed form: set forecaster.activation = none")
        if found and self.route.budget == "latency":
            raise ValueError(
                "route.budget latency measures static layers that are known: look for them in a fit of its own "
                "(budget macs or units) and start from that"
            )
        if found:
            check_parts(self.forecaster, self.router, self.selection.model_copy(update={"static_layers": (1,)}))
            check_kv(self.kv, self.selection.model_copy(update={"static_layers": (1,)}))
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Recipe:
        check_parts(self.forecaster, self.router, self.selection)
        check_kv(self.kv, self.selection)
        if self.selection.decision == "top-k" and (self.route.budget != "units" or self.route.penalty != "mean"):
            raise ValueError("selection.decision top-k is a share of units: leave route.budget and penalty as they are")
        if "joint" in self.stages and not self.route.steps:
            raise ValueError("the joint stage needs route.steps of 1 or more")
        if self.route.penalty == "token" and self.route.budget != "units":
            raise ValueError("route.penalty token counts units: leave route.budget at units")
        if self.router.warm_start and {"route", "joint"} & set(self.stages) and self.start is None:
            plain = self.router.kind in ("mlp", "linear", "low-rank") and self.router.input != "layer"
            routed = self.selection.model_copy(update={"static_layers": (), "units": "both"})
            if not plain or routed != SelectionConfig():
                raise ValueError("router.warm_start knows plain routers of single units: set it to false")
        return self

    @classmethod
    def from_mapping(cls, data: dict[str, Any]) -> Recipe:
        """Check a nested mapping. Raises InputError naming the first bad key and its bound."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(*describe(error)) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file. Raises InputError when it is missing, is no YAML mapping, or breaks a bound."""
        from ..files.bounded_yaml import read_yaml  # with PyYAML, which the command line starts without

        data = read_yaml(path, "recipe")
        if not isinstance(data, dict):
            raise InputError(f"recipe {path} is not a mapping of settings", "Start from one in recipes/")
        return cls.from_mapping(data)

    def with_overrides(self, overrides: dict[str, Any], *, none_counts: bool = False) -> Recipe:
        """A copy with dotted keys replaced, such as {"route.sparsity": 0.4}.

        None means "not given", or with `none_counts` is a value like others. Raises InputError naming what is unknown
        or breaks a bound.
        """
        data = {**self.model_dump(), "static": self.static.model_dump()}
        for key, value in overrides.items():
            if value is None and not none_counts:
                continue
            *parents, last = key.split(".")
            node: Any = data
            for parent in parents:
                node = node.get(parent) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                raise InputError(f"unknown setting {key}", "Remove it or correct its spelling")
            node[last] = value
        return Recipe.from_mapping(data)
