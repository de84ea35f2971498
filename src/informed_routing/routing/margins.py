"""Logits and margins of routers."""

from __future__ import annotations

from torch import Tensor

APPROXIMATE, EXECUTE = 0, 1
"""Class indices of a router's two logits (paper 3.1)."""


def margin_of(logits: Tensor) -> Tensor:
    """logit(execute) - logit(approximate) of logits [..., 2]: [...]."""
    return logits[..., EXECUTE] - logits[..., APPROXIMATE]
