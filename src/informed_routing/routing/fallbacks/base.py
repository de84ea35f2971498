"""What a fallback is: a module that gives approximated tokens their update, and how engines read it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...config.parts import ForecasterConfig
from ...errors import InputError
from ...models.units import Unit

if TYPE_CHECKING:
    from ..closed_form import ClosedForm


@dataclass(frozen=True)
class LowRankForm:
    """outer_weight act(inner_weight x + inner_bias) + outer_bias, act being SiLU or nothing, and a slice of the unit:
    what engines compute for approximated tokens."""

    inner_weight: Tensor
    """[r, d]"""
    inner_bias: Tensor
    outer_weight: Tensor
    """[d, r]"""
    outer_bias: Tensor
    silu: bool
    slice: Tensor | None = None
    """int64 [k], ascending: what approximated tokens get beside it of the unit's own neurons; None for none of them."""

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return len(self.inner_weight)


class Fallback(nn.Module):
    """Base of all fallbacks. A kind's file calls its class KIND. None in its place means an update of zero."""

    rank: int
    """Bottleneck width, from which some routers' width follows."""

    @classmethod
    def check(cls, config: ForecasterConfig, hidden_size: int) -> None:
        """Raises InputError for settings that do not go with a model."""

    @classmethod
    @abstractmethod
    def make(cls, config: ForecasterConfig, hidden_size: int) -> Fallback | None:
        """A fresh one for one unit."""

    @classmethod
    def make_for(cls, config: ForecasterConfig, hidden_size: int, unit: Unit, layer: nn.Module) -> Fallback | None:
        """A fresh one for a unit of a layer. Raises InputError for a unit that this fallback cannot be for."""
        return cls.make(config, hidden_size)

    @classmethod
    def make_static(cls, config: ForecasterConfig, hidden_size: int, unit: Unit, layer: nn.Module) -> Fallback | None:
        """A fresh one in place of an FFN that gives all tokens the update of the whole layer."""
        return cls.make_for(config, hidden_size, unit, layer)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The update [..., d] for what the unit would have read, [..., d], less what the `chosen` neurons give."""

    def chosen(self) -> Tensor | None:
        """Which of the unit's own neurons approximated tokens get too: int64 [k], ascending; None for none of them."""
        return None

    def choose(self, importance: Tensor) -> None:
        """Choose as many neurons as before, by the importance [neurons] of all. For those with `chosen` only."""
        raise InputError(f"a {type(self).__name__} computes no neurons of its unit", "Use forecaster.fallback = slim")

    def fault(self) -> str | None:
        """What is wrong with tensors that were stored; None where they are sound."""
        return None

    def take(self, solution: ClosedForm) -> None:
        """Become the closed form's solution. Raises InputError for a fallback that has none."""
        raise InputError(f"{type(self).__name__} has no closed form", "Set forecaster.fit = gradient")

    def form(self) -> LowRankForm | None:
        """How engines compute it; None where they cannot, and torch computes."""
        return None
