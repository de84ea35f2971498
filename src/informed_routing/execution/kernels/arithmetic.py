"""How the kernels multiply."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl


def precision(dtype: torch.dtype) -> str:
    """How `dot` multiplies operands of a dtype: float32 exactly, half precisions as the tensor cores do."""
    if dtype == torch.float32:
        return "ieee"
    # Triton's interpreter multiplies the bit patterns of bfloat16: there, operands are widened first.
    return "widen" if os.environ.get("TRITON_INTERPRET") == "1" else "tf32"


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b in float32; b is taken in a's dtype."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b.to(a.dtype), sums, input_precision=PRECISION)
