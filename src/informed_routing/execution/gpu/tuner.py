"""Times the tile shapes of an engine's matmuls, once for each power of two of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...assets.cache import cache_dir
from ..kernels import matmul, tuning
from ..kernels.route import Selection

FILE = "kernel-tiles.json"
REPEATS = 5


def tune_for(engine: Any, rows: int) -> None:
    """Make sure that tiles are chosen for calls of so many rows. Does nothing on devices that are not tuned for."""
    size = tuning.bucket(rows)
    done = engine.__dict__.setdefault("_tuned", set())
    if size in done or engine.device.type != "cuda" or engine.dtype == torch.float32:
        return
    if torch.cuda.is_current_stream_capturing():
        return
    done.add(size)
    path = cache_dir() / FILE
    tuning.recall(path)
    if tune(engine, size, seconds):
        tuning.remember(path)


def tune(engine: Any, rows: int, time: Callable[[Callable[[], Any]], float]) -> int:
    """Choose tiles for all matmuls of a layer with `rows` rows, all executing; returns how many were not known."""
    attention, ffn = engine.layers[0]
    d = attention.query.weight.shape[1]
    make = {"dtype": engine.dtype, "device": engine.device}
    x, everyone = torch.randn(rows, d, **make), Selection.all(1, rows, engine.device)
    known = len(tuning._chosen)
    for name, unit, width in (("project", attention, attention.query.rows), ("gated", ffn, ffn.gate.rows)):

        def launch(shape: tuning.Tiles, name: str = name, unit: Any = unit) -> None:
            if name == "project":
                matmul.project(x, everyone, unit.query, unit.key, unit.value, unit.forecaster, shape)
            else:
                matmul.gated(x, everyone, unit.gate, unit.up, unit.gelu, unit.forecaster, shape)

        tuning.tune(name, x, width, d, launch, time)
    for unit, matrix in ((attention, attention.out), (ffn, ffn.down)):
        compact = torch.randn(rows, matrix.weight.shape[1], **make)
        z = None if unit.forecaster is None else x.new_zeros(rows, unit.forecaster.inner.rows)

        def launch_finish(
            shape: tuning.Tiles, compact: Any = compact, unit: Any = unit, matrix: Any = matrix, z: Any = z
        ) -> None:
            matmul.finish(x, compact, everyone, matrix, z, unit.forecaster, shape)

        tuning.tune("finish", x, d, compact.shape[1], launch_finish, time)
    return len(tuning._chosen) - known


def seconds(launch: Callable[[], Any]) -> float:
    """Least time of a launch on the current CUDA device, compiled before."""
    launch()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)
