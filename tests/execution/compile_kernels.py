"""Compiles every kernel for NVIDIA GPUs without having one, and prints what each needs as JSON lines.

    python -m tests.execution.compile_kernels [80 90 ...]      # compute capabilities

The launches of the library run on tensors of the CPU, with a driver that names the target and compiles only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from informed_routing.execution.kernels import attention, matmul, route, tiles
from informed_routing.execution.kernels.attention import Keys, Rotation
from informed_routing.execution.kernels.matrices import ForecasterWeights, Matrix
from informed_routing.execution.kernels.route import RouterWeights, Selection


class CompileOnly:
    """A driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Compile all kernels as an 8B Llama's layer would call them, each matmul with all of its tile shapes."""
    driver.set_active(CompileOnly(capability))
    found: list[dict[str, Any]] = []

    def compile_only(self: Any, grid: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> None:
            compiled = self.run(*args, grid=grid, warmup=True, **kwargs)
            shape = {k: v for k, v in kwargs.items() if k in ("BM", "BN", "BK", "num_warps", "num_stages")}
            found.append({"kernel": self.__name__, "sm": capability, **shape, **needs(compiled)})

        return call

    JITFunction.__getitem__ = compile_only  # type: ignore[method-assign]
    empty = torch.empty
    d, ff, heads, kv_heads, head_dim, rank = 256, 512, 8, 2, 128, 112
    weights = {"q": (heads * head_dim, d), "kv": (kv_heads * head_dim, d), "up": (ff, d), "down": (d, ff)}
    plain = {name: Matrix(empty(shape, dtype=dtype)) for name, shape in weights.items()}
    scaled = {
        kind: {name: Matrix(empty(shape, dtype=kind), None, empty(shape[0])) for name, shape in weights.items()}
        for kind in (torch.int8, torch.float8_e4m3fn)
        if kind == torch.int8 or capability >= 89
    }
    forecaster = ForecasterWeights(
        Matrix(empty(rank, d, dtype=dtype), empty(rank)), Matrix(empty(d, rank, dtype=dtype), empty(d)), False
    )
    norm, bias = empty(d, dtype=dtype), empty(1)
    linear = RouterWeights(None, None, empty(d), bias, False, False)
    mlp = RouterWeights(empty(832, d, dtype=dtype), empty(832), empty(832), bias, True, False)
    for rows in (1, 8, 4096):
        hidden, chosen = empty(rows, d, dtype=dtype), Selection.empty(1, rows, torch.device("cpu"))
        for router in (linear, mlp):
            route.route(hidden, norm, 1e-5, router, empty(rows), None, 1)
        for shape in tiles.candidates(dtype, rows):
            for w in (plain, *scaled.values()):
                z = empty(rows, rank, dtype=dtype)
                matmul.project(hidden, chosen, w["q"], w["kv"], w["kv"], forecaster, shape)
                matmul.gated(hidden, chosen, w["up"], w["up"], False, forecaster, shape)
                matmul.finish(hidden, empty(rows, ff, dtype=dtype), chosen, w["down"], z, forecaster, shape)
    for batch, length, window in ((1, 4096, 0), (1, 256, 0), (1, 4096, 512), (8, 1, 0)):
        total = batch * length
        part = [empty(batch, kv_heads, 8192, head_dim, dtype=dtype) for _ in range(2)]
        cache = Keys(part[0], part[1], empty(1, dtype=torch.int32), empty(batch, dtype=torch.int32), window)
        rotation = Rotation(empty(total, head_dim), empty(total, head_dim))
        key = empty(total, kv_heads * head_dim, dtype=dtype)
        attention.store(key, key, rotation, cache)
        q = empty(total, heads * head_dim, dtype=dtype)
        attention.attend(q, Selection.all(batch, length, torch.device("cpu")), rotation, cache, 0.1)
    return found


def needs(compiled: Any) -> dict[str, int]:
    """Shared memory, registers and spilled bytes of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
        ).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "shared": compiled.metadata.shared,
        "registers": int(usage.get("REG", 0)),
        "spilled": int(usage.get("STACK", 0)) + int(usage.get("LOCAL", 0)),
    }


if __name__ == "__main__":
    for one in map(int, sys.argv[1:] or ("80", "90")):
        for row in compile_all(one):
            print(json.dumps(row), flush=True)
