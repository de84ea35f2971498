"""Decision rules: how router logits become choices. A gate is 1 where a token executes its unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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

    Of two classes only the difference of the noises counts, which is logistic. The temperature changes only the
    gradient; the sample executes with probability sigmoid(margin / noise) whatever it is. `noise` below 1 brings
    training nearer to inference, which takes no samples; the paper has 1.
    """

    tau: float = 1.0
    noise: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        margin = (logits[..., EXECUTE] - logits[..., APPROXIMATE]).float()
        uniform = torch.rand_like(margin).clamp(1e-7, 1 - 1e-7)
        noisy = margin + self.noise * torch.logit(uniform)
        soft = torch.sigmoid(noisy / self.tau)
        return (noisy > 0).float() + (soft - soft.detach())


@dataclass(frozen=True)
class Given:
    """A fixed gate, whatever the logits say: for tests, studies and replayed selections."""

    gate: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        return self.gate.to(logits.device).expand(logits.shape[:-1])
