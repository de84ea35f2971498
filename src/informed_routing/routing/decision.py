"""Decision rules: how router logits become choices. A gate is 1 where a token executes its unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .router import APPROXIMATE, EXECUTE


class DecisionRule(Protocol):
    """Maps logits [..., 2] (float32) to a gate [...]: boolean, or float with a gradient while training."""

    def __call__(self, logits: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class AlwaysExecute:
    """The dense model."""

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


@dataclass(frozen=True)
class Threshold:
    """Execute where the margin is above `value`: deterministic, causal, the rule of inference."""

    value: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        return (logits[..., EXECUTE] - logits[..., APPROXIMATE]) > self.value


@dataclass(frozen=True)
class GumbelSample:
    """Straight-through Gumbel-softmax (paper 3.1): a hard sample forward, the soft one's gradient backward.

    The temperature changes only the gradient; the sample executes with probability sigmoid(margin) whatever it is.
    """

    tau: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        return F.gumbel_softmax(logits.float(), tau=self.tau, hard=True, dim=-1)[..., EXECUTE]


@dataclass(frozen=True)
class Given:
    """A fixed gate, whatever the logits say: for tests, studies and replayed selections."""

    gate: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        return self.gate.to(logits.device).expand(logits.shape[:-1])
