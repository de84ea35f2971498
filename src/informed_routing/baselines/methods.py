"""The static methods by name: their settings, what they rank, and what they remove."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ..config.parts import UnitKind
from ..config.types import Frozen
from ..errors import InputError
from ..progress import Progress
from . import scores
from .depth_pruning import remove_layers
from .dropping import drop_units
from .remaining import UnitName
from .shapes import Measure


class Settings(Frozen):
    """What every method takes."""

    batch_size: int = Field(4, ge=1, description="rows read at once")
    context: float | None = Field(None, gt=0, description="keys at which MACs are counted; default the rows' mean")


class DepthSettings(Settings):
    """Layers that stay, whatever their score."""

    keep_first: int = Field(0, ge=0)
    keep_last: int = Field(0, ge=0)


class ShortGptSettings(DepthSettings):
    """The paper protects no layer and counts every token."""

    skip_positions: int = Field(0, ge=0, description="first tokens of each row that do not count")


class ShortenedSettings(DepthSettings):
    """The published recipe protects the first four and the last two layers."""

    keep_first: int = Field(4, ge=0)
    keep_last: int = Field(2, ge=0)


class SliceSettings(Settings):
    """Of SliceGPT; the published code rounds to multiples of 8."""

    measure: Measure = "slice"
    round_to: int = Field(8, ge=1, description="the sliced width is a multiple of this")


Part = Any
"""A layer (its index) or a unit (a `UnitName`)."""

Score = Callable[[Any, Tensor, Any, Progress], dict[Part, float]]
"""Scores of all parts of a model from rows [n, L] and settings, lowest first to go."""


class RankedMethod(ABC):
    """Removes the parts of lowest score, each scored in the whole model."""

    measure: ClassVar[str]

    def __init__(self, score: Score, settings: type[Settings]) -> None:
        self.score, self.settings = score, settings

    @abstractmethod
    def parts(self, model: Any) -> Sequence[Part]:
        """What the sparsity counts."""

    @abstractmethod
    def may_go(self, model: Any, settings: Any) -> Sequence[Part]:
        """The parts that may be removed."""

    @abstractmethod
    def remove(self, model: Any, parts: Sequence[Part]) -> None:
        """Delete parts of a model in place."""

    @abstractmethod
    def name(self, part: Part) -> str:
        """How reports call a part."""

    def count(self, model: Any, sparsity: float, settings: Any) -> int:
        """How many parts go: `sparsity` of all, to the nearest number. Raises InputError if fewer may."""
        parts, allowed = len(self.parts(model)), len(self.may_go(model, settings))
        wanted = math.floor(sparsity * parts + 0.5)
        if wanted > allowed:
            raise InputError(
                f"sparsity {sparsity} asks for {wanted} of {parts} {self.measure}, and {allowed} may be removed",
                "Choose a lower sparsity, or protect fewer",
            )
        return wanted

    def choose(self, model: Any, count: int, order: Sequence[Part], settings: Any) -> list[Part]:
        """The first `count` parts of an order that may go."""
        allowed = set(self.may_go(model, settings))
        return [part for part in order if part in allowed][:count]


class DepthMethod(RankedMethod):
    """Whole decoder layers; what is left is an ordinary model."""

    measure = "layers"

    def parts(self, model: Any) -> Sequence[int]:
        return range(len(model.model.layers))

    def may_go(self, model: Any, settings: DepthSettings) -> Sequence[int]:
        return range(settings.keep_first, len(model.model.layers) - settings.keep_last)

    def remove(self, model: Any, parts: Sequence[int]) -> None:
        remove_layers(model, parts)

    def name(self, part: int) -> str:
        return f"layers.{part}"


class DropMethod(RankedMethod):
    """Units of these kinds; the sparsity is a share of the units of both kinds."""

    measure = "units"

    def __init__(self, *kinds: UnitKind) -> None:
        super().__init__(
            lambda model, rows, settings, progress: scores.unit_distance(model, rows, settings.batch_size, progress),
            Settings,
        )
        self.kinds = kinds

    def parts(self, model: Any) -> Sequence[UnitName]:
        layers = range(len(model.model.layers))
        return [(layer, kind) for layer in layers for kind in ("attention", "ffn")]

    def may_go(self, model: Any, settings: Settings) -> Sequence[UnitName]:
        return [unit for unit in self.parts(model) if unit[1] in self.kinds]

    def remove(self, model: Any, parts: Sequence[UnitName]) -> None:
        drop_units(model, parts)

    def name(self, part: UnitName) -> str:
        return f"layers.{part[0]}.{part[1]}"


@dataclass(frozen=True)
class SliceMethod:
    """The residual stream's width; nothing is ranked."""

    settings: type[SliceSettings] = SliceSettings


METHODS: dict[str, RankedMethod | SliceMethod] = {
    "shortgpt": DepthMethod(
        lambda model, rows, s, progress: scores.block_influence(model, rows, s.batch_size, progress, s.skip_positions),
        ShortGptSettings,
    ),
    "shortened-ppl": DepthMethod(
        lambda model, rows, s, progress: scores.perplexity_without(model, rows, s.batch_size, progress),
        ShortenedSettings,
    ),
    "shortened-taylor": DepthMethod(
        lambda model, rows, s, progress: scores.taylor(model, rows, s.batch_size, progress), ShortenedSettings
    ),
    "llm-drop": DropMethod("attention", "ffn"),
    "llm-drop-attention": DropMethod("attention"),
    "llm-drop-ffn": DropMethod("ffn"),
    "slicegpt": SliceMethod(),
}
