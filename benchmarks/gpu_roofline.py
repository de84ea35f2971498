"""What the GPU kernels could reach: for each kernel the bytes it must move and the FLOP it must do, on named devices.

    python benchmarks/gpu_roofline.py          # writes docs/data/gpu/roofline.json; needs no GPU

A kernel's least time is the longer of bytes / bandwidth and FLOP / peak; every operand is moved once. What is counted
are the recorded decisions of the real embedded model (gpu_masks.py) on the shapes of Llama 3.2 1B and 3.1 8B in
bfloat16, forecasters of rank 128 and linear routers. It is an upper bound of speed-ups, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_masks import EVERY, TARGETS, for_batch, for_layers, random_like, recorded
from torch import Tensor

from informed_routing.files.atomic import write_json

ROOT = Path(__file__).resolve().parent.parent
ROOFLINE = ROOT / "docs/data/gpu/roofline.json"
RANK = 128
BYTES = 2  # bfloat16
STEPS = 64  # decode steps that are averaged
CONTEXT = 1024


@dataclass(frozen=True)
class Device:
    """Data-sheet rates of memory and of dense bfloat16 tensor cores."""

    name: str
    bytes_per_second: float
    flops_per_second: float


DEVICES = (Device("H100 SXM", 3.35e12, 989e12), Device("A100 80 GB SXM", 2.04e12, 312e12))


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    layers: int
    d: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim


SHAPES = {
    "1B": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
}
PREFILL, DECODE = (1024, 8192, 32768), (1, 8, 32)


@dataclass(frozen=True)
class Load:
    """What one kernel moves and computes in one forward, for each layer [layers] (and step): tensors of any shape."""

    bytes: Tensor
    flops: Tensor

    def seconds(self, device: Device) -> float:
        """Summed over layers, averaged over steps."""
        each = torch.maximum(self.bytes / device.bytes_per_second, self.flops / device.flops_per_second)
        return float(each.sum(0).mean())


@dataclass(frozen=True)
class Selected:
    """Executed rows and keys they read, of one kind of unit in all layers: [layers] or [layers, steps]."""

    rows: Tensor
    keys: Tensor

    @classmethod
    def of(cls, gates: Tensor, contexts: Tensor) -> Selected:
        """From gates [layers, ..., tokens] and the keys visible to each token."""
        return cls(gates.sum(-1).double(), (gates * contexts).sum(-1).double())


def unit_loads(
    shape: Shape, kind: str, total: int, chosen: Selected, keys_read: Tensor, routed: bool
) -> dict[str, Load]:
    """Loads of one unit kind's kernels for `total` rows; `keys_read` rows of K and V come from memory."""
    d, rows = shape.d, chosen.rows
    some, skipped = (rows > 0).double(), (total - rows) * routed
    forecast = (skipped > 0).double()
    nothing = torch.zeros_like(rows)

    def load(weights: Tensor | float, activations: Tensor | float, macs: Tensor | float) -> Load:
        return Load(nothing + BYTES * (weights + activations), nothing + 2 * macs)

    bottleneck = {"weights": forecast * RANK * d, "activations": skipped * RANK, "macs": skipped * RANK * d}
    found = {"route": load(d + 2 * d * routed, 2 * total * d, total * d * routed)}
    if kind == "attention":
        found["project"] = load(
            some * shape.q * d + 2 * shape.kv * d + bottleneck["weights"],
            total * d + rows * shape.q + 2 * total * shape.kv + bottleneck["activations"],
            rows * shape.q * d + 2 * total * shape.kv * d + bottleneck["macs"],
        )
        found["store"] = load(0.0, 4 * total * shape.kv, 0.0)
        found["attend"] = load(0.0, 2 * rows * shape.q + 2 * keys_read * shape.kv, 2 * chosen.keys * shape.q)
        width, matrix = shape.q, shape.q * d
    else:
        found["gated"] = load(
            some * 2 * shape.ffn * d + bottleneck["weights"],
            total * d + rows * shape.ffn + bottleneck["activations"],
            rows * 2 * shape.ffn * d + bottleneck["macs"],
        )
        width, matrix = shape.ffn, shape.ffn * d
    found["finish"] = load(
        some * matrix + forecast * RANK * d,
        rows * width + skipped * RANK + 2 * (total if routed else rows) * d,
        rows * matrix + skipped * RANK * d,
    )
    return {f"{kind} {name}": value for name, value in found.items()}


def forward_loads(shape: Shape, gates: Tensor, contexts: Tensor, decode: bool, routed: bool) -> dict[str, Load]:
    """All kernels of a forward under gates [2 * layers, batch, tokens]; the LM head makes one row a sequence."""
    batch, length = gates.shape[1:]
    by_step = gates.permute(0, 2, 1) if decode else gates.flatten(1)
    seen = contexts if decode else contexts.repeat(batch)
    total = batch if decode else batch * length
    found: dict[str, Load] = {}
    for offset, kind in enumerate(("attention", "ffn")):
        part = by_step[offset::2]
        chosen = Selected.of(part, seen[:, None] if decode else seen)
        keys = chosen.keys if decode else torch.full_like(chosen.rows, float(total))
        found |= unit_loads(shape, kind, total, chosen, keys, routed)
    head = torch.full((1,), float(shape.vocabulary * shape.d))
    found["head"] = Load(BYTES * (head + batch * shape.vocabulary), 2 * batch * head)
    return found


def estimate(shape: Shape, gates: Tensor, device: Device, decode: bool, start: int) -> dict[str, Any]:
    """Least seconds dense and routed, kernel by kernel; a kind of unit whose routing costs more executes whole."""
    contexts = torch.arange(gates.shape[2]).double() * (not decode) + 1 + start
    dense = forward_loads(shape, torch.ones_like(gates), contexts, decode, routed=False)
    routed = forward_loads(shape, gates, contexts, decode, routed=True)
    before, after = ({name: load.seconds(device) for name, load in loads.items()} for loads in (dense, routed))
    whole = []
    for kind in ("attention", "ffn"):
        names = [name for name in before if name.startswith(kind)]
        if sum(after[name] for name in names) > sum(before[name] for name in names):
            after |= {name: before[name] for name in names}
            whole.append(kind)
    return {
        "dense_seconds": short(sum(before.values())),
        "routed_seconds": short(sum(after.values())),
        "limit_speedup": short(sum(before.values()) / sum(after.values())),
        "executed_whole": whole,
        "kernels": {
            name: {
                "dense_us": short(1e6 * before[name]),
                "routed_us": short(1e6 * after[name]),
                "gigabytes": short(float(routed[name].bytes.sum(0).mean()) / 1e9),
                "teraflop": short(float(routed[name].flops.sum(0).mean()) / 1e12),
            }
            for name in before
        },
    }


def short(value: float) -> float:
    """Four digits: an estimate has no more."""
    return float(f"{value:.4g}")


def cases(shape: Shape, budget: str, target: float) -> list[tuple[str, Tensor, bool, int]]:
    """(name, gates, decode, keys before) of every measured case under the recorded decisions, and random ones."""
    gates = for_layers(recorded(budget, target), shape.layers)
    found = []
    for kind, some in (("recorded", gates), ("random", random_like(gates))):
        found += [(f"prefill {n}, {kind}", for_batch(some, 1, 0, n), False, 0) for n in PREFILL]
        found += [(f"decode {b}, {kind}", for_batch(some, b, CONTEXT, STEPS, EVERY), True, CONTEXT) for b in DECODE]
    return found


def main() -> None:
    rows = []
    for device in DEVICES:
        for name, shape in SHAPES.items():
            for budget in ("units", "macs"):
                for target in TARGETS:
                    for case, gates, decode, start in cases(shape, budget, target):
                        shares = 1 - gates.view(-1, 2, *gates.shape[1:]).float().mean((0, 2, 3))
                        rows.append(
                            {
                                "device": device.name,
                                "shape": name,
                                "case": case,
                                "budget": budget,
                                "target": target,
                                "units": short(float(shares.mean())),
                                "attention": short(float(shares[0])),
                                "ffn": short(float(shares[1])),
                                **estimate(shape, gates, device, decode, start),
                            }
                        )
    write_json(ROOFLINE, {"rank": RANK, "context": CONTEXT, "devices": [vars(d) for d in DEVICES], "rows": rows})
    print(f"wrote {ROOFLINE.relative_to(ROOT)}: {len(rows)} rows")


if __name__ == "__main__":
    main()
