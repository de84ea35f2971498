"""Which rows execute: RMSNorm, router, thresholds and compaction, all on the device.

A selection is one list of all rows: the executed ones first, in order, then the approximated ones from the far end.
Every later kernel of the unit reads it; nothing is ever counted on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .arithmetic import dot, precision

FEW_ROWS = 16
"""Rows that one program routes whole: a decode step decides in a single launch."""


@dataclass
class Selection:
    """Executed and approximated rows of T = B * N tokens."""

    rows: Tensor
    """[T] int32: executed rows ascending, then approximated rows descending."""
    offsets: Tensor
    """[B + 1] int32: executed rows before each sequence; the last is their number."""
    gate: Tensor
    """[T] bool."""

    @property
    def count(self) -> Tensor:
        """[1] int32 on the device: how many rows execute."""
        return self.offsets[-1:]

    @classmethod
    def empty(cls, batch: int, length: int, device: torch.device) -> Selection:
        """Room for the selection of `batch` sequences of `length` tokens."""
        total = batch * length
        return cls(
            torch.empty(total, dtype=torch.int32, device=device),
            torch.empty(batch + 1, dtype=torch.int32, device=device),
            torch.empty(total, dtype=torch.bool, device=device),
        )

    @classmethod
    def all(cls, batch: int, length: int, device: torch.device) -> Selection:
        """Every row executes."""
        total = batch * length
        return cls(
            torch.arange(total, dtype=torch.int32, device=device),
            torch.arange(0, total + 1, length, dtype=torch.int32, device=device),
            torch.ones(total, dtype=torch.bool, device=device),
        )


@dataclass
class RouterWeights:
    """A router as the kernels read it: margin = outer . act(inner x + inner_bias) + bias, or outer . x + bias."""

    inner: Tensor | None
    """[H, d], in the model's dtype; None for a linear router."""
    inner_bias: Tensor | None
    outer: Tensor
    """[H] or [d] float32: row `execute` minus row `approximate`."""
    bias: Tensor
    """[1] float32."""
    relu: bool
    residual: bool
    """Reads the residual stream, not the normed input."""


# ---------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------


def route_reference(
    hidden: Tensor, norm: Tensor, eps: float, router: RouterWeights, limits: Tensor, valid: Tensor | None, batch: int
) -> tuple[Tensor, Selection]:
    """Normed rows [T, d] and the selection, of hidden [T, d]."""
    scale = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + eps)
    x = (hidden.float() * scale).to(hidden.dtype) * norm
    read = hidden if router.residual else x
    if router.inner is None:
        margin = read.float() @ router.outer
    else:
        inner = F.linear(read.float(), router.inner.float(), router.inner_bias)
        margin = (inner.relu() if router.relu else inner) @ router.outer
    gate = margin + router.bias > limits
    if valid is not None:
        gate = gate & valid.bool()
    return x, select_reference(gate, batch)


def select_reference(gate: Tensor, batch: int) -> Selection:
    """The selection of a gate [T] bool."""
    rows = torch.cat([gate.nonzero().squeeze(1), (~gate).nonzero().squeeze(1).flip(0)])
    counts = gate.view(batch, -1).sum(1).cumsum(0)
    return Selection(rows.int(), F.pad(counts, (1, 0)).int(), gate)


# ---------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------


@triton.jit
def _place(execute, t, inside, before, rows, offsets, gates, total, length):
    """Write one ascending block of decisions to the selection; returns the executed rows so far."""
    flags = (execute & inside).to(tl.int32)
    ahead = before + tl.cumsum(flags, 0) - flags
    tl.store(rows + tl.where(execute, ahead, total - 1 - (t - ahead)), t, mask=inside)
    tl.store(gates + t, execute.to(tl.int8), mask=inside)
    tl.store(offsets + t // length, ahead, mask=inside & (t % length == 0))
    return before + tl.sum(flags, 0)


@triton.jit
def _route_kernel(
    hidden, norm, eps, inner, inner_bias, outer, bias, limits, valid, x, partial, rows, offsets, gates,
    total, length, batch, d, width,
    HAS_INNER: tl.constexpr, RELU: tl.constexpr, RESIDUAL: tl.constexpr, HAS_VALID: tl.constexpr,
    DECIDE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Normed rows, and for each block of router columns its part of the margin; with DECIDE, the selection too."""
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1)
    inside = t < total
    k = tl.arange(0, BK)
    start = t.to(tl.int64)[:, None] * d
    squares = tl.zeros((BM,), dtype=tl.float32)
    for at in range(0, d, BK):
        mask = inside[:, None] & (at + k < d)[None, :]
        h = tl.load(hidden + start + at + k[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(h * h, 1)
    scale = tl.rsqrt(squares / d + eps)
    n = column * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    margin = tl.zeros((BM,), dtype=tl.float32)
    for at in range(0, d, BK):
        real = at + k < d
        mask = inside[:, None] & real[None, :]
        raw = tl.load(hidden + start + at + k[None, :], mask=mask, other=0.0)
        weight = tl.load(norm + at + k, mask=real, other=0.0)
        normed = (raw.to(tl.float32) * scale[:, None]).to(raw.dtype).to(tl.float32)
        normed = (normed * weight.to(tl.float32)[None, :]).to(raw.dtype)
        if column == 0:
            tl.store(x + start + at + k[None, :], normed, mask=mask)
        read = raw if RESIDUAL else normed
        if HAS_INNER:
            w = tl.load(inner + n[None, :] * d + at + k[:, None], mask=(n < width)[None, :] & real[:, None], other=0.0)
            sums = dot(read, w, sums, PRECISION)
        else:
            w = tl.load(outer + at + k, mask=real, other=0.0)
            margin += tl.sum(read.to(tl.float32) * w[None, :], 1)
    if HAS_INNER:
        sums += tl.load(inner_bias + n, mask=n < width, other=0.0)[None, :]
        if RELU:
            sums = tl.maximum(sums, 0.0)
        margin = tl.sum(sums * tl.load(outer + n, mask=n < width, other=0.0)[None, :], 1)
    if DECIDE:
        execute = margin + tl.load(bias) > tl.load(limits + t, mask=inside, other=0.0)
        if HAS_VALID:
            execute = execute & (tl.load(valid + t, mask=inside, other=0) != 0)
        count = _place(execute, t, inside, 0, rows, offsets, gates, total, length)
        tl.store(offsets + batch, count)
    else:
        tl.store(partial + column * total + t, margin, mask=inside)


@triton.jit
def _decide_kernel(
    partial, bias, limits, valid, rows, offsets, gates, total, length, batch, parts,
    HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The selection of all rows by one program: a few microseconds beside the matmuls of so many rows."""
    count = 0
    for at in range(0, total, BLOCK):
        t = at + tl.arange(0, BLOCK)
        inside = t < total
        margin = tl.zeros((BLOCK,), dtype=tl.float32)
        for part in range(parts):
            margin += tl.load(partial + part * total + t, mask=inside, other=0.0)
        execute = margin + tl.load(bias) > tl.load(limits + t, mask=inside, other=0.0)
        if HAS_VALID:
            execute = execute & (tl.load(valid + t, mask=inside, other=0) != 0)
        count = _place(execute, t, inside, count, rows, offsets, gates, total, length)
    tl.store(offsets + batch, count)


def route(
    hidden: Tensor,
    norm: Tensor,
    eps: float,
    router: RouterWeights,
    limits: Tensor,
    valid: Tensor | None,
    batch: int,
    into: Selection | None = None,
) -> tuple[Tensor, Selection]:
    """Normed rows [T, d] in the dtype of hidden [T, d], and which of them execute (paper 3.1; threshold on margins).

    `norm` [d] is the RMSNorm's weight, `limits` [T] float32 on the device the margins above which rows execute, `valid`
    [T] marks real tokens. A few rows are routed and compacted in one launch, many in two.
    """
    total, d = hidden.shape
    width = 0 if router.inner is None else router.inner.shape[0]
    few = total <= FEW_ROWS and width <= 64
    rows, columns, depth = (16, 64, 128) if total <= 64 else (32, 64, 64)
    if width <= 16:
        columns = 16
    parts = max(triton.cdiv(width, columns), 1)
    x = torch.empty_like(hidden)
    found = into or Selection.empty(batch, total // batch, hidden.device)
    partial = hidden.new_empty((1 if few else parts, 1 if few else total), dtype=torch.float32)
    gates = found.gate.view(torch.int8)
    _route_kernel[(triton.cdiv(total, rows), parts)](
        hidden, norm, eps, router.outer if router.inner is None else router.inner,
        router.outer if router.inner_bias is None else router.inner_bias, router.outer, router.bias, limits,
        hidden if valid is None else valid, x, partial, found.rows, found.offsets, gates,
        total, total // batch, batch, d, width,
        HAS_INNER=router.inner is not None, RELU=router.relu, RESIDUAL=router.residual, HAS_VALID=valid is not None,
        DECIDE=few and parts == 1, PRECISION=precision(hidden.dtype), BM=rows, BN=columns, BK=depth,
    )  # fmt: skip
    if not (few and parts == 1):
        _decide_kernel[(1,)](
            partial, router.bias, limits, hidden if valid is None else valid, found.rows, found.offsets, gates,
            total, total // batch, batch, parts,
            HAS_VALID=valid is not None, BLOCK=min(max(triton.next_power_of_2(total), 16), 4096), num_warps=8,
        )  # fmt: skip
    return x, found


def select(gate: Tensor, batch: int, into: Selection | None = None) -> Selection:
    """As `select_reference`, on the device: the selection of a given gate [T]."""
    total = len(gate)
    found = into or Selection.empty(batch, total // batch, gate.device)
    limits = torch.full((total,), 0.5, device=gate.device)
    _decide_kernel[(1,)](
        gate.float(), torch.zeros_like(limits[:1]), limits, gate,
        found.rows, found.offsets, found.gate.view(torch.int8), total, total // batch, batch, 1,
        HAS_VALID=False, BLOCK=min(max(triton.next_power_of_2(total), 16), 4096), num_warps=8,
    )  # fmt: skip
    return found
