"""Cells and their stages in parallel, as a graph of Ray tasks. Ray is imported only when it is used."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..errors import InputError, WorkError
from ..extras import need
from ..progress import NullProgress, Progress
from .build import ensure
from .cell import attempt, failure
from .plan import Cell
from .stages import Stage
from .store import Record, Store

LOCAL = "local"

Finished = tuple[Cell, Record]
"""A cell with its record, or with that of its failure."""

Work = Callable[[Sequence[Cell], Store, str, Progress], Iterator[Finished]]


def through_ray(address: str) -> Work:
    """Work on this machine (`local`) or on the cluster at an address. Raises MissingExtra when Ray is not installed."""
    need("ray", extra="ray", for_what="Cells in parallel")

    def work(cells: Sequence[Cell], store: Store, device: str, progress: Progress) -> Iterator[Finished]:
        ray: Any = importlib.import_module("ray")
        threads = torch.get_num_threads()
        _connect(ray, address, threads)
        try:
            yield from _run(ray, cells, Store(store.root.resolve()), device, threads, progress)
        finally:
            ray.shutdown()

    return work


def _run(
    ray: Any, cells: Sequence[Cell], store: Store, device: str, threads: int, progress: Progress
) -> Iterator[Finished]:
    """A stage that several cells need is one task, which all of them wait for."""
    remote = ray.remote(num_cpus=threads, num_gpus=int(device.startswith("cuda")), max_retries=0)
    make, finish = remote(_make_stage), remote(_make_cell)
    stages: dict[str, Any] = {}
    waiting: dict[Any, Cell] = {}
    for cell in cells:
        before = None
        for stage in cell.stages:
            if stage.key not in stages:
                stages[stage.key] = make.remote(stage, store, device, threads, before)
            before = stages[stage.key]
        waiting[finish.remote(cell, store, device, threads, before)] = cell
    progress.stage("cells", len(cells))
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        cell = waiting.pop(ready[0])
        try:
            yield cell, ray.get(ready[0])
        except ray.exceptions.RayError as lost:  # the worker died: out of memory, or its machine is gone
            yield cell, failure(cell, lost)
        progress.advance(len(cells) - len(waiting))


def _connect(ray: Any, address: str, threads: int) -> None:
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    try:
        if address == LOCAL:
            # Two workers at least: on two cores, two with one thread each do more than one with two.
            ray.init(num_cpus=max(os.cpu_count() or 1, 2 * threads), **quiet)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise WorkError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}", "Check the address") from None


def _make_stage(stage: Stage, store: Store, device: str, threads: int, before: BaseException | None) -> Any:
    """In a worker: make a stage unless the one before it failed. Returns the error, which is also its children's."""
    if before is not None:
        return before
    torch.set_num_threads(threads)
    try:
        ensure(stage, store, device=device, progress=NullProgress())
    except Exception as error:
        return _portable(error)
    return None


def _make_cell(cell: Cell, store: Store, device: str, threads: int, before: BaseException | None) -> Record:
    """In a worker: the record of a cell or of its failure."""
    torch.set_num_threads(threads)
    if before is not None:
        return failure(cell, before)
    return attempt(cell, store, device=device, progress=NullProgress())


def _portable(error: Exception) -> Exception:
    """An error that another process can read: its own class where that survives pickling, else a WorkError."""
    if isinstance(error, (InputError, WorkError)):
        return type(error)(error.what, error.remedy)
    return WorkError(f"{type(error).__name__}: {error}", "See the failed cell's file")
