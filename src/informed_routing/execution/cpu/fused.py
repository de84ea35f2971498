"""What training on a CPU does between matrix products in bfloat16, as autograd functions over the compiled engine.

Activations and their gradients are bfloat16, the residual stream, gates and sums float32. The matrix products are
torch's, which has matrix instructions for them. Reference: the same arithmetic by torch (models/units.py,
execution/masked.py, training/objectives.py), which the tests compare with.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ...errors import InformedRoutingError
from .build import library

MULTIPLE = 16
"""Widths, and tokens of a sequence in attention, come in so many: the widest vector of floats."""

CHUNK = 256
"""Rows of logits at once: 25 MB in bfloat16 at a vocabulary of 50k."""


def available() -> bool:
    """Whether this machine has the engine, and matrix instructions for bfloat16, without which float32 is faster."""
    try:
        return bool(library().ir_tiles())
    except InformedRoutingError:  # no compiler, or an engine that does not load: torch's arithmetic is the same
        return False


_FULL, _HALF = torch.float32, torch.bfloat16
_TENSORS: dict[str, tuple[torch.dtype, ...]] = {
    "ir_norm": (_FULL, _FULL, _HALF, _FULL),
    "ir_norm_back": (_HALF, _FULL, _FULL, _FULL, _FULL),
    "ir_gated": (_HALF, _HALF, _HALF),
    "ir_gated_back": (_HALF, _HALF, _HALF, _HALF, _HALF),
    "ir_mix": (_FULL, _FULL, _HALF, _HALF, _FULL),
    "ir_mix_back": (_FULL, _FULL, _HALF, _HALF, _FULL, _HALF, _HALF),
    "ir_softmax": (_HALF,),
    "ir_softmax_back": (_HALF, _HALF),
    "ir_rotate": (_HALF, _FULL, _FULL, _HALF),
    "ir_token_losses": (_HALF, _HALF, torch.int64, _FULL),
}
"""What the engine's functions take, in order: they get places in memory and would read anything."""


def _call(name: str, *values: Any) -> None:
    """Call a function of the engine: tensors by their place, whole numbers as int64, threads as torch has them.

    Raises ValueError for tensors that it would misread; None, which not every function takes, stands for no tensor.
    """
    given: list[Any] = []
    wanted = iter(_TENSORS[name])
    for value in values:
        if value is None or isinstance(value, Tensor):
            dtype = next(wanted)
            if value is not None and (value.dtype != dtype or not value.is_contiguous() or value.device.type != "cpu"):
                raise ValueError(f"{name} reads {dtype} in order on the CPU, not {value.dtype} on {value.device}")
        if isinstance(value, Tensor):
            given.append(ctypes.c_void_p(value.data_ptr()))
        elif isinstance(value, bool):
            given.append(ctypes.c_int(value))
        elif isinstance(value, int):
            given.append(ctypes.c_int64(value))
        else:
            given.append(ctypes.c_void_p() if value is None else ctypes.c_float(value))
    getattr(library(), name)(*given, ctypes.c_int(torch.get_num_threads()))


def _check(*sizes: int) -> None:
    """Raises ValueError for sizes that are no whole vectors: the engine would read beyond them."""
    if wrong := [size for size in sizes if size % MULTIPLE]:
        raise ValueError(f"{wrong[0]} is no multiple of {MULTIPLE}")


def _alike(*tensors: Tensor) -> None:
    """Raises ValueError for shapes that differ."""
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ValueError(f"shapes differ: {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}")


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        out, inverse = torch.empty(x.shape, dtype=torch.bfloat16), torch.empty(rows)
        _call("ir_norm", x, weight, rows, width, eps, out, inverse)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        out = torch.empty_like(x)
        _call("ir_norm_back", grads[0].contiguous(), x, weight, inverse, len(inverse), x.shape[-1], out)
        return out, None, None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight: bfloat16 [..., d] of float32 x [..., d] and float32 weight [d], which gets no gradient."""
    _check(x.shape[-1])
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not of {tuple(x.shape)}")
    return _apply(_Norm, x, weight, eps)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _call("ir_gated", gate, up, gate.numel(), gelu, out)
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _call("ir_gated_back", grads[0].contiguous(), gate, up, gate.numel(), ctx.gelu, dgate, dup)
        return dgate, dup, None


def gated(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """silu(gate) * up, or with GELU by its tanh formula: bfloat16 [..., neurons]."""
    _check(gate.shape[-1])
    _alike(gate, up)
    return _apply(_Gated, gate, up, gelu)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gate: Tensor, executed: Tensor, approximated: Tensor) -> Tensor:
        hidden, gate = hidden.contiguous(), gate.contiguous()
        executed, approximated = executed.contiguous(), approximated.contiguous()
        out = torch.empty_like(hidden)
        _call("ir_mix", hidden, gate, executed, approximated, gate.numel(), hidden.shape[-1], out)
        ctx.save_for_backward(gate, executed, approximated)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate, executed, approximated = ctx.saved_tensors  # read once: activation checkpointing gives them once
        grad = grads[0].contiguous()
        dgate, dexecuted, dapproximated = map(torch.empty_like, (gate, executed, approximated))
        shape = (gate.numel(), grad.shape[-1])
        _call("ir_mix_back", grad, gate, executed, approximated, *shape, dgate, dexecuted, dapproximated)
        return grad, dgate, dexecuted, dapproximated


def mix(hidden: Tensor, gate: Tensor, executed: Tensor, approximated: Tensor) -> Tensor:
    """hidden + gate executed + (1 - gate) approximated: float32 [..., d], of bfloat16 updates and a float32 gate."""
    _check(hidden.shape[-1])
    _alike(hidden, executed, approximated)
    _alike(hidden[..., 0], gate)
    return _apply(_Mix, hidden, gate, executed, approximated)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("ir_rotate", x, cos, sin, *x.shape, len(cos) == 1, sign, out)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of bfloat16 [B, N, heads, size] by float32 tables [B or 1, N, size]."""
    _check(x.shape[-1] // 2)
    batch, length, _, size = x.shape
    if cos.shape != sin.shape or cos.shape not in ((1, length, size), (batch, length, size)):
        raise ValueError(f"tables of shape {tuple(cos.shape)} are not of {tuple(x.shape)}")
    return _apply(_Rotate, x, cos, sin)


class _Attend(torch.autograd.Function):
    """Heads that share keys are rows of one product: [B * kv_heads, shared * N, size]."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        batch, length, heads = queries.shape[:3]
        shared = heads // keys.shape[2]
        q = _by_head(queries, shared)
        k, v = _by_head(keys, 1), _by_head(values, 1)
        p = torch.bmm(q, k.transpose(1, 2))
        _call("ir_softmax", p, p.numel() // length, length, scale)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.shape = scale, (batch, length, shared)
        return _by_token(torch.bmm(p, v), *ctx.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        batch, length, shared = ctx.shape
        grad = _by_head(grads[0], shared)
        scores = torch.bmm(grad, v.transpose(1, 2))
        _call("ir_softmax_back", scores, p, p.numel() // length, length, ctx.scale)
        dq, dk, dv = torch.bmm(scores, k), torch.bmm(scores.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), grad)
        return _by_token(dq, *ctx.shape), _by_token(dk, batch, length, 1), _by_token(dv, batch, length, 1), None


def _by_head(x: Tensor, shared: int) -> Tensor:
    """[B, N, heads, size] -> [B * heads / shared, shared * N, size]."""
    batch, length, heads, size = x.shape
    return x.transpose(1, 2).reshape(batch * heads // shared, shared * length, size)


def _by_token(x: Tensor, batch: int, length: int, shared: int) -> Tensor:
    """[B * heads / shared, shared * N, size] -> [B, N, heads, size]."""
    return x.view(batch, -1, length, x.shape[-1]).transpose(1, 2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention of queries [B, N, heads, size] to keys and values [B, N, kv_heads, size], all bfloat16."""
    _check(queries.shape[1])
    _alike(keys, values)
    if queries.shape[:2] != keys.shape[:2] or queries.shape[3] != keys.shape[3] or queries.shape[2] % keys.shape[2]:
        raise ValueError(f"queries {tuple(queries.shape)} do not go with keys {tuple(keys.shape)}")
    return _apply(_Attend, queries, keys, values, scale)


class _TokenLosses(torch.autograd.Function):
    """The gradient to the hidden states is computed on the way, so that logits exist for some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, teacher: Tensor | None, share: float
    ) -> Tensor:
        gradient, losses = torch.empty_like(hidden), torch.empty(len(hidden))
        # Used again: the system would clear fresh memory for each chunk, which takes as long as a product.
        room = hidden.new_empty(1 if teacher is None else 2, min(CHUNK, len(hidden)), len(weight))
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            count = len(losses[rows])
            logits = torch.mm(hidden[rows], weight.t(), out=room[0, :count])
            wanted = None if teacher is None else torch.mm(teacher[rows], weight.t(), out=room[-1, :count])
            _call("ir_token_losses", logits, wanted, targets[rows], *logits.shape, share, losses[rows])
            torch.mm(logits, weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, teacher: Tensor | None, share: float) -> Tensor:
    """Summed loss (1 - share) cross-entropy + share KL(teacher || model) of hidden states bfloat16 [n, d], a scalar.

    `weight` bfloat16 [V, d] is the output projection, `targets` int64 [n] the tokens that followed, `teacher` bfloat16
    [n, d] the dense model's hidden states. Only the hidden states get a gradient.
    """
    if len(targets) != len(hidden) or (len(targets) and int(targets.max()) >= len(weight)):
        raise ValueError(f"targets are not of {len(hidden)} states and a vocabulary of {len(weight)}")
    if teacher is not None:
        _alike(hidden, teacher)
    return _apply(_TokenLosses, hidden, weight, targets.contiguous(), teacher, share)


def _apply(function: Any, *values: Any) -> Tensor:
    result: Tensor = function.apply(*values)
    return result
