"""Factors of matrix products in half precision, where the CPU has instructions for them; sums stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "bfloat16"]


@contextmanager
def factors_in(precision: Precision) -> Iterator[None]:
    """Let torch round the factors of float32 products on the CPU to bfloat16 where that is faster, or never.

    The native engine does so by itself with bfloat16 weights: the two agree but for the order of sums.
    """
    products: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # newer than its stubs
    before = products.fp32_precision
    products.fp32_precision = "bf16" if precision == "bfloat16" else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before
