"""What the parts of a unit cost on this machine, measured: the basis of the profitability switch and of limits.

Each price is the time of one layer's products alone, with weights as cold as in a real forward (all layers take
turns), for some numbers of rows; between them it is interpolated. Measured once per machine, model shape, format and
thread count, then read from the cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...assets.cache import cache_dir, read_record, write_record
from ...routing.limits import Balance
from ..formats import FORMATS
from .build import library_path

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows at which products are timed. Above the last, skipping rows always pays: arithmetic rules."""
MANY = 256
_REPEATS = 5


class Priced(Protocol):
    """What of an engine is timed."""

    @property
    def layers(self) -> Any:
        """Packed layers, see interface.h."""
        ...

    @property
    def library(self) -> Any: ...

    @property
    def threads(self) -> int: ...

    @property
    def weights(self) -> str: ...


@dataclass(frozen=True)
class PriceTable:
    """Seconds of one unit's products for each number of `rows`, and the machine's two rates."""

    rows: tuple[int, ...]
    attention: tuple[float, ...]
    """Q and O projections of executed tokens (scores not counted: they only add to what skipping saves)."""
    ffn: tuple[float, ...]
    forecaster: tuple[float, ...]
    slice: tuple[float, ...]
    """What approximated tokens get of the FFN itself, beside the forecast; nothing in models without."""
    bytes_per_second: float
    macs_per_second: float
    torch_macs_per_second: float
    """Of torch's own products of many rows, in the format of the model: higher where it has matrix instructions."""

    @property
    def balance(self) -> Balance:
        """The machine's rates in the engine's own products, for limits."""
        return Balance(self.bytes_per_second, self.macs_per_second)

    def per_row(self, seconds: Sequence[float]) -> Tensor:
        """float32 [last + 1]: the price of 0, 1, ... rows; none cost nothing."""
        marks, values = (0, *self.rows), (0.0, *seconds)
        out = torch.zeros(self.rows[-1] + 1)
        for (a, va), (b, vb) in zip(
            zip(marks, values, strict=True), zip(marks[1:], values[1:], strict=True), strict=False
        ):
            for n in range(a + 1, b + 1):
                out[n] = va + (vb - va) * (n - a) / (b - a)
        return out


def price_table(engine: Priced) -> PriceTable:
    """The table of an engine, from the cache or measured now (some seconds, on an idle machine)."""
    layer = engine.layers[0]
    shapes = [(part.type, part.n, part.k) for part in _parts(layer)]
    key = json.dumps([library_path().name, shapes, len(engine.layers), engine.threads, ROWS])
    path = cache_dir() / "native" / f"prices-{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"
    stored = read_record(path)
    if stored is not None:
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()}
        return PriceTable(**values)
    table = measure(engine)
    write_record(path, asdict(table))
    return table


def _parts(layer: Any) -> tuple[Any, ...]:
    ffn, attention = layer.ffn, layer.attention
    body = layer.q, layer.o, layer.gate_up, layer.down, layer.gate_up_slice, layer.down_slice
    return *body, attention.forecast_in, attention.forecast_out, ffn.forecast_in


def measure(engine: Priced) -> PriceTable:
    """Time the products of all layers in turns."""
    layers = list(engine.layers)
    groups = {
        "attention": [[layer.q, layer.o] for layer in layers],
        "ffn": [[layer.gate_up, layer.down] for layer in layers],
        "forecaster": [[layer.ffn.forecast_in, layer.ffn.forecast_out] for layer in layers],
        "slice": [[layer.gate_up_slice, layer.down_slice] for layer in layers],
    }
    widest = max(max(part.n, part.k) for part in _parts(layers[0]))
    x, y = torch.zeros(MANY, widest), torch.empty(MANY, widest)

    def seconds(name: str, rows: int) -> float:
        if not groups[name][0][0].n:
            return 0.0
        runs = []
        for _ in range(_REPEATS if rows < MANY else 3):
            start = time.perf_counter()
            for parts in groups[name]:
                for part in parts:
                    engine.library.ir_linear(
                        ctypes.byref(part),
                        ctypes.c_void_p(x.data_ptr()),
                        rows,
                        ctypes.c_void_p(y.data_ptr()),
                        engine.threads,
                    )
            runs.append((time.perf_counter() - start) / len(layers))
        return statistics.median(runs)

    seconds("ffn", 1)
    prices = {name: tuple(seconds(name, rows) for rows in ROWS) for name in groups}
    weights = sum(part.n * part.k for part in groups["ffn"][0])
    stored = weights * FORMATS[engine.weights].bytes
    return PriceTable(
        ROWS,
        attention=prices["attention"],
        ffn=prices["ffn"],
        forecaster=prices["forecaster"],
        slice=prices["slice"],
        bytes_per_second=stored / prices["ffn"][0],
        macs_per_second=weights * MANY / seconds("ffn", MANY),
        torch_macs_per_second=_torch_rate(groups["ffn"][0][0], engine.weights),
    )


def _torch_rate(layer: Any, weights: str) -> float:
    """MACs per second of torch's product of the shape of a packed layer with many rows."""
    dtype = FORMATS[weights].dtype or torch.float32
    x, w = torch.zeros(MANY, layer.k, dtype=dtype), torch.zeros(layer.n, layer.k, dtype=dtype)
    runs = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            runs.append(time.perf_counter() - start)
    return layer.n * layer.k * MANY / statistics.median(runs[1:])
