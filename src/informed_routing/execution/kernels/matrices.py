"""Weights as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Matrix:
    """Weights [n, k] of a linear layer: half precision or float32, or int8 / float8 with a scale for each row."""

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    """[n] float32."""

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.weight.shape[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights [n, k] in `dtype`, scales applied."""
        if self.scale is None:
            return self.weight.to(dtype)
        return (self.weight.float() * self.scale[:, None]).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """All rows [T, k] -> [T, n], by torch."""
        return F.linear(x, self.dense(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


@dataclass
class ForecasterWeights:
    """A forecaster as the kernels read it: outer act(inner x)."""

    inner: Matrix
    """[r, d]."""
    outer: Matrix
    """[d, r]."""
    silu: bool
