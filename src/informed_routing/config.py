"""Settings of a method and of its training. Frozen; every bound is checked here, before any work starts.

A `Recipe` is what a user writes in YAML; a `RoutingConfig` is what a routing folder stores.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import InputError
from .setting_types import LARGEST_SIZE, Frozen, Label, Reference, Seed, Size, describe
from .user_files import read_yaml

FORMAT_VERSION = 1

UnitKind = Literal["attention", "ffn"]
Budget = Literal["units", "macs", "latency"]
StageName = Literal["forecast", "route", "joint", "lora", "calibrate"]
Decision = Literal["threshold", "top-k"]


class ForecasterConfig(Frozen):
    """The Lightweight Feature Forecaster W2 (W1 x + b1) + b2 of paper Eq. 6 and how it is fitted (stage 1)."""

    fallback: Literal["forecaster", "zero"] = Field(
        "forecaster", description="what an approximated token gets; zero is greedy routing (SkipGPT)"
    )
    rank: Size = Field(64, description="bottleneck width r (paper: 100 at d = 4096)")
    activation: Literal["none", "silu"] = Field("none", description="paper: none; published code: silu")
    fit: Literal["closed-form", "gradient"] = "closed-form"
    start: Literal["random", "closed-form"] = Field("random", description="start of the gradient fit")
    tokens: int = Field(40_960, ge=1, description="text read by the closed-form fit, in tokens")
    ridge: float = Field(3e-3, ge=0, description="ridge strength relative to the mean input variance")
    weighting: Literal["relative", "none"] = Field(
        "relative",
        description="closed form: weigh each token's error by 1 / mean square of the residual stream, or not",
    )
    loss: Literal["l1+cosine", "smooth-l1", "mse"] = "l1+cosine"
    target: Literal["update", "raw", "normalised"] = Field(
        "update",
        description="update: what the unit adds to the residual; raw: before an output norm, the same in "
        "pre-norm families; normalised: update divided by its per-unit root mean square during the fit",
    )
    refit: bool = Field(
        True,
        description="closed form only: solve it again on the tokens that the routers approximate, in the sweeps that "
        "start the routers, and after stage 2 unless that trained the forecasters itself",
    )

    @model_validator(mode="after")
    def _linear_for_closed_form(self) -> ForecasterConfig:
        closed = self.fit == "closed-form" or self.start == "closed-form"
        if closed and self.activation != "none" and self.fallback == "forecaster":
            raise ValueError("a closed-form fit needs forecaster.activation = none; use fit = gradient with silu")
        return self


class RouterConfig(Frozen):
    """The per-token classifier of a unit (paper Eq. 7, two cheaper forms, and those of other methods)."""

    kind: Literal["mlp", "linear", "low-rank", "normed-mlp", "ranking"] = Field(
        "linear",
        description="mlp is the paper's; a linear router is the cheapest, and the closed form's own shape; "
        "normed-mlp is D-LLM's; ranking is MoD's scalar score with a causal predictor of who is chosen",
    )
    width: Size | None = Field(
        None, description="hidden width; default d/4 - 2r for mlp, 16 for low-rank and for ranking's predictor"
    )
    input: Literal["normed", "residual", "layer"] = Field(
        "normed",
        description="after the unit's norm; the raw residual stream; or the stream as it enters the layer, for both "
        "units (SkipGPT)",
    )
    init: Literal["damped", "kaiming"] = Field(
        "damped", description="damped: the last weights start small, so that execute_bias decides; kaiming: SkipGPT's"
    )
    execute_bias: float = Field(1.0, description="margin before training: above 0 most tokens start executed")
    warm_start: bool = Field(
        True,
        description="before stage 2, regress the margins on what approximation costs each token (closed form)",
    )
    warm_start_tokens: int = Field(16_384, ge=1, description="text of the first sweep, over the dense model")
    sweeps: int = Field(3, ge=0, description="further sweeps, over the model as routed so far")
    sweep_tokens: int = Field(8_192, ge=1, description="text of each further sweep")


class SelectionConfig(Frozen):
    """Which units and tokens may be approximated, and by which rule inference decides."""

    granularity: Literal["unit", "layer"] = Field("unit", description="layer: one decision joins attention and ffn")
    first_layer: int = Field(0, ge=0, description="layers before it always execute (D-LLM: 2)")
    every: int = Field(1, ge=1, description="one in so many layers is routed, from first_layer on (MoD's best: 2)")
    first_tokens: int = Field(0, ge=0, description="tokens at the start of a sequence that always execute (D-LLM: 2)")
    decision: Decision = Field(
        "threshold", description="threshold on the margin; top-k of each sequence and unit (MoD), which is not causal"
    )

    def routes(self, layer: int) -> bool:
        """Whether the units of a layer are routed at all."""
        return layer >= self.first_layer and (layer - self.first_layer) % self.every == 0


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
        description="forecast, route and lora; or joint, which trains routers and LoRA together, in place of the last "
        "two; or calibrate alone: a new threshold table for a routed model",
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
    forecast: ForecastStage = ForecastStage()
    route: RouteStage = RouteStage()
    lora: LoraStage = LoraStage()
    calibration: CalibrationConfig = CalibrationConfig()

    @field_validator("stages")
    @classmethod
    def _stages_in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        order = [name for name in ("forecast", "route", "joint", "lora", "calibrate") if name in value]
        if len(order) != len(value) or not value:
            raise ValueError("stages must be some of forecast, route, lora, each once, or calibrate alone")
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
        elif "forecast" not in self.stages and self.forecaster.fallback == "forecaster":
            raise ValueError(
                f"stages needs forecast before {self.stages[0]}, or a start, or forecaster.fallback = zero"
            )
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> Recipe:
        check_parts(self.forecaster, self.router, self.selection)
        if self.selection.decision == "top-k" and (self.route.budget != "units" or self.route.penalty != "mean"):
            raise ValueError("selection.decision top-k is a share of units: leave route.budget and penalty as they are")
        if "joint" in self.stages and not self.route.steps:
            raise ValueError("the joint stage needs route.steps of 1 or more")
        if self.route.penalty == "token" and self.route.budget != "units":
            raise ValueError("route.penalty token counts units: leave route.budget at units")
        if self.router.warm_start and {"route", "joint"} & set(self.stages) and self.start is None:
            plain = self.router.kind in ("mlp", "linear", "low-rank") and self.router.input != "layer"
            if not plain or self.selection != SelectionConfig():
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
        data = read_yaml(path, "recipe")
        if not isinstance(data, dict):
            raise InputError(f"recipe {path} is not a mapping of settings", "Start from one in recipes/")
        return cls.from_mapping(data)

    def with_overrides(self, overrides: dict[str, Any], *, none_counts: bool = False) -> Recipe:
        """A copy with dotted keys replaced, such as {"route.sparsity": 0.4}.

        None means "not given", or with `none_counts` is a value like others. Raises InputError naming what is unknown
        or breaks a bound.
        """
        data = self.model_dump()
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


def check_parts(forecaster: ForecasterConfig, router: RouterConfig, selection: SelectionConfig) -> None:
    """Raises ValueError for parts of a routed unit that do not go together."""
    if (router.kind == "ranking") != (selection.decision == "top-k"):
        raise ValueError("router.kind ranking and selection.decision top-k need each other")
    whole = selection.granularity == "unit" and selection.first_layer == 0 and selection.every == 1
    if forecaster.fallback == "forecaster" and not (whole and selection.decision == "threshold"):
        raise ValueError("forecasters go with thresholds on single units of all layers: set forecaster.fallback = zero")


def method_of(forecaster: ForecasterConfig, selection: SelectionConfig) -> str:
    """The published method that a choice of parts belongs to."""
    if forecaster.fallback == "forecaster":
        return "informed-routing"
    if selection.decision == "top-k":
        return "mod"
    return "d-llm" if selection.granularity == "layer" else "skipgpt"


class _Measured(BaseModel):
    """Numbers of our own: whether they are finite is looked at where they are stored and read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("true and false are not taken here")
        return value


class LatencyGains(_Measured):
    """Measured on one machine: shares of the dense body's prefill time, for `budget="latency"`."""

    attention: float = Field(description="saved if all tokens approximate all attention units")
    ffn: float = Field(description="saved if all tokens approximate all FFN units")
    overhead: float = Field(description="added by the routers")
    seconds: float = Field(description="of the dense forward that was timed")
    tokens: int
    engine: str
    cpu: str

    def saved(self, attention: float, ffn: float) -> float:
        """Share of the time saved at approximated shares of the two kinds."""
        return self.attention * attention + self.ffn * ffn - self.overhead


class ThresholdRow(_Measured):
    """One calibrated point: the margin threshold and the shares approximated that it realised."""

    threshold: float
    units: float
    attention: float
    ffn: float
    macs: float
    latency: float = Field(0.0, description="share of the time saved, by the table of RoutingConfig.latency")


class BasePrint(Frozen):
    """What tells a base model from another in any floating-point type (models/fingerprint.py)."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="of the weights that this was made from")
    layout: str = Field(description="of the names and shapes of all weights")
    vocabulary: int = Field(description="rows of the embedding")
    digests: dict[str, str] = Field(description="of all weights, as they are in each floating-point type")
    sketch: str = Field("", description="sums of each tensor of a half-precision model, to tell the other half by")
    facts: dict[str, Any] = Field(default_factory=dict, description="settings of the model that change its results")


class BaseModelReference(Frozen):
    name: str = Field(description="where the base model is: an absolute path, a Hub id, or demo:...")
    revision: str | None = None
    fingerprint: str = Field(description="of some weights, rounded: all that earlier versions stored and compared")
    model_type: str
    weights: BasePrint | None = Field(None, description="absent in folders of earlier versions")
    near: str | None = Field(None, description="path of a local base model as seen from the routing folder")


class RoutingConfig(Frozen):
    """The content of routing_config.json: everything needed to attach the saved tensors to the base model."""

    format_version: int = FORMAT_VERSION
    library_version: str = ""
    method: str = "informed-routing"
    base_model: BaseModelReference
    num_layers: int
    hidden_size: int
    forecaster: ForecasterConfig
    router: RouterConfig
    selection: SelectionConfig = SelectionConfig()
    budget: Budget = "units"
    sparsity: float = 0.0
    kv: Literal["keep", "drop"] = "keep"
    calibration_context: int = Field(512, description="sequence length at which `macs` of the table was counted")
    latency: LatencyGains | None = None
    thresholds: tuple[ThresholdRow, ...] = ()

    @model_validator(mode="after")
    def _parts_go_together(self) -> RoutingConfig:
        check_parts(self.forecaster, self.router, self.selection)
        return self

    @model_validator(mode="after")
    def _measured_is_finite(self) -> RoutingConfig:
        rows = [*self.thresholds, *([] if self.latency is None else [self.latency])]
        for row in rows:
            for name, value in row:
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name} is {value} where a measured number should be")
        return self

    @classmethod
    def from_json(cls, text: str, origin: str) -> RoutingConfig:
        """Parse a stored file. Raises InputError when it is damaged or of a newer format."""
        try:
            config = cls.model_validate_json(text)
        except ValidationError as error:
            what, _ = describe(error)
            raise InputError(f"{origin} is damaged: {what}", "Fit or download the routing folder again") from None
        if config.format_version > FORMAT_VERSION:
            raise InputError(
                f"{origin} has format {config.format_version}, this version reads up to {FORMAT_VERSION}",
                "Upgrade informed-routing",
            )
        return config
