"""Attention of some queries to all keys: compact queries with explicit places, keys and values dense in a static cache.

Query j of a selection is token rows[j] of the call; it stands at `past` + its place in the sequence. A key is seen if
it is not later than the query, not before the sequence's first real token, and inside the window, if there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import dot, precision
from .route import Selection

SPLITS = 16
"""Parts of the keys that a decode step reads at the same time."""


@dataclass
class Rotation:
    """How queries and keys get their places: norms of heads, then rotary tables."""

    cos: Tensor | None
    """[T, head_dim], or None for layers without places."""
    sin: Tensor | None
    query_norm: Tensor | None = None
    """[head_dim], for families that norm each head."""
    key_norm: Tensor | None = None
    eps: float = 1e-6


@dataclass
class Keys:
    """One layer's keys and values [B, kv_heads, capacity, head_dim] and what of them a call sees."""

    keys: Tensor
    values: Tensor
    past: Tensor
    """[1] int32: keys that were there before this call."""
    start: Tensor
    """[B] int32: first real key of each sequence."""
    window: int = 0
    """Keys seen at most; 0 is all."""


# ---------------------------------------------------------------------------------------------------------
# References
# ---------------------------------------------------------------------------------------------------------


def rotate_reference(heads: Tensor, norm: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Normed and rotated heads [T, heads, head_dim]."""
    if norm is not None:
        scale = torch.rsqrt(heads.float().square().mean(-1, keepdim=True) + eps)
        heads = (heads.float() * scale).to(heads.dtype) * norm
    if cos is None or sin is None:
        return heads
    half = heads.shape[-1] // 2
    turned = torch.cat([-heads[..., half:], heads[..., :half]], -1)
    return (heads.float() * cos[:, None].float() + turned.float() * sin[:, None].float()).to(heads.dtype)


def store_reference(key: Tensor, value: Tensor, rotation: Rotation, into: Keys) -> None:
    """Put keys and values [T, kv_heads * head_dim] of a call at their places in the cache."""
    batch, heads, _, head_dim = into.keys.shape
    length, past = len(key) // batch, int(into.past)
    rotated = rotate_reference(
        key.view(-1, heads, head_dim), rotation.key_norm, rotation.eps, rotation.cos, rotation.sin
    )
    for new, cache in ((rotated, into.keys), (value.view(-1, heads, head_dim), into.values)):
        cache[:, :, past : past + length] = new.view(batch, length, heads, head_dim).transpose(1, 2)


def attend_reference(q: Tensor, selection: Selection, rotation: Rotation, cache: Keys, scale: float) -> Tensor:
    """Outputs [T, heads * head_dim] of the compact queries [T, heads * head_dim]; other rows are zero."""
    batch, kv_heads, _, head_dim = cache.keys.shape
    count, past, length = int(selection.count), int(cache.past), len(q) // batch
    rows = selection.rows[:count].long()
    heads = q.shape[1] // head_dim
    cos, sin = (None if part is None else part[rows] for part in (rotation.cos, rotation.sin))
    query = rotate_reference(q[:count].view(count, heads, head_dim), rotation.query_norm, rotation.eps, cos, sin)
    out = torch.zeros_like(q)
    for j in range(count):
        b, place = int(rows[j]) // length, past + int(rows[j]) % length
        first = int(cache.start[b])
        if cache.window:
            first = max(first, place - cache.window + 1)
        keys, values = (part[b, :, first : place + 1].float() for part in (cache.keys, cache.values))
        if first > place:
            continue
        grouped = query[j].float().view(kv_heads, -1, head_dim)
        weights = torch.softmax(grouped @ keys.transpose(1, 2) * scale, -1)
        out[j] = (weights @ values).reshape(-1).to(q.dtype)
    return out


# ---------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------


@triton.jit
def _turned(
    low, high, norm, eps, cos, sin, at, some, HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr
):  # fmt: skip
    """Both halves of heads [M, HALF], normed and rotated; `at` [M] is where in the tables."""
    k = tl.arange(0, HALF)
    kind = low.dtype
    if NORM:
        wide_low = low.to(tl.float32)
        wide_high = high.to(tl.float32)
        squares = tl.sum(wide_low * wide_low, 1) + tl.sum(wide_high * wide_high, 1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        low = ((wide_low * scale).to(kind).to(tl.float32) * tl.load(norm + k).to(tl.float32)[None, :]).to(kind)
        wide_high = (wide_high * scale).to(kind).to(tl.float32)
        high = (wide_high * tl.load(norm + HALF + k).to(tl.float32)[None, :]).to(kind)
    if ROPE:
        place = at.to(tl.int64)[:, None] * (2 * HALF) + k[None, :]
        mask = some[:, None]
        c_low = tl.load(cos + place, mask=mask, other=0.0).to(tl.float32)
        s_low = tl.load(sin + place, mask=mask, other=0.0).to(tl.float32)
        c_high = tl.load(cos + place + HALF, mask=mask, other=0.0).to(tl.float32)
        s_high = tl.load(sin + place + HALF, mask=mask, other=0.0).to(tl.float32)
        wide_low = low.to(tl.float32)
        wide_high = high.to(tl.float32)
        low = (wide_low * c_low - wide_high * s_low).to(kind)
        high = (wide_high * c_high + wide_low * s_high).to(kind)
    return low, high


@triton.jit
def _store_kernel(
    key, value, cos, sin, norm, eps, keys, values, pasts, total, length, heads, capacity,
    HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    some = t < total
    k = tl.arange(0, HALF)
    mask = some[:, None] & (k < HALF)[None, :]
    source = (t.to(tl.int64) * heads + head)[:, None] * (2 * HALF) + k[None, :]
    b = (t // length).to(tl.int64)
    place = tl.load(pasts) + t % length
    target = ((b * heads + head) * capacity + place)[:, None] * (2 * HALF) + k[None, :]
    low = tl.load(key + source, mask=mask, other=0.0)
    high = tl.load(key + source + HALF, mask=mask, other=0.0)
    low, high = _turned(low, high, norm, eps, cos, sin, t, some, HALF, NORM, ROPE)
    tl.store(keys + target, low.to(keys.dtype.element_ty), mask=mask)
    tl.store(keys + target + HALF, high.to(keys.dtype.element_ty), mask=mask)
    for part in tl.static_range(2):
        tl.store(values + target + part * HALF, tl.load(value + source + part * HALF, mask=mask), mask=mask)


@triton.jit
def _block(
    low, high, places, first, window, keys, values, at, last, capacity, peak, sums, out, scale,
    HALF: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of keys of the running softmax."""
    n = at + tl.arange(0, BN)
    k = tl.arange(0, HALF)
    inside = (n < last) & (n < capacity)
    across = n.to(tl.int64)[None, :] * (2 * HALF) + k[:, None]
    left = tl.load(keys + across, mask=inside[None, :], other=0.0)
    scores = dot(low, left, tl.zeros((low.shape[0], BN), dtype=tl.float32), PRECISION)
    right = tl.load(keys + across + HALF, mask=inside[None, :], other=0.0)
    scores = dot(high, right, scores, PRECISION)
    seen = inside[None, :] & (n[None, :] <= places[:, None]) & (n >= first)[None, :]
    if WINDOW:
        seen = seen & (n[None, :] > places[:, None] - window)
    scores = tl.where(seen, scores * scale, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(peak - safe)
    wide = tl.arange(0, 2 * HALF)
    v = tl.load(values + n.to(tl.int64)[:, None] * (2 * HALF) + wide[None, :], mask=inside[:, None], other=0.0)
    out = dot(weights.to(v.dtype), v, out * shrink[:, None], PRECISION)
    return higher, sums * shrink + tl.sum(weights, 1), out


@triton.jit
def _attend_kernel(
    q, listed, offsets, cos, sin, norm, eps, keys, values, pasts, starts, out,
    length, heads, kv_heads, capacity, window, scale,
    HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Prefill: a tile of one sequence's executed queries, one head."""
    head = tl.program_id(1)
    b = tl.program_id(2)
    begin = tl.load(offsets + b) + tl.program_id(0) * BM
    end = tl.load(offsets + b + 1)
    if begin < end:
        j = begin + tl.arange(0, BM)
        some = j < end
        row = tl.load(listed + j, mask=some, other=0)
        past = tl.load(pasts)
        places = tl.where(some, past + row - b * length, 0)
        k = tl.arange(0, HALF)
        source = (j.to(tl.int64) * heads + head)[:, None] * (2 * HALF) + k[None, :]
        low = tl.load(q + source, mask=some[:, None], other=0.0)
        high = tl.load(q + source + HALF, mask=some[:, None], other=0.0)
        low, high = _turned(low, high, norm, eps, cos, sin, row, some, HALF, NORM, ROPE)
        base = (b.to(tl.int64) * kv_heads + head // (heads // kv_heads)) * capacity * (2 * HALF)
        first = tl.load(starts + b)
        last = tl.max(places, 0) + 1
        begins = first
        if WINDOW:  # the earliest query of the tile stands first in it
            begins = tl.maximum(first, past + tl.load(listed + begin) - b * length - window + 1)
        peak = tl.full((BM,), float("-inf"), dtype=tl.float32)
        sums = tl.zeros((BM,), dtype=tl.float32)
        result = tl.zeros((BM, 2 * HALF), dtype=tl.float32)
        for at in range(begins // BN * BN, last, BN):
            peak, sums, result = _block(
                low, high, places, first, window, keys + base, values + base, at, last, capacity, peak, sums, result,
                scale, HALF, WINDOW, PRECISION, BN,
            )  # fmt: skip
        result = result / tl.where(sums == 0.0, 1.0, sums)[:, None]
        wide = tl.arange(0, 2 * HALF)
        target = (j.to(tl.int64) * heads + head)[:, None] * (2 * HALF) + wide[None, :]
        tl.store(out + target, result.to(out.dtype.element_ty), mask=some[:, None])


@triton.jit
def _attend_one_kernel(
    q, listed, counts, cos, sin, norm, eps, keys, values, pasts, starts, parts, peaks, totals,
    heads, kv_heads, capacity, window, scale, splits,
    HALF: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Decode: the queries of one executing sequence that share a key head, one part of the keys."""
    j = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if j < tl.load(counts):
        b = tl.load(listed + j)
        last = tl.load(pasts) + 1
        first = tl.load(starts + b)
        begins = first
        if WINDOW:
            begins = tl.maximum(first, last - window)
        # Every part takes whole blocks of keys; late parts may have none.
        share = tl.cdiv(tl.cdiv(last - begins, splits), BN) * BN
        begins = begins + split * share
        ends = tl.minimum(begins + share, last)
        m = tl.arange(0, BM)
        some = m < GROUP
        k = tl.arange(0, HALF)
        head = kv_head * GROUP + m
        source = (j.to(tl.int64) * heads + head)[:, None] * (2 * HALF) + k[None, :]
        low = tl.load(q + source, mask=some[:, None], other=0.0)
        high = tl.load(q + source + HALF, mask=some[:, None], other=0.0)
        low, high = _turned(low, high, norm, eps, cos, sin, b + m * 0, some, HALF, NORM, ROPE)
        base = (b.to(tl.int64) * kv_heads + kv_head) * capacity * (2 * HALF)
        places = m * 0 + last - 1
        peak = tl.full((BM,), float("-inf"), dtype=tl.float32)
        sums = tl.zeros((BM,), dtype=tl.float32)
        result = tl.zeros((BM, 2 * HALF), dtype=tl.float32)
        for at in range(begins, ends, BN):
            peak, sums, result = _block(
                low, high, places, first, window, keys + base, values + base, at, ends, capacity, peak, sums, result,
                scale, HALF, WINDOW, PRECISION, BN,
            )  # fmt: skip
        slot = (j * splits + split) * heads + head
        tl.store(peaks + slot, peak, mask=some)
        tl.store(totals + slot, sums, mask=some)
        wide = tl.arange(0, 2 * HALF)
        tl.store(parts + slot.to(tl.int64)[:, None] * (2 * HALF) + wide[None, :], result, mask=some[:, None])


@triton.jit
def _combine_kernel(
    parts, peaks, totals, counts, out, heads, splits, WIDTH: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Put the parts of one head's softmax together."""
    j = tl.program_id(0)
    head = tl.program_id(1)
    if j < tl.load(counts):
        s = tl.arange(0, SPLITS)
        some = s < splits
        slot = (j * splits + s) * heads + head
        peak = tl.load(peaks + slot, mask=some, other=float("-inf"))
        highest = tl.max(peak, 0)
        weights = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
        wide = tl.arange(0, WIDTH)
        rows = tl.load(parts + slot.to(tl.int64)[:, None] * WIDTH + wide[None, :], mask=some[:, None], other=0.0)
        total = tl.sum(weights * tl.load(totals + slot, mask=some, other=0.0), 0)
        result = tl.sum(rows * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        tl.store(out + (j.to(tl.int64) * heads + head) * WIDTH + wide, result.to(out.dtype.element_ty))


# ---------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------

LOG2_E = 1.4426950408889634


def _tables(rotation: Rotation, norm: Tensor | None, stand_in: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    cos, sin = rotation.cos, rotation.sin
    tables = (
        stand_in if cos is None else cos,
        stand_in if sin is None else sin,
        stand_in if norm is None else norm,
    )
    return tables, {"NORM": norm is not None, "ROPE": cos is not None}


def store(key: Tensor, value: Tensor, rotation: Rotation, into: Keys) -> None:
    """As `store_reference`: rotate and cache the keys and values of a call, in one launch."""
    _, heads, capacity, head_dim = into.keys.shape
    total = len(key)
    tables, flags = _tables(rotation, rotation.key_norm, key)
    rows = 16 if total <= 64 else 64
    _store_kernel[(triton.cdiv(total, rows), heads)](
        key, value, *tables, rotation.eps, into.keys, into.values, into.past, total, total // len(into.keys), heads,
        capacity, HALF=head_dim // 2, BM=rows, **flags,
    )  # fmt: skip


def attend(q: Tensor, selection: Selection, rotation: Rotation, cache: Keys, scale: float) -> Tensor:
    """As `attend_reference`; compact rows past the executed ones are not defined. One token a sequence is a decode."""
    batch, kv_heads, capacity, head_dim = cache.keys.shape
    total = len(q)
    heads = q.shape[1] // head_dim
    tables, flags = _tables(rotation, rotation.query_norm, q)
    out = torch.empty_like(q)
    shared = {"HALF": head_dim // 2, "WINDOW": cache.window > 0, "PRECISION": precision(q.dtype), **flags}
    exact = q.dtype == torch.float32
    if total == batch:
        group = heads // kv_heads
        splits = min(SPLITS, triton.cdiv(capacity, 64))
        parts = q.new_empty((batch * splits * heads, head_dim), dtype=torch.float32)
        peaks, totals = (q.new_empty(batch * splits * heads, dtype=torch.float32) for _ in range(2))
        _attend_one_kernel[(batch, kv_heads, splits)](
            q, selection.rows, selection.count, *tables, rotation.eps, cache.keys, cache.values, cache.past,
            cache.start, parts, peaks, totals, heads, kv_heads, capacity, cache.window, scale * LOG2_E, splits,
            GROUP=group, BM=max(triton.next_power_of_2(group), 16), BN=32 if exact else 64, num_warps=4, **shared,
        )  # fmt: skip
        _combine_kernel[(batch, heads)](
            parts, peaks, totals, selection.count, out, heads, splits, WIDTH=head_dim, SPLITS=SPLITS
        )
        return out
    length = total // batch
    rows = 32 if exact else 64 if length <= 512 else 128
    _attend_kernel[(triton.cdiv(length, rows), heads, batch)](
        q, selection.rows, selection.offsets, *tables, rotation.eps, cache.keys, cache.values, cache.past, cache.start,
        out, length, heads, kv_heads, capacity, cache.window, scale * LOG2_E,
        BM=rows, BN=32 if exact else 64, num_warps=8 if rows == 128 else 4, **shared,
    )  # fmt: skip
    return out
