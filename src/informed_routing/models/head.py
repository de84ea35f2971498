"""From hidden states to logits: the base model's output projection, and what its family does to the products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .families import FAMILIES, Family, family_of

Head = Callable[[Tensor], Tensor]
"""Logits [n, V] of hidden states [n, d]."""


@dataclass(frozen=True)
class LogitScaling:
    """Logits are divided, then capped softly."""

    divisor: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.divisor != 1:  # a pass over [n, V] saved
            logits = logits / self.divisor
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


PLAIN = LogitScaling()


def logit_scaling(family: Family, config: Any) -> LogitScaling:
    """What a family's row and a model's settings say of its logits."""
    divisor = 1.0 if family.logits_divisor is None else getattr(config, family.logits_divisor)
    softcap = None if family.logits_softcap is None else getattr(config, family.logits_softcap, None)
    return LogitScaling(divisor, softcap)


def lm_head(model: Any) -> Head:
    """The map from hidden states to logits in float32. Raises InputError for a family that is not in the table."""
    scaling = logit_scaling(family_of(model.config.model_type), model.config)
    return lambda hidden: scaling(cast(Tensor, model.lm_head(hidden)).float())


def base_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states in the model's dtype, as the base model makes them.

    Families that are not in the table may do more to them than the output projection that is used here.
    """
    family = FAMILIES.get(model.config.model_type, Family())
    return logit_scaling(family, model.config)(model.get_output_embeddings()(hidden))
