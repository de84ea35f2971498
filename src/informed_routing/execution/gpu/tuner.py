"""Times the tile shapes of an engine's matmuls and the prices of its calls, once for each power of two of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import triton
from torch import Tensor

from ...assets.cache import cache_dir
from ..engine import Policy
from ..kernels import matmul
from ..kernels.attention import Keys, Rotation
from ..kernels.route import Selection
from ..kernels.tiles import TileBook, Tiles, bucket
from . import weights as packed
from .inputs import Inputs
from .kv_layer import RoomLayer
from .price_book import MOST_ROWS, Price, PriceBook

TILES, PRICES = "kernel-tiles.json", "gpu-prices.json"
CONTEXT = 1024
"""Keys that a priced decode step has seen."""


@dataclass
class Tuned:
    """The calls of an engine, as (power of two of rows, decode), whose tiles and whose prices are known."""

    tiles: set[tuple[int, bool]] = field(default_factory=set)
    prices: set[tuple[int, bool]] = field(default_factory=set)


class Tunable(Protocol):
    """What of an engine is timed."""

    dtype: torch.dtype
    device: torch.device
    policy: Policy
    layers: list[tuple[packed.Attention, packed.Ffn]]
    kv_shape: tuple[int, int]
    prices: PriceBook
    tiles: TileBook
    tuned: Tuned

    def fresh_layers(self) -> Sequence[RoomLayer]: ...

    def call(
        self,
        hidden: Tensor,
        unit: packed.Unit,
        given: Inputs,
        rotation: Rotation,
        keys: Keys,
        gate: Tensor | None,
        index: int,
    ) -> None: ...


def prices_of(engine: Tunable) -> PriceBook:
    """The price book of an engine: prices hold for one device, kernel compiler, shape and format."""
    attention, ffn = engine.layers[0]
    shapes = [m.weight.shape for m in (attention.query, attention.key, attention.out, ffn.gate, ffn.down)]
    extras = [None if u.forecaster is None else u.forecaster.inner.rows for u in (attention, ffn)]
    inner = attention.router.inner
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
    parts = [device, triton.__version__, engine.dtype, ffn.gate.weight.dtype, *map(tuple, shapes), *extras]
    return PriceBook("|".join(map(str, [*parts, 0 if inner is None else len(inner)])), cache_dir() / PRICES)


def prepare(engine: Tunable, batch: int, length: int) -> None:
    """Make sure that tiles and prices are known for such calls. Does nothing on devices that are not tuned for."""
    rows, decode = bucket(batch * length), length == 1
    known, call = engine.tuned, (rows, decode)
    timed = call in known.tiles and (engine.policy == "exact" or call in known.prices)
    if timed or engine.device.type != "cuda" or engine.dtype == torch.float32:
        return
    if torch.cuda.is_current_stream_capturing():
        return
    if call not in known.tiles:
        known.tiles.add(call)
        path = cache_dir() / TILES
        engine.tiles.recall(path)
        if tune(engine, rows, seconds):
            engine.tiles.remember(path)
    if engine.policy == "auto":
        known.prices.add(call)
        size = min(rows, MOST_ROWS)
        engine.prices.complete(size, decode, lambda kind: price(engine, kind, size, decode, seconds))


def price(
    engine: Tunable,
    kind: int,
    rows: int,
    decode: bool,
    time: Callable[[Callable[[], Any]], float],
    context: int = CONTEXT,
) -> Price:
    """Time a unit's call (0 attention, 1 FFN) of the first layer: whole, and routed with no and all rows executing.

    Decode has `rows` sequences that have seen `context` keys, prefill one new sequence.
    """
    batch = rows if decode else 1
    past = context if decode else 0
    layer = engine.fresh_layers()[0]
    layer.reserve(batch, past + rows // batch + 1)
    unit = engine.layers[0][kind]
    make: dict[str, Any] = {"dtype": engine.dtype, "device": engine.device}
    d = len(unit.norm)
    hidden, gate = torch.randn(rows, d, **make), torch.ones(rows, dtype=torch.bool, device=engine.device)
    turn = torch.ones(rows, engine.kv_shape[1], device=engine.device)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": engine.device}
    given = Inputs(
        hidden=hidden,
        cos=turn,
        sin=torch.zeros_like(turn),
        past=torch.full((1,), past, **ints),
        start=torch.zeros(batch, **ints),
        valid=None,
        limits=torch.zeros(rows, device=engine.device),
        forced=None,
        batch=batch,
    )
    attention = engine.layers[0][0]
    rotation = Rotation(turn, given.sin, attention.query_norm, attention.key_norm, attention.norm_eps)
    keys = Keys(cast(Tensor, layer.keys), cast(Tensor, layer.values), given.past, given.start)
    keys.window = attention.window

    def timed(into: Any) -> float:
        hidden.normal_()  # every call adds to it
        return time(lambda: engine.call(hidden, unit, given, rotation, keys, into, kind))

    whole = timed(None)
    given.limits.fill_(float("inf"))
    none = timed(gate)
    given.limits.fill_(float("-inf"))
    return Price(whole, none, timed(gate))


def tune(engine: Tunable, rows: int, time: Callable[[Callable[[], Any]], float]) -> int:
    """Choose tiles for all matmuls of a layer with `rows` rows, all executing; returns how many were not known."""
    attention, ffn = engine.layers[0]
    d = attention.query.weight.shape[1]
    make: dict[str, Any] = {"dtype": engine.dtype, "device": engine.device}
    x, everyone = torch.randn(rows, d, **make), Selection.all(1, rows, engine.device)
    known = len(engine.tiles)
    for name, unit, width in (("project", attention, attention.query.rows), ("gated", ffn, ffn.gate.rows)):

        def launch(shape: Tiles, name: str = name, unit: Any = unit) -> None:
            if name == "project":
                matmul.project(x, everyone, unit.query, unit.key, unit.value, unit.forecaster, shape)
            else:
                matmul.gated(x, everyone, unit.gate, unit.up, unit.gelu, unit.forecaster, shape)

        engine.tiles.tune(name, x, width, d, launch, time)
    for unit, matrix in ((attention, attention.out), (ffn, ffn.down)):
        compact = torch.randn(rows, matrix.weight.shape[1], **make)
        z = None if unit.forecaster is None else x.new_zeros(rows, unit.forecaster.inner.rows)

        def launch_finish(
            shape: Tiles, compact: Any = compact, unit: Any = unit, matrix: Any = matrix, z: Any = z
        ) -> None:
            matmul.finish(x, compact, everyone, matrix, z, unit.forecaster, shape)

        engine.tiles.tune("finish", x, d, compact.shape[1], launch_finish, time)
    return len(engine.tiles) - known


def seconds(launch: Callable[[], Any]) -> float:
    """Time of a launch on the current CUDA device, from a graph of many: the host's own time is left out."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(launch, rep=5, return_mode="median")) / 1e3
