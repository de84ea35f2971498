"""What a router is: a per-token classifier of a unit, d -> (width ->) 2, and how engines read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config.parts import RouterConfig
from ...errors import InputError
from ..margins import APPROXIMATE, EXECUTE, margin_of


@dataclass(frozen=True)
class RouterForm:
    """margin = outer . act(inner_weight x + inner_bias) + bias, where act is ReLU or nothing: what engines compute."""

    inner_weight: Tensor | None
    """[width, d]; None where the margin is a product with x itself."""
    inner_bias: Tensor | None
    outer: Tensor
    """[width or d]: difference of the two classes' weights."""
    bias: Tensor
    """[1]"""
    relu: bool


class Router(nn.Module):
    """Base of all routers, which differ in what the last layer reads. A kind's file calls its class KIND."""

    default_width: ClassVar[int | None] = None
    """Hidden width where the settings give none; None: `fitting_width` says."""
    widest: ClassVar[bool] = False
    """Whether the width may lie above the model's hidden size."""
    init_nonlinearity: ClassVar[str] = "relu"
    carriers: ClassVar[tuple[float, ...]] = (1.0,)
    """Signs of the hidden units that carry a linear margin (`take`); ReLU needs both."""
    ranks: ClassVar[bool] = False
    """Whether it has a score that ranks the tokens of a sequence (`score`), beside the logits of each."""

    def __init__(self, config: RouterConfig, hidden_size: int, forecaster_rank: int) -> None:
        super().__init__()
        self.in_features = hidden_size
        width = self.width_for(config, hidden_size, forecaster_rank)
        self.inner: nn.Linear | None = None
        if width is None:
            self.outer = nn.Linear(hidden_size, 2)
        else:
            self.inner = nn.Linear(hidden_size, width)
            self.outer = nn.Linear(width, 2)
            nn.init.kaiming_uniform_(self.inner.weight, nonlinearity=self.init_nonlinearity)  # type: ignore[arg-type]
            nn.init.zeros_(self.inner.bias)
        with torch.no_grad():
            if config.init == "kaiming":
                nn.init.kaiming_uniform_(self.outer.weight, nonlinearity="linear")
            else:
                # Start near indifference about tokens and in favour of executing: the model still works at step 0.
                self.outer.weight.mul_(0.1)
            self.outer.bias.copy_(torch.tensor([-0.5, 0.5]) * config.execute_bias)

    @classmethod
    def width_for(cls, config: RouterConfig, hidden_size: int, forecaster_rank: int) -> int | None:
        """Hidden width; None for a router without a hidden layer. Raises InputError for one above the model's."""
        if config.width is None:
            return cls.fitting_width(hidden_size, forecaster_rank)
        if config.width > hidden_size and not cls.widest:
            raise InputError(
                f"router width {config.width} is above the model's hidden size {hidden_size}",
                f"Choose a width up to {hidden_size}",
            )
        return config.width

    @classmethod
    def fitting_width(cls, hidden_size: int, forecaster_rank: int) -> int | None:
        """The width that goes with a model where the settings give none."""
        return None if cls.default_width is None else min(cls.default_width, hidden_size)

    def hidden(self, x: Tensor) -> Tensor:
        """What the last layer reads: [..., width], or x itself."""
        return x if self.inner is None else self.inner(x.to(self.inner.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., 2] in float32 (class 1 executes): the last, small product is never in half precision."""
        hidden = self.hidden(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(hidden.float(), self.outer.weight.float(), self.outer.bias.float())

    def margin(self, x: Tensor) -> Tensor:
        """logit(execute) - logit(approximate): [...] float32."""
        return margin_of(self(x))

    def take(self, weights: Tensor, constant: float) -> None:
        """Make the margin weights . x + constant (weights [d]), split evenly over the two logits.

        Other hidden units start unread.
        """
        outer, inner = self.outer, self.inner
        with torch.no_grad():
            outer.bias.copy_(torch.tensor([-0.5, 0.5]) * constant)
            if inner is None:
                outer.weight.copy_(torch.stack([-0.5 * weights, 0.5 * weights]))
                return
            outer.weight.zero_()
            # Share the scale between the layers, so that both learn at the same pace.
            norm = float(weights.norm().clamp(min=1e-12))
            half = norm**0.5
            for row, sign in enumerate(self.carriers[: inner.out_features]):
                inner.weight[row].copy_(sign * weights / norm * half)
                inner.bias[row].zero_()
                outer.weight[:, row].copy_(torch.tensor([-0.5, 0.5]) * sign * half)

    def score(self, x: Tensor) -> Tensor:
        """What ranks the tokens of a sequence, of a router that `ranks`: [...] float32."""
        raise InputError(f"a {type(self).__name__} does not rank tokens", "Use router.kind = ranking")

    def form(self) -> RouterForm | None:
        """How engines compute the margin; None where they cannot, and torch computes."""
        return None

    def _form(self, *, relu: bool) -> RouterForm:
        inner, (outer, bias) = self.inner, (self.outer.weight.detach(), self.outer.bias.detach())
        return RouterForm(
            None if inner is None else inner.weight.detach(),
            None if inner is None else inner.bias.detach(),
            outer[EXECUTE] - outer[APPROXIMATE],
            bias[EXECUTE:] - bias[:EXECUTE],
            relu,
        )
