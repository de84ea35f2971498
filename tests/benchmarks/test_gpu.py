"""The GPU benchmark runs up to the launch without a GPU, and its estimate counts what the kernels move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu_masks import EVERY, for_batch, for_layers, pack, random_like, recorded, unpack
from gpu_roofline import DEVICES, SHAPES, estimate

ROOT = Path(__file__).resolve().parents[2]


def test_masks_survive_packing_and_fit_other_depths() -> None:
    gates = torch.rand(12, 64, generator=torch.Generator().manual_seed(0)) < 0.6
    assert torch.equal(unpack(pack(gates)), gates)
    fewer = for_layers(gates, 3)
    assert torch.equal(fewer[:2], gates[:2])
    assert torch.equal(fewer[4:], gates[10:])
    batch = for_batch(gates, 3, 60, 8)
    assert batch.shape == (12, 3, 8)
    assert torch.equal(batch[:, 0, 4:], gates[:, :4])  # the record repeats
    wide = torch.cat([gates] * 200, 1)
    shares = [one.view(-1, 2, one.shape[1]).float().mean((0, 2)) for one in (wide, random_like(wide))]
    torch.testing.assert_close(shares[0], shares[1], atol=0.01, rtol=0)


def test_the_roofline_knows_the_limits() -> None:
    shape, device = SHAPES["8B"], DEVICES[0]
    nothing = torch.ones(64, 1, 16, dtype=torch.bool)
    for decode in (True, False):
        same = estimate(shape, nothing, device, decode, 1024)
        assert same["limit_speedup"] == pytest.approx(1.0)  # a router is a cost: such calls execute whole
    # Batch-1 decode without FFNs and attentions is left with keys, values, routers, forecasts and the head.
    found = estimate(shape, ~nothing, device, True, 1024)
    d, rank = 4096, 128
    kept = 32 * (2 * 1024 * d + 4 * rank * d) + 128256 * d
    everything = 32 * (2 * d * d + 2 * 1024 * d + 3 * 14336 * d) + 128256 * d
    assert found["limit_speedup"] == pytest.approx(everything / kept, rel=0.02)


def test_the_benchmark_runs_up_to_the_launch(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: run the benchmark itself")
    out = tmp_path / "bench.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--shape", "tiny", "--turns", "1", "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, timeout=600)
    rows = json.loads(out.read_text())["rows"]
    engines = {row["engine"] for row in rows}
    assert {"dense", "routed, recorded", "routed, random", "static depth"} < engines
    routed = [row for row in rows if row["engine"] == "routed, recorded"]
    assert {row["budget"] for row in routed} == {"units", "macs"}
    for row in routed:
        gates = for_layers(recorded(row["budget"], row["target"]), 2)
        start, every, count = (row["tokens"], EVERY, 2) if row["phase"] == "decode" else (0, 1, row["tokens"])
        approximated = ~for_batch(gates, row["batch"], start, count, every)
        assert row["sparsity"]["attention"] == pytest.approx(float(approximated[0::2].float().mean()))
        assert row["sparsity"]["ffn"] == pytest.approx(float(approximated[1::2].float().mean()))
