"""What a routing folder stores in routing_config.json."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import InputError
from .parts import Budget, ForecasterConfig, RouterConfig, SelectionConfig, check_kv, check_parts
from .types import Frozen, describe

FORMAT_VERSION = 1

ByContext = tuple[tuple[int, float], ...]
"""(context, threshold) pairs: for tokens that see so many keys or more, themselves included, up to the next pair."""


def contexts_rise(contexts: Sequence[int]) -> bool:
    """Whether contexts begin ranges that hold every token: with 1, and rising."""
    return contexts[0] == 1 and all(low < high for low, high in itertools.pairwise(contexts))


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

    attention: float = Field(description="saved by each share of tokens and attention units that is approximated")
    ffn: float = Field(description="saved by each share of tokens and FFN units that is approximated")
    overhead: float = Field(
        description="added by the routers; with static layers, which both shares count, what the two then overstate"
    )
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
    by_context: ByContext = Field(
        (), description="thresholds that realise these shares whatever tokens see; none: `threshold` for all"
    )
    by_unit: tuple[float, ...] = Field(
        (), description="share of tokens that each unit approximated; none in tables of earlier versions"
    )


class BasePrint(Frozen):
    """What tells a base model from another in any floating-point type (models/fingerprint.py)."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="of the weights that this was made from")
    layout: str = Field(description="of the names and shapes of all weights")
    vocabulary: int = Field(description="rows of the embedding")
    digests: dict[str, str] = Field(description="of all weights, as they are in each floating-point type")
    sketch: str = Field("", description="sums of each tensor of a half-precision model, to tell the other half by")
    facts: dict[str, Any] = Field(default_factory=dict, description="settings of the model that change its results")


class BaseModelReference(Frozen):
    """Which base model a folder belongs to, and how it is recognised."""

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
    private: tuple[tuple[str, ...], ...] = Field(
        (), description="by layer, where attentions run whole: their matrices that only executed tokens need"
    )
    budget: Budget = "units"
    sparsity: float = 0.0
    kv: Literal["keep", "drop"] = "keep"
    calibration_context: int = Field(512, description="sequence length at which `macs` of the table was counted")
    latency: LatencyGains | None = None
    thresholds: tuple[ThresholdRow, ...] = ()

    @model_validator(mode="after")
    def _rows_have_the_same_contexts(self) -> RoutingConfig:
        ranges = {tuple(context for context, _ in row.by_context) for row in self.thresholds if row.by_context}
        if len(ranges) > 1:
            raise ValueError("by_context has other ranges in one row than in another")
        if any(not contexts_rise(found) for found in ranges):
            raise ValueError("by_context: ranges begin with a context of 1 and rise")
        return self

    @model_validator(mode="after")
    def _rows_know_all_units(self) -> RoutingConfig:
        for row in self.thresholds:
            if row.by_unit and len(row.by_unit) != 2 * self.num_layers:
                raise ValueError(
                    f"by_unit has {len(row.by_unit)} shares, not one for each of {2 * self.num_layers} units"
                )
            if wrong := [share for share in row.by_unit if not 0 <= share <= 1]:
                raise ValueError(f"by_unit: {wrong[0]} is no share of tokens")
        return self

    @model_validator(mode="after")
    def _parts_go_together(self) -> RoutingConfig:
        check_parts(self.forecaster, self.router, self.selection)
        check_kv(self.kv, self.selection)
        beyond = [layer for layer in self.selection.static_layers if layer >= self.num_layers]
        if beyond:
            raise ValueError(f"selection.static_layers {beyond[0]} is beyond the model's {self.num_layers} layers")
        return self

    @model_validator(mode="after")
    def _private_is_of_all_layers(self) -> RoutingConfig:
        if self.private and len(self.private) != self.num_layers:
            raise ValueError(f"private has {len(self.private)} layers, not {self.num_layers}")
        if self.private and self.kv == "drop":
            raise ValueError("kv drop does not go with private: attentions that run whole drop no keys")
        return self

    @model_validator(mode="after")
    def _measured_is_finite(self) -> RoutingConfig:
        rows = [*self.thresholds, *([] if self.latency is None else [self.latency])]
        for row in rows:
            for name, value in row:
                numbers = [number for _, number in value] if name == "by_context" else [value]
                if wrong := [x for x in numbers if isinstance(x, float) and not math.isfinite(x)]:
                    raise ValueError(f"{name} is {wrong[0]} where a measured number should be")
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
