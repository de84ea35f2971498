"""From hidden states to logits: the base model's output projection, and what its family does to the products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import InputError
from .decoder import decoder_of, text_config
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
    """Logits float32 [..., V] of hidden states [..., d]."""

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


class _Found(BaseModelOutputWithPast):
    """What a decoder gives back, of which only the hidden states are known."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@dataclass(frozen=True)
class OwnHead(Head):
    """As the model's own forward makes them, whose decoder is told what hidden states it found."""

    def __call__(self, hidden: Tensor) -> Tensor:
        model, rows = self.linear, hidden.reshape(1, -1, hidden.shape[-1])
        found, decoder = _Found(last_hidden_state=cast(Any, rows)), decoder_of(model)
        tokens = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        vars(decoder)["forward"] = lambda *_, **__: found
        try:
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        finally:
            del vars(decoder)["forward"]
        return logits.float().view(*hidden.shape[:-1], -1)

    @property
    def weight(self) -> None:
        """Logits are more than a product with one."""
        return None


def lm_head(model: Any) -> Head:
    """The map from hidden states to logits. Raises InputError for a family whose code is not understood."""
    family = family_of(model)
    return OwnHead(model) if family.own_head else Head(model.lm_head, logit_scaling(family, text_config(model)))


def base_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states in the model's dtype, as the base model makes them.

    Families whose code is not understood may do more to them than the output projection that is used here.
    """
    try:
        family = family_of(model)
    except InputError:
        family = Family()
    if family.own_head:
        return OwnHead(model)(hidden).to(hidden.dtype)
    return logit_scaling(family, text_config(model))(model.get_output_embeddings()(hidden))
