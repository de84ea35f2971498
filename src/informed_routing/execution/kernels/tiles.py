"""Tile shapes of the matmul kernels: a small set, timed once per device and shape, remembered on disk.

Shapes depend on the number of rows by its power of two and never on how many of them execute, so that a changing
selection changes no kernel. Nothing is timed while a CUDA graph is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ...assets.cache import read_record, write_record


@dataclass(frozen=True)
class Tiles:
    """One tile's rows, columns and depth, and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3

    @property
    def launch(self) -> dict[str, int]:
        """Arguments of a kernel's launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


FEW = (
    Tiles(16, 16, 256, 4, 4),
    Tiles(16, 32, 256, 4, 4),
    Tiles(16, 32, 128, 4, 5),
    Tiles(16, 64, 128, 4, 5),
)
"""Decode: rows are padded to 16, many small programs keep all of the memory busy."""

MANY = (
    Tiles(128, 128, 64, 8, 3),
    Tiles(128, 128, 64, 4, 4),
    Tiles(64, 128, 64, 4, 4),
    Tiles(128, 64, 64, 4, 4),
    Tiles(128, 256, 64, 8, 3),
)
EXACT = Tiles(32, 32, 32, 4, 2)
"""float32: no tensor cores, and registers for less."""


def bucket(total: int) -> int:
    """The power of two that a number of rows is tuned as."""
    return max(triton.next_power_of_2(total), 16)


def candidates(dtype: torch.dtype, total: int) -> tuple[Tiles, ...]:
    """Tile shapes worth timing for a number of rows."""
    if dtype == torch.float32:
        return (EXACT,)
    return FEW if total <= 32 else MANY


def _key(kernel: str, x: Tensor, n: int, k: int) -> str:
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else "cpu"
    return f"{device}|triton {triton.__version__}|{kernel}|{x.dtype}|{bucket(len(x))}|{n}|{k}"


class TileBook:
    """The tiles that were timed, of one engine."""

    def __init__(self) -> None:
        self._chosen: dict[str, Tiles] = {}

    def __len__(self) -> int:
        return len(self._chosen)

    def find(self, kernel: str, x: Tensor, n: int, k: int) -> Tiles:
        """The tiles for a kernel on rows like x [T, ...] with [n, k] weights: timed ones if any, else the first."""
        return self._chosen.get(_key(kernel, x, n, k), candidates(x.dtype, len(x))[0])

    def tune(
        self, kernel: str, x: Tensor, n: int, k: int, launch: Callable[[Tiles], Any], time: Callable[..., float]
    ) -> Tiles:
        """Time `launch` with each candidate and note the fastest; `time` maps a callable to seconds.

        Candidates that do not fit the device (shared memory, registers) are left out.
        """
        key = _key(kernel, x, n, k)
        if key in self._chosen:
            return self._chosen[key]
        times: dict[Tiles, float] = {}
        for shape in candidates(x.dtype, len(x)):
            try:
                times[shape] = time(lambda shape=shape: launch(shape))
            except triton.runtime.errors.OutOfResources:
                continue
        self._chosen[key] = min(times, key=times.__getitem__)
        return self._chosen[key]

    def remember(self, path: Path) -> None:
        """Write what was timed to `path`, with what is there already."""
        write_record(path, {**_read(path), **{key: asdict(shape) for key, shape in self._chosen.items()}})

    def recall(self, path: Path) -> None:
        """Take over what an earlier process timed."""
        for key, shape in _read(path).items():
            self._chosen.setdefault(key, Tiles(**shape))


def pick(given: Tiles | TileBook | None, kernel: str, x: Tensor, n: int, k: int) -> Tiles:
    """The tiles that a launch uses: those given, or of a book, or where there is none the first candidate."""
    if isinstance(given, Tiles):
        return given
    return candidates(x.dtype, len(x))[0] if given is None else given.find(kernel, x, n, k)


def _read(path: Path) -> dict[str, Any]:
    return read_record(path) or {}
