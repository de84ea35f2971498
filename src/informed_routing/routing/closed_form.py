"""The closed-form fit of forecasters: the least-squares optimum of every rank from second moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Moments:
    """Running second moments of (input x, target y) of one unit, for the least-squares fit of every rank.

    Blocks are multiplied in float32 and summed in float64, so a long stream loses nothing to rounding.
    Memory: d (d + m) doubles for m outputs.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu", *, outputs: int | None = None) -> None:
        kw: dict[str, Any] = {"dtype": torch.float64, "device": device}
        outputs = outputs or width
        self.count = torch.zeros((), **kw)
        self.sum_x = torch.zeros(width, **kw)
        self.sum_y = torch.zeros(outputs, **kw)
        self.sum_yy = torch.zeros(outputs, **kw)
        self.xx = torch.zeros(width, width, **kw)
        self.xy = torch.zeros(width, outputs, **kw)

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Accumulate rows x [n, d] and y [n, m], each with its weight [n, 1] (default 1)."""
        x, y = x.float(), y.float()
        wx = x if weight is None else x * weight
        wy = y if weight is None else y * weight
        self.count += x.shape[0] if weight is None else weight.sum()
        self.sum_x += wx.sum(0)
        self.sum_y += wy.sum(0)
        self.sum_yy += (wy * y).sum(0)
        self.xx += wx.T @ x
        self.xy += wx.T @ y

    def tensors(self) -> list[Tensor]:
        """The sums, for a reduction over processes."""
        return [self.count, self.sum_x, self.sum_y, self.sum_yy, self.xx, self.xy]


@dataclass(frozen=True)
class ClosedForm:
    """The solution of one unit: weights of every rank up to d, and the variance that each rank explains."""

    inner: Tensor
    """[d, d]: row i is the i-th direction read from the input."""
    inner_bias: Tensor
    """[d]: centres each direction, so that any number of leading directions keeps the means right."""
    outer: Tensor
    """[d, d]: column i is where the i-th direction goes."""
    outer_bias: Tensor
    explained: Tensor
    """[d]: explained share of the output variance at rank i + 1, on the text it was fitted on."""


def solve(moments: Moments, ridge: float) -> ClosedForm:
    """Ridge reduced-rank regression: the least-squares optimum of every rank from one pair of decompositions.

    With Sigma = cov(x) + ridge * mean variance * I = L L^T and B = Sigma^-1 cov(x, y), the best rank-r map is B
    projected on the r leading right singular vectors of L^T B (Izenman 1975). The bias makes the means agree.
    """
    n = moments.count.clamp(min=1e-30)  # a sum of weights, which may be small
    mean_x, mean_y = moments.sum_x / n, moments.sum_y / n
    cov = moments.xx / n - torch.outer(mean_x, mean_x)
    cross = moments.xy / n - torch.outer(mean_x, mean_y)
    variance = (moments.sum_yy / n - mean_y.square()).clamp(min=0).sum()
    jitter = max(ridge, 1e-9) * cov.diagonal().mean().clamp(min=1e-30)
    sigma = cov + jitter * torch.eye(cov.shape[0], dtype=cov.dtype, device=cov.device)
    lower = torch.linalg.cholesky(sigma)
    weights = torch.cholesky_solve(cross, lower)
    # B^T Sigma B = cov(x, y)^T B: its eigenvectors are the right singular vectors of L^T B, several times faster.
    spread = cross.T @ weights
    directions = torch.linalg.eigh((spread + spread.T) / 2).eigenvectors.flip(1).T
    inner = weights @ directions.T  # column i: what direction i reads
    # Variance left at rank r: |y|^2 - 2 <cross, B_r> + <B_r, cov B_r>, accumulated direction by direction.
    gain = 2 * ((cross @ directions.T) * inner).sum(0) - (inner * (cov @ inner)).sum(0)
    explained = gain.cumsum(0) / variance.clamp(min=1e-30)
    return ClosedForm(
        inner=inner.T.float(),
        inner_bias=-(mean_x @ inner).float(),
        outer=directions.T.float(),
        outer_bias=mean_y.float(),
        explained=explained.float(),
    )
