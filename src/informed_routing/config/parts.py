"""Settings of the parts that make a method: forecaster, router, and which tokens and units may be approximated."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from .kinds import check_kind
from .types import Frozen, Size

UnitKind = Literal["attention", "ffn"]
Budget = Literal["units", "macs", "latency"]
Decision = str
"""Name of a decision rule (routing/rules)."""

RouterKind = Annotated[str, AfterValidator(lambda name: check_kind("routers", name))]
Rule = Annotated[Decision, AfterValidator(lambda name: check_kind("rules", name))]
Fallback = Annotated[str, AfterValidator(lambda name: check_kind("fallbacks", name))]

KINDS: tuple[UnitKind, UnitKind] = ("attention", "ffn")

DEFAULT_SLICE = 0.125
"""Of slim fallbacks: folders that name no slice have this one."""


class ForecasterConfig(Frozen):
    """The Lightweight Feature Forecaster W2 (W1 x + b1) + b2 of paper Eq. 6 and how it is fitted (stage 1)."""

    fallback: Fallback = Field(
        "forecaster",
        description="what an approximated token gets; slim computes a slice of an FFN's own neurons and forecasts the "
        "rest; zero is greedy routing (SkipGPT)",
    )
    rank: Size = Field(64, description="bottleneck width r (paper: 100 at d = 4096)")
    slice: float | None = Field(
        None, gt=0, lt=1, description=f"slim: share of an FFN's neurons, taken in 32s; default {DEFAULT_SLICE}"
    )
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

    @property
    def is_fitted(self) -> bool:
        """Whether the fallback has weights, which a fit finds: all but zero do."""
        return self.fallback != "zero"

    @property
    def share(self) -> float:
        """Share of its own neurons that an FFN computes for an approximated token; 0 where it computes none."""
        return (self.slice or DEFAULT_SLICE) if self.fallback == "slim" else 0.0

    @model_serializer(mode="wrap")
    def _without_idle_slice(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Left out where there is none: earlier versions then read the folder, and a study knows its cells again."""
        stored: dict[str, Any] = plain(self)
        if stored.get("slice") is None:
            stored.pop("slice", None)
        return stored

    @model_validator(mode="after")
    def _slice_of_slim(self) -> ForecasterConfig:
        if self.slice is not None and self.fallback != "slim":
            raise ValueError(f"forecaster.slice is for fallback slim, not {self.fallback}: leave it out")
        return self

    @model_validator(mode="after")
    def _linear_for_closed_form(self) -> ForecasterConfig:
        closed = self.fit == "closed-form" or self.start == "closed-form"
        if closed and self.activation != "none" and self.is_fitted:
            raise ValueError("a closed-form fit needs forecaster.activation = none; use fit = gradient with silu")
        return self


class RouterConfig(Frozen):
    """The per-token classifier of a unit (paper Eq. 7, two cheaper forms, and those of other methods)."""

    kind: RouterKind = Field(
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
    units: Literal["both", "ffn", "attention"] = Field(
        "both",
        description="which kind of unit is routed; the other one always executes (ffn by itself where the code of a "
        "model's attention is not known)",
    )
    first_layer: int = Field(0, ge=0, description="layers before it always execute (D-LLM: 2)")
    every: int = Field(1, ge=1, description="one in so many layers is routed, from first_layer on (MoD's best: 2)")
    first_tokens: int = Field(0, ge=0, description="tokens at the start of a sequence that always execute (D-LLM: 2)")
    decision: Rule = Field(
        "threshold", description="threshold on the margin; top-k of each sequence and unit (MoD), which is not causal"
    )
    static_layers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="layers that are approximated for every token: one fallback for the whole layer in place of its "
        "FFN, no router, no keys (never layer 0, by whose keys a cache is measured)",
    )

    @field_validator("static_layers")
    @classmethod
    def _each_static_layer_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @model_serializer(mode="wrap")
    def _without_no_static_layers(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Left out where there are none: earlier versions then read the folder, and a study knows its cells again."""
        stored: dict[str, Any] = plain(self)
        if not stored.get("static_layers"):
            stored.pop("static_layers", None)
        if stored.get("units") == "both":
            stored.pop("units")
        return stored

    def is_static(self, layer: int) -> bool:
        """Whether a layer is approximated for every token."""
        return layer in self.static_layers

    def routes(self, layer: int, kind: UnitKind) -> bool:
        """Whether a unit of a layer is routed at all."""
        if self.is_static(layer) or self.units not in ("both", kind):
            return False
        return layer >= self.first_layer and (layer - self.first_layer) % self.every == 0


def check_parts(forecaster: ForecasterConfig, router: RouterConfig, selection: SelectionConfig) -> None:
    """Raises ValueError for parts of a routed unit that do not go together."""
    if selection.decision == "held":
        raise ValueError("selection.decision held is chosen for each run: set_sparsity(..., decision='held'), --hold")
    if selection.static_layers:
        _check_static(selection)
    if selection.units != "both" and selection.granularity == "layer":
        raise ValueError(f"selection.units = {selection.units} does not go with selection.granularity = layer")
    if (router.kind == "ranking") != (selection.decision == "top-k"):
        raise ValueError("router.kind ranking and selection.decision top-k need each other")
    whole = selection.granularity == "unit" and selection.first_layer == 0 and selection.every == 1
    if forecaster.is_fitted and not (whole and selection.decision == "threshold"):
        raise ValueError("forecasters go with thresholds on single units of all layers: set forecaster.fallback = zero")


def _check_static(selection: SelectionConfig) -> None:
    for name, plain in (("granularity", "unit"), ("decision", "threshold"), ("first_tokens", 0), ("units", "both")):
        if (value := getattr(selection, name)) != plain:
            raise ValueError(f"selection.static_layers goes with selection.{name} = {plain}, not {value}")


def check_kv(kv: str, selection: SelectionConfig) -> None:
    """Raises ValueError for static layers in a cache that counts executed tokens."""
    if kv == "drop" and selection.static_layers:
        raise ValueError("selection.static_layers does not go with kv = drop: set kv = keep")
    if kv == "drop" and selection.units == "ffn":
        raise ValueError("selection.units = ffn executes all attentions and drops no keys: set kv = keep")


def method_of(forecaster: ForecasterConfig, selection: SelectionConfig) -> str:
    """The published method that a choice of parts belongs to."""
    if forecaster.is_fitted:
        return "informed-routing"
    if selection.decision == "top-k":
        return "mod"
    return "d-llm" if selection.granularity == "layer" else "skipgpt"
