"""What pruning did: removed parts, scores, and costs before and after."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from .footprint import Footprint


class PruneReport(BaseModel):
    """The record of one pruning; parts are named `layers.3` or, for units, `layers.3.attention`."""

    model_config = ConfigDict(frozen=True)

    method: str
    measure: str = Field(description="what sparsity is a share of: layers, units, slice, parameters or body")
    sparsity: float = Field(description="as asked for")
    realised: float = Field(description="the share that was removed, in the same measure")
    removed: tuple[str, ...] = Field((), description="layers or units by their place in the dense model")
    width: int | None = Field(None, description="sliced width of the residual stream")
    scores: dict[str, float] = Field(default_factory=dict, description="of all layers or units, first to go first")
    before: Footprint
    after: Footprint
    tokens: int = Field(0, description="calibration text read, in tokens")
    seconds: float = 0.0
    settings: dict[str, Any] = Field(default_factory=dict)

    def saved(self) -> dict[str, float]:
        """Shares of the dense model's parameters, body parameters, body MACs and KV cache that were removed."""
        pairs = {name: (getattr(self.before, name), getattr(self.after, name)) for name in _COUNTS}
        return {name: 1 - after / before for name, (before, after) in pairs.items()}

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values, with what was saved."""
        return {**self.model_dump(mode="json"), "saved": self.saved()}


_COUNTS = ("parameters", "body_parameters", "macs", "kv_elements")
