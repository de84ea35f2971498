"""From hidden states to logits: the base model's output projection, and what its family does to the products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .discover import family_of
from .families import Family


@dataclass(frozen=True)
class LogitScaling:
    """Logits are multiplied, divided, then capped softly."""

    divisor: float = 1.0
    softcap: float | None = None
    factor: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        if self.factor != 1:
            logits = logits * self.factor
        if self.divisor != 1:  # a pass over [n, V] saved
            logits = logits / self.divisor
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


PLAIN = LogitScaling()


def logit_scaling(family: Family, config: Any) -> LogitScaling:
    """What a family's row and a model's settings say of its logits."""
    divisor = 1.0 if family.logits_divisor is None else getattr(config, family.logits_divisor)
    softcap = None if family.logits_softcap is None else getattr(config, family.logits_softcap, None)
    factor = 1.0 if family.logits_factor is None else getattr(config, family.logits_factor)
    return LogitScaling(divisor, softcap, factor)


@dataclass(frozen=True)
class Head:
    """Logits float32 [n, V] of hidden states [n, d]."""

    linear: Any
    scaling: LogitScaling = PLAIN

    def __call__(self, hidden: Tensor) -> Tensor:
        weight = getattr(self.linear, "weight", None)
        if weight is not None and weight.is_floating_point():  # a stream of float32 may end in a narrower head
            hidden = hidden.to(weight.dtype)
        return self.scaling(cast(Tensor, self.linear(hidden)).float())

    @property
    def weight(self) -> Tensor | None:
        """[V, d] where logits are the product with it and nothing else, and it is not trained; else None."""
        linear: Any = self.linear
        if type(linear) is not nn.Linear or linear.weight.requires_grad or getattr(linear, "bias", None) is not None:
            return None
        return linear.weight.detach() if self.scaling == PLAIN else None


def lm_head(model: Any) -> Head:
    """The map from hidden states to logits. Raises InputError for a family that is not in the table."""
    return Head(model.lm_head, logit_scaling(family_of(model), model.config))


def base_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states in the model's dtype, as the base model makes them.

    Families whose code is not understood may do more to them than the output projection that is used here.
    """
    try:
        family = family_of(model)
    except InputError:
        family = Family()
    return logit_scaling(family, model.config)(model.get_output_embeddings()(hidden))
