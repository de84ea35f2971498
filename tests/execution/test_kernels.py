"""Every Triton kernel does what its PyTorch reference does: by Triton's interpreter on a CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from informed_routing.execution.kernels import attention, matmul, route
from informed_routing.execution.kernels.attention import Keys, Rotation
from informed_routing.execution.kernels.matrices import ForecasterWeights, Matrix
from informed_routing.execution.kernels.route import RouterWeights, Selection
from informed_routing.execution.kernels.tiles import MANY, TileBook, Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
DTYPES = list(TOLERANCE)
GATES = ("none", "all", "first", "last", "one sequence", "half", "most")
D = 48


def gate_of(kind: str, batch: int, length: int) -> Tensor:
    """A gate [B * N] of a named shape."""
    gate = torch.zeros(batch, length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(len(kind) + length)
    if kind == "all":
        gate[:] = True
    elif kind == "first":
        gate[0, 0] = True
    elif kind == "last":
        gate[-1, -1] = True
    elif kind == "one sequence":
        gate[batch // 2] = True
    elif kind in ("half", "most"):
        gate = torch.rand(batch, length, generator=generator) < (0.5 if kind == "half" else 0.9)
    return gate.view(-1).to(DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def matrix(n: int, k: int, dtype: torch.dtype, seed: int, *, bias: bool = False, scaled: str = "") -> Matrix:
    weight = randn(n, k, seed=seed) / k**0.5
    offset = randn(n, dtype=dtype, seed=seed + 1) if bias else None
    if not scaled:
        return Matrix(weight.to(dtype), offset)
    kind, top = (torch.int8, 127.0) if scaled == "int8" else (torch.float8_e4m3fn, 448.0)
    scale = weight.abs().amax(1) / top
    rows = weight / scale[:, None]
    return Matrix(rows.round().to(kind) if scaled == "int8" else rows.to(kind), offset, scale)


def forecaster_of(dtype: torch.dtype, *, silu: bool = False) -> ForecasterWeights:
    return ForecasterWeights(
        Matrix(randn(16, D, dtype=dtype, seed=1) / D**0.5, randn(16, seed=2)),
        Matrix(randn(D, 16, dtype=dtype, seed=3) / 4, randn(D, seed=4)),
        silu,
    )


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def same_selection(found: Selection, expected: Selection) -> None:
    assert torch.equal(found.gate, expected.gate)
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.offsets, expected.offsets)


# -- route -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["linear", "low-rank", "mlp"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (8, 1), (3, 37), (1, 130)])
def test_route(dtype: torch.dtype, kind: str, batch: int, length: int) -> None:
    hidden, norm = randn(batch * length, D, dtype=dtype) * 3, 1 + 0.2 * randn(D, dtype=dtype, seed=9)
    width = {"linear": 0, "low-rank": 16, "mlp": 80}[kind]
    outer = randn(width or D, seed=5) / (width or D) ** 0.5
    router = RouterWeights(
        randn(width, D, dtype=dtype, seed=6) / D**0.5 if width else None,
        randn(width, seed=7) if width else None,
        outer,
        torch.full((1,), 0.1, device=DEVICE),
        kind == "mlp",
        residual=kind == "low-rank" and batch == 3,
    )
    for value in (-1e9, 0.0, 0.3, 1e9):
        limits = torch.full((batch * length,), value, device=DEVICE) + 0.2 * randn(batch * length, seed=11)
        for valid in (None, (randn(batch * length, seed=8) > -1).to(torch.int8)):
            settings = (hidden, norm, 1e-5, router, limits, valid, batch)
            x, found = route.route(*settings)
            expected_x, expected = route.route_reference(*settings)
            close(x, expected_x, dtype)
            # A margin within rounding of the threshold may fall on either side: compare what follows from the gate.
            assert float((found.gate != expected.gate).float().mean()) <= (0 if dtype == torch.float32 else 0.05)
            same_selection(found, route.select_reference(found.gate, batch))


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (5, 1), (3, 41), (2, 2500)])
def test_select(kind: str, batch: int, length: int) -> None:
    gate = gate_of(kind, batch, length)
    same_selection(route.select(gate, batch), route.select_reference(gate, batch))


# -- matmuls on rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (4, 1), (3, 29)])
def test_project(dtype: torch.dtype, kind: str, batch: int, length: int) -> None:
    x, chosen = randn(batch * length, D, dtype=dtype), route.select_reference(gate_of(kind, batch, length), batch)
    q, k, v = (matrix(n, D, dtype, n, bias=True) for n in (64, 32, 32))
    for forecaster in (None, forecaster_of(dtype, silu=length == 1)):
        found = matmul.project(x, chosen, q, k, v, forecaster)
        expected = matmul.project_reference(x, chosen, q, k, v, forecaster)
        count = int(chosen.count)
        close(found[0][:count], expected[0][:count], dtype)
        close(found[1], expected[1], dtype)
        close(found[2], expected[2], dtype)
        if forecaster is not None:
            assert found[3] is not None
            assert expected[3] is not None
            rest = chosen.rows[count:].long()
            close(found[3][rest], expected[3][rest], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("gelu", [False, True])
def test_gated(dtype: torch.dtype, kind: str, gelu: bool) -> None:
    x, chosen = randn(87, D, dtype=dtype), route.select_reference(gate_of(kind, 3, 29), 3)
    gate, up = (matrix(72, D, dtype, seed, bias=gelu) for seed in (1, 2))
    forecaster = forecaster_of(dtype)
    found, z = matmul.gated(x, chosen, gate, up, gelu, forecaster)
    expected, expected_z = matmul.gated_reference(x, chosen, gate, up, gelu, forecaster)
    count = int(chosen.count)
    close(found[:count], expected[:count], dtype)
    assert z is not None
    assert expected_z is not None
    rest = chosen.rows[count:].long()
    close(z[rest], expected_z[rest], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("fallback", ["forecaster", "zero"])
def test_finish(dtype: torch.dtype, kind: str, fallback: str) -> None:
    hidden, chosen = randn(87, D, dtype=dtype), route.select_reference(gate_of(kind, 3, 29), 3)
    compact, down = randn(87, 72, dtype=dtype, seed=3), matrix(D, 72, dtype, 4, bias=True)
    forecaster = forecaster_of(dtype) if fallback == "forecaster" else None
    z = None if forecaster is None else randn(87, 16, dtype=dtype, seed=5)
    expected = hidden.clone()
    matmul.finish_reference(expected, compact, chosen, down, z, forecaster)
    matmul.finish(hidden, compact, chosen, down, z, forecaster)
    close(hidden, expected, dtype)


@pytest.mark.parametrize("scaled", ["int8", "float8"])
def test_scaled_weights(scaled: str) -> None:
    if scaled == "float8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this device")
    dtype = torch.bfloat16
    x, chosen = randn(40, D, dtype=dtype), route.select_reference(gate_of("half", 1, 40), 1)
    q, k, v = (matrix(n, D, dtype, n, scaled=scaled) for n in (64, 32, 32))
    count = int(chosen.count)
    found = matmul.project(x, chosen, q, k, v, None)
    expected = matmul.project_reference(x, chosen, q, k, v, None)
    for one, other, rows in zip(found[:3], expected[:3], (count, 40, 40), strict=True):
        close(one[:rows], other[:rows], dtype)
    gate, up, down = (matrix(n, k, dtype, n, scaled=scaled) for n, k in ((72, D), (72, D), (D, 72)))
    inner, _ = matmul.gated(x, chosen, gate, up, False, None)
    close(inner[:count], matmul.gated_reference(x, chosen, gate, up, False, None)[0][:count], dtype)
    hidden, expected_hidden = x.clone(), x.clone()
    matmul.finish(hidden, inner, chosen, down, None, None)
    matmul.finish_reference(expected_hidden, inner, chosen, down, None, None)
    close(hidden, expected_hidden, dtype)


# -- attention -----------------------------------------------------------------------------------------------


def rotation_of(total: int, head_dim: int, dtype: torch.dtype, kind: str) -> Rotation:
    if kind == "none":
        return Rotation(None, None)
    angles = randn(total, head_dim // 2, seed=11).repeat(1, 2)
    norms: list[Tensor | None] = [None, None]
    if kind == "normed":
        norms = [1 + 0.1 * randn(head_dim, dtype=dtype, seed=seed) for seed in (12, 13)]
    return Rotation(angles.cos(), angles.sin(), norms[0], norms[1])


def keys_of(batch: int, past: int, length: int, dtype: torch.dtype, window: int) -> Keys:
    keys, values = (randn(batch, 2, 64, 16, dtype=dtype, seed=seed) for seed in (21, 22))
    start = torch.tensor([min(3 * b, past) for b in range(batch)], dtype=torch.int32, device=DEVICE)
    return Keys(keys, values, torch.tensor([past], dtype=torch.int32, device=DEVICE), start, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "rotary", "normed"])
def test_store(dtype: torch.dtype, kind: str) -> None:
    batch, length = 3, 21
    rotation = rotation_of(batch * length, 16, dtype, kind)
    found, expected = (keys_of(batch, 7, length, dtype, 0) for _ in range(2))
    key, value = (randn(batch * length, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    attention.store(key, value, rotation, found)
    attention.store_reference(key, value, rotation, expected)
    close(found.keys, expected.keys, dtype)
    close(found.values, expected.values, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(("length", "past", "window"), [(1, 40, 0), (1, 40, 9), (29, 0, 0), (29, 11, 0), (40, 5, 8)])
def test_attend(dtype: torch.dtype, kind: str, length: int, past: int, window: int) -> None:
    batch = 3
    rotation = rotation_of(batch * length, 16, dtype, "normed" if window else "rotary")
    cache = keys_of(batch, past, length, dtype, window)
    chosen = route.select_reference(gate_of(kind, batch, length), batch)
    q = randn(batch * length, 64, dtype=dtype)
    count = int(chosen.count)
    found = attention.attend(q, chosen, rotation, cache, 0.25)
    expected = attention.attend_reference(q, chosen, rotation, cache, 0.25)
    close(found[:count], expected[:count], dtype)


def test_padding_that_executes_gives_zero_and_no_nan() -> None:
    cache = keys_of(1, 0, 20, torch.float32, 0)
    cache.start.fill_(6)
    q, everyone = randn(20, 64), Selection.all(1, 20, torch.device(DEVICE))
    found = attention.attend(q, everyone, Rotation(None, None), cache, 0.25)
    assert torch.equal(found[:6], torch.zeros_like(found[:6]))
    close(found, attention.attend_reference(q, everyone, Rotation(None, None), cache, 0.25), torch.float32)


# -- tile shapes ---------------------------------------------------------------------------------------------


def test_all_tile_shapes_agree_and_the_fastest_is_remembered(tmp_path: Path) -> None:
    book = TileBook()
    x, chosen = randn(200, D, dtype=torch.bfloat16), route.select_reference(gate_of("half", 1, 200), 1)
    gate, up = (matrix(72, D, torch.bfloat16, seed) for seed in (1, 2))
    count = int(chosen.count)
    expected = matmul.gated_reference(x, chosen, gate, up, False, None)[0][:count]
    tried: list[Tiles] = []

    def launch(shape: Tiles) -> None:
        close(matmul.gated(x, chosen, gate, up, False, None, shape)[0][:count], expected, torch.bfloat16)
        tried.append(shape)

    def time(call: Callable[[], None]) -> float:
        call()
        return -float(len(tried))

    assert book.tune("gated", x, 72, D, launch, time) == MANY[-1]
    assert len(tried) == len(MANY)
    assert book.find("gated", x[:150], 72, D) == MANY[-1], "another count of the same power of two"
    book.remember(tmp_path / "tiles.json")
    later = TileBook()
    later.recall(tmp_path / "tiles.json")
    assert later.find("gated", x, 72, D) == MANY[-1]
