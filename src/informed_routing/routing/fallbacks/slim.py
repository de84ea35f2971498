"""A slice of the unit itself and a forecaster of the rest: some of an FFN's own neurons, the same for every token.

The neurons that matter most on average say much of what an FFN puts out, and what the others add is predicted better
than all of it. The slice reads the base model's own weights: of it a routing folder holds nothing but `index`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...config.parts import ForecasterConfig
from ...errors import InputError
from ...models.slices import most_important
from ...models.units import Unit
from .base import Fallback, LowRankForm
from .forecaster import Forecaster

MULTIPLE = 32
"""Neurons of a slice come in so many, for engines' panels."""


class SlimFallback(Forecaster):
    """The neurons `index` of a gated FFN, and W2 act(W1 x + b1) + b2 for what these leave out of its output."""

    index: Tensor
    """int64 [k], ascending."""

    def __init__(self, width: int, rank: int, neurons: int, of: int, activation: str = "none") -> None:
        super().__init__(width, rank, activation)
        self.of = of
        self.register_buffer("index", torch.arange(neurons))

    @classmethod
    def make_for(cls, config: ForecasterConfig, hidden_size: int, unit: Unit, layer: nn.Module) -> Fallback:
        if unit.kind == "attention":
            return Forecaster.make(config, hidden_size)
        of = unit.neurons(layer)
        if of is None:
            name = type(unit.module(layer)).__name__
            raise InputError(
                f"the neurons of a {name} are not known, which forecaster.fallback = slim computes some of",
                "Use fallback = forecaster, or name its parts in FAMILIES (gate_up) if it is a gated FFN",
            )
        if unit.family.ffn_out_norm is not None and config.target != "raw":
            raise InputError(
                f"forecaster.target = {config.target} does not go with a slice of an FFN whose output is normed",
                "Set forecaster.target = raw, so that slice and forecast are normed as one",
            )
        count = MULTIPLE * math.floor(config.share * of / MULTIPLE + 0.5)
        if not 0 < count < of:
            raise InputError(
                f"forecaster.slice {config.share} is {'none' if count < 1 else 'all'} of an FFN's {of} neurons, "
                f"which are taken in {MULTIPLE}s",
                f"Choose one that leaves {MULTIPLE} in and some out",
            )
        return cls(hidden_size, config.rank, count, of, config.activation)

    @classmethod
    def make_static(cls, config: ForecasterConfig, hidden_size: int, unit: Unit, layer: nn.Module) -> Fallback:
        """A plain forecaster where the FFN's output is normed: what a slice gives is no part of the layer's update."""
        if unit.family.ffn_out_norm is not None:
            return Forecaster.make(config, hidden_size)
        return cls.make_for(config, hidden_size, unit, layer)

    def chosen(self) -> Tensor:
        return self.index

    def choose(self, importance: Tensor) -> None:
        self.index.copy_(most_important(importance, len(self.index)))

    def fault(self) -> str | None:
        ascending = bool((self.index.diff() > 0).all())
        if ascending and int(self.index[0]) >= 0 and int(self.index[-1]) < self.of:
            return None
        return f"index is no ascending choice of {self.of} neurons"

    def form(self) -> LowRankForm:
        return replace(super().form(), slice=self.index)


KIND = SlimFallback
