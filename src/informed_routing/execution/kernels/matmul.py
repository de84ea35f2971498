"""Matmuls on a selection of rows: gathered where operands are loaded, scattered where results are written.

Grids are of the worst case; tiles past the number of selected rows, which only the device knows, end at once. Executed
rows are stored compactly, in the order of the selection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .arithmetic import dot, precision
from .matrices import ForecasterWeights, Matrix
from .route import Selection
from .tiles import TileBook, Tiles, pick

GROUP = 8
"""Row tiles that neighbouring programs share."""


# ---------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------


def _picked(x: Tensor, selection: Selection, executed: bool) -> tuple[Tensor, Tensor]:
    """(rows, x of these rows) of one part of a selection."""
    count = int(selection.count)
    rows = selection.rows[:count] if executed else selection.rows[count:]
    return rows.long(), x[rows.long()]


def bottleneck_reference(x: Tensor, selection: Selection, forecaster: ForecasterWeights) -> Tensor:
    """act(inner x) of the approximated rows, at their places: [T, r]; other rows are not defined."""
    z = torch.zeros(len(x), forecaster.inner.rows, dtype=x.dtype, device=x.device)
    rows, picked = _picked(x, selection, False)
    inner = forecaster.inner(picked)
    z[rows] = F.silu(inner) if forecaster.silu else inner
    return z


def project_reference(
    x: Tensor, selection: Selection, query: Matrix, key: Matrix, value: Matrix, forecaster: ForecasterWeights | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries of executed rows (compact), keys and values of all rows, bottleneck of approximated rows."""
    q = x.new_zeros(len(x), query.rows)
    _, picked = _picked(x, selection, True)
    q[: len(picked)] = query(picked)
    z = None if forecaster is None else bottleneck_reference(x, selection, forecaster)
    return q, key(x), value(x), z


def gated_reference(
    x: Tensor, selection: Selection, gate: Matrix, up: Matrix, gelu: bool, forecaster: ForecasterWeights | None
) -> tuple[Tensor, Tensor | None]:
    """act(gate x) * up x of executed rows (compact [T, ff]), bottleneck of approximated rows."""
    _, picked = _picked(x, selection, True)
    act = F.gelu(gate(picked), approximate="tanh") if gelu else F.silu(gate(picked))
    out = x.new_zeros(len(x), gate.rows)
    out[: len(picked)] = act * up(picked)
    return out, None if forecaster is None else bottleneck_reference(x, selection, forecaster)


def finish_reference(
    hidden: Tensor,
    compact: Tensor,
    selection: Selection,
    down: Matrix,
    z: Tensor | None,
    forecaster: ForecasterWeights | None,
) -> None:
    """hidden[executed] += down compact; hidden[approximated] += outer z, in place (paper Eq. 6)."""
    rows, _ = _picked(hidden, selection, True)
    hidden[rows] += down(compact[: len(rows)])
    if z is not None and forecaster is not None:
        rows, picked = _picked(z, selection, False)
        hidden[rows] += forecaster.outer(picked)


# ---------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------


@triton.jit
def _place(row_blocks, blocks, GROUP: tl.constexpr):
    """The (row, column) tile of this program. Neighbours share a few row tiles and one column tile, so that a long
    prompt's rows and the weights are both read from the L2 cache."""
    place = tl.program_id(0)
    return tl.swizzle2d(place // blocks, place % blocks, row_blocks, blocks, GROUP)


@triton.jit
def _product(
    a, rows, some, w, scale, n, width, depth,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """a[rows, :] @ w[n, :]^T in float32: [BM, BN]."""
    k = tl.arange(0, BK)
    start = rows.to(tl.int64)[:, None] * depth
    below = n.to(tl.int64)[None, :] * depth
    sums = tl.zeros((BM, BN), dtype=tl.float32)
    for at in range(0, depth, BK):
        real = at + k < depth
        left = tl.load(a + start + at + k[None, :], mask=some[:, None] & real[None, :], other=0.0)
        right = tl.load(w + below + at + k[:, None], mask=(n < width)[None, :] & real[:, None], other=0.0)
        sums = dot(left, right, sums, PRECISION)
    if SCALED:
        sums = sums * tl.load(scale + n, mask=n < width, other=0.0)[None, :]
    return sums


@triton.jit
def _write(out, rows, some, n, width, values):
    """out[rows, n] = values."""
    at = rows.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=some[:, None] & (n < width)[None, :])


@triton.jit
def _linear_tile(
    x, rows, places, some, w, bias, scale, out, block, width, depth,
    SILU: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[places] = w x[rows] + bias, one tile."""
    n = block * BN + tl.arange(0, BN)
    sums = _product(x, rows, some, w, scale, n, width, depth, SCALED, PRECISION, BM, BN, BK)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
    if SILU:
        sums = sums * tl.sigmoid(sums)
    _write(out, places, some, n, width, sums)


@triton.jit
def _forecast_tile(
    x, listed, count, total, w, bias, z, row_block, block, width, depth,
    SILU: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Bottleneck of one tile of approximated rows, which stand behind the executed ones in the list."""
    j = count + row_block * BM + tl.arange(0, BM)
    if count + row_block * BM < total:
        some = j < total
        rows = tl.load(listed + j, mask=some, other=0)
        _linear_tile(
            x, rows, rows, some, w, bias, bias, z, block, width, depth, SILU, False, True, PRECISION, BM, BN, BK
        )


@triton.jit
def _project_kernel(
    x, listed, counts, total, depth,
    wq, bq, sq, q, nq, wk, bk, sk, keys, wv, bv, sv, values, nk, wz, bz, z, nz,
    SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, FORECAST: tl.constexpr, SILU: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Queries of executed rows, keys and values of all, bottleneck of approximated rows: one launch."""
    blocks_q = tl.cdiv(nq, BN)
    blocks_k = tl.cdiv(nk, BN)
    row_block, block = _place(tl.cdiv(total, BM), blocks_q + 2 * blocks_k + tl.cdiv(nz, BN), GROUP)
    count = tl.load(counts)
    j = row_block * BM + tl.arange(0, BM)
    if block < blocks_q:
        if row_block * BM < count:
            some = j < count
            rows = tl.load(listed + j, mask=some, other=0)
            _linear_tile(
                x, rows, j, some, wq, bq, sq, q, block, nq, depth, False, SCALED, HAS_BIAS, PRECISION, BM, BN, BK
            )
    elif block < blocks_q + blocks_k:
        _linear_tile(
            x, j, j, j < total, wk, bk, sk, keys, block - blocks_q, nk, depth,
            False, SCALED, HAS_BIAS, PRECISION, BM, BN, BK,
        )  # fmt: skip
    elif block < blocks_q + 2 * blocks_k:
        _linear_tile(
            x, j, j, j < total, wv, bv, sv, values, block - blocks_q - blocks_k, nk, depth,
            False, SCALED, HAS_BIAS, PRECISION, BM, BN, BK,
        )  # fmt: skip
    elif FORECAST:
        _forecast_tile(
            x, listed, count, total, wz, bz, z, row_block, block - blocks_q - 2 * blocks_k, nz, depth,
            SILU, PRECISION, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _gated_kernel(
    x, listed, counts, total, depth, wg, bg, sg, wu, bu, su, out, width, wz, bz, z, nz,
    SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, FORECAST: tl.constexpr, SILU: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """act(gate x) * up x of executed rows, bottleneck of approximated rows: one launch."""
    blocks = tl.cdiv(width, BN)
    row_block, block = _place(tl.cdiv(total, BM), blocks + tl.cdiv(nz, BN), GROUP)
    count = tl.load(counts)
    if block < blocks:
        if row_block * BM < count:
            j = row_block * BM + tl.arange(0, BM)
            some = j < count
            start = tl.load(listed + j, mask=some, other=0).to(tl.int64)[:, None] * depth
            n = block * BN + tl.arange(0, BN)
            below = n.to(tl.int64)[None, :] * depth
            k = tl.arange(0, BK)
            gate = tl.zeros((BM, BN), dtype=tl.float32)
            up = tl.zeros((BM, BN), dtype=tl.float32)
            for at in range(0, depth, BK):
                real = at + k < depth
                left = tl.load(x + start + at + k[None, :], mask=some[:, None] & real[None, :], other=0.0)
                mask = (n < width)[None, :] & real[:, None]
                wide = tl.load(wg + below + at + k[:, None], mask=mask, other=0.0)
                gate = dot(left, wide, gate, PRECISION)
                wide = tl.load(wu + below + at + k[:, None], mask=mask, other=0.0)
                up = dot(left, wide, up, PRECISION)
            if SCALED:
                gate = gate * tl.load(sg + n, mask=n < width, other=0.0)[None, :]
                up = up * tl.load(su + n, mask=n < width, other=0.0)[None, :]
            if HAS_BIAS:
                gate += tl.load(bg + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
                up += tl.load(bu + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
            if GELU:
                inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
                act = gate * tl.sigmoid(2.0 * inner)  # 0.5 (1 + tanh(y)) = sigmoid(2 y)
            else:
                act = gate * tl.sigmoid(gate)
            _write(out, j, some, n, width, act * up)
    elif FORECAST:
        _forecast_tile(
            x, listed, count, total, wz, bz, z, row_block, block - blocks, nz, depth, SILU, PRECISION, BM, BN, BK
        )


@triton.jit
def _add_tile(hidden, rows, some, n, width, sums):
    """hidden[rows, n] += sums."""
    at = rows.to(tl.int64)[:, None] * width + n[None, :]
    mask = some[:, None] & (n < width)[None, :]
    old = tl.load(hidden + at, mask=mask, other=0.0)
    tl.store(hidden + at, (old.to(tl.float32) + sums).to(old.dtype), mask=mask)


@triton.jit
def _finish_kernel(
    hidden, compact, listed, counts, total, width, depth, w, bias, scale, z, wz, bz, rank,
    SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, FORECAST: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The residual update: output projection of executed rows, forecast of the others, in place."""
    row_block, block = _place(tl.cdiv(total, BM) + 1, tl.cdiv(width, BN), GROUP)
    n = block * BN + tl.arange(0, BN)
    count = tl.load(counts)
    tiles = tl.cdiv(count, BM)
    if row_block < tiles:
        j = row_block * BM + tl.arange(0, BM)
        some = j < count
        rows = tl.load(listed + j, mask=some, other=0)
        sums = _product(compact, j, some, w, scale, n, width, depth, SCALED, PRECISION, BM, BN, BK)
        if HAS_BIAS:
            sums += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        _add_tile(hidden, rows, some, n, width, sums)
    elif FORECAST:
        j = count + (row_block - tiles) * BM + tl.arange(0, BM)
        if count + (row_block - tiles) * BM < total:
            some = j < total
            rows = tl.load(listed + j, mask=some, other=0)
            sums = _product(z, rows, some, wz, bz, n, width, rank, False, PRECISION, BM, BN, BK)
            sums += tl.load(bz + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
            _add_tile(hidden, rows, some, n, width, sums)


# ---------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------


def _pointers(matrix: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and scale; the weight stands in for what is not there and not read."""
    fallback = matrix.weight
    return (
        fallback,
        fallback if matrix.bias is None else matrix.bias,
        fallback if matrix.scale is None else matrix.scale,
    )


def _forecast_arguments(
    x: Tensor, forecaster: ForecasterWeights | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, int]:
    """(z or a stand-in, z, inner weight, inner bias, rank)."""
    if forecaster is None:
        return x, None, x, x, 0
    inner = forecaster.inner
    z = x.new_empty(len(x), inner.rows)
    return z, z, inner.weight, inner.bias, inner.rows


def project(
    x: Tensor,
    selection: Selection,
    query: Matrix,
    key: Matrix,
    value: Matrix,
    forecaster: ForecasterWeights | None,
    tiles: Tiles | TileBook | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `project_reference`, in one launch; compact rows past the executed ones are not defined."""
    total, depth = x.shape
    use = pick(tiles, "project", x, query.rows, depth)
    q, keys, values = (x.new_empty(total, m.rows) for m in (query, key, value))
    at_z, z, wz, bz, rank = _forecast_arguments(x, forecaster)
    blocks = sum(triton.cdiv(n, use.columns) for n in (query.rows, key.rows, value.rows, rank))
    _project_kernel[(triton.cdiv(total, use.rows) * blocks,)](
        x, selection.rows, selection.count, total, depth,
        *_pointers(query), q, query.rows, *_pointers(key), keys, *_pointers(value), values, key.rows,
        wz, bz, at_z, rank,
        SCALED=query.scale is not None, HAS_BIAS=query.bias is not None,
        FORECAST=forecaster is not None, SILU=forecaster is not None and forecaster.silu,
        PRECISION=precision(x.dtype), BM=use.rows, BN=use.columns, BK=use.depth, GROUP=GROUP, **use.launch,
    )  # fmt: skip
    return q, keys, values, z


def gated(
    x: Tensor,
    selection: Selection,
    gate: Matrix,
    up: Matrix,
    gelu: bool,
    forecaster: ForecasterWeights | None,
    tiles: Tiles | TileBook | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `gated_reference`, in one launch."""
    total, depth = x.shape
    use = pick(tiles, "gated", x, gate.rows, depth)
    out = x.new_empty(total, gate.rows)
    at_z, z, wz, bz, rank = _forecast_arguments(x, forecaster)
    blocks = triton.cdiv(gate.rows, use.columns) + triton.cdiv(rank, use.columns)
    _gated_kernel[(triton.cdiv(total, use.rows) * blocks,)](
        x, selection.rows, selection.count, total, depth, *_pointers(gate), *_pointers(up), out, gate.rows,
        wz, bz, at_z, rank,
        SCALED=gate.scale is not None, HAS_BIAS=gate.bias is not None, GELU=gelu,
        FORECAST=forecaster is not None, SILU=forecaster is not None and forecaster.silu,
        PRECISION=precision(x.dtype), BM=use.rows, BN=use.columns, BK=use.depth, GROUP=GROUP, **use.launch,
    )  # fmt: skip
    return out, z


def finish(
    hidden: Tensor,
    compact: Tensor,
    selection: Selection,
    down: Matrix,
    z: Tensor | None,
    forecaster: ForecasterWeights | None,
    tiles: Tiles | TileBook | None = None,
) -> None:
    """As `finish_reference`, in one launch: changes hidden [T, d] in place."""
    total, width = hidden.shape
    depth = compact.shape[1]
    use = pick(tiles, "finish", hidden, width, depth)
    outer = down if forecaster is None else forecaster.outer
    stand_in = down.weight
    _finish_kernel[((triton.cdiv(total, use.rows) + 1) * triton.cdiv(width, use.columns),)](
        hidden, compact, selection.rows, selection.count, total, width, depth, *_pointers(down),
        stand_in if z is None else z, outer.weight, stand_in if outer.bias is None else outer.bias,
        0 if z is None else z.shape[1],
        SCALED=down.scale is not None, HAS_BIAS=down.bias is not None, FORECAST=z is not None,
        PRECISION=precision(hidden.dtype), BM=use.rows, BN=use.columns, BK=use.depth, GROUP=GROUP, **use.launch,
    )  # fmt: skip
