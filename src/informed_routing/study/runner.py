"""Run the cells of a study one after the other, or in parallel through Ray: the same records either way."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError, WorkError
from ..progress import NullProgress, Progress
from .build import ensure
from .cell import failure, run_cell
from .plan import Cell
from .stages import Stage
from .store import Record, Store

LOCAL = "local"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: names of cells made now, found finished, and failed with their errors."""

    made: tuple[str, ...]
    found: tuple[str, ...]
    failed: dict[str, str]


def run(
    cells: Sequence[Cell],
    store: Store,
    *,
    device: str = "cpu",
    ray: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Make the records of all cells that have none. A cell that fails is kept as failed, and the others go on.

    `ray` is None for one cell after the other, `local` for workers on this machine (two or more, sharing its cores), or
    the address of a cluster, whose machines must all see the store's folder under the same path. Each worker has as
    many threads as torch is set to use here. Raises InputError when Ray is missing or the folder is in use.
    """
    progress = progress or NullProgress()
    unique = list({cell.key: cell for cell in cells}.values())
    with store.locked():
        waiting = [cell for cell in unique if store.record(cell) is None]
        found = tuple(cell.name for cell in unique if cell not in waiting)
        work = _one_by_one if ray is None else _through_ray(ray)
        failed = work(waiting, store, device, progress) if waiting else {}
    made = tuple(cell.name for cell in waiting if cell.name not in failed)
    return Outcome(made, found, failed)


def _one_by_one(cells: Sequence[Cell], store: Store, device: str, progress: Progress) -> dict[str, str]:
    failed: dict[str, str] = {}
    for number, cell in enumerate(cells, 1):
        progress.message(f"cell {number} of {len(cells)}: {cell.name}")
        try:
            store.keep(cell, run_cell(cell, store, device=device, progress=progress))
        except Exception as error:  # whatever went wrong, the other cells are worth having
            _failed(cell, store, failure(cell, error), failed, progress)
    return failed


def _failed(cell: Cell, store: Store, record: Record, failed: dict[str, str], progress: Progress) -> None:
    store.keep_failure(cell, record)
    failed[cell.name] = record["error"]
    progress.message(f"{cell.name} failed: {record['error']}")


# -- in parallel -------------------------------------------------------------------------------------------


def _through_ray(address: str) -> Callable[[Sequence[Cell], Store, str, Progress], dict[str, str]]:
    if importlib.util.find_spec("ray") is None:
        raise InputError("Ray is not installed", 'Run: pip install "informed-routing[ray]", or leave out --ray')

    def work(cells: Sequence[Cell], store: Store, device: str, progress: Progress) -> dict[str, str]:
        return _parallel(cells, Store(store.root.resolve()), device, address, progress)

    return work


def _parallel(cells: Sequence[Cell], store: Store, device: str, address: str, progress: Progress) -> dict[str, str]:
    """Stages and cells as a graph of tasks: a stage that several cells need is one task that all of them wait for."""
    import ray

    threads = torch.get_num_threads()
    _connect(ray, address, threads)
    options = {"num_cpus": threads, "num_gpus": int(device.startswith("cuda")), "max_retries": 0}
    make = ray.remote(**options)(_make_stage)
    finish = ray.remote(**options)(_make_cell)
    stages: dict[str, Any] = {}
    waiting: dict[Any, Cell] = {}
    failed: dict[str, str] = {}
    try:
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
                error, record = ray.get(ready[0])
            except Exception as lost:  # the worker died: out of memory, or its machine is gone
                error, record = True, failure(cell, lost)
            if error:
                _failed(cell, store, record, failed, progress)
            else:
                store.keep(cell, record)
                progress.message(f"{cell.name} done")
            progress.advance(len(cells) - len(waiting))
    finally:
        ray.shutdown()
    return failed


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


def _make_cell(
    cell: Cell, store: Store, device: str, threads: int, before: BaseException | None
) -> tuple[bool, Record]:
    """In a worker: (whether it failed, the record or the failure)."""
    torch.set_num_threads(threads)
    if before is not None:
        return True, failure(cell, before)
    try:
        return False, run_cell(cell, store, device=device, progress=NullProgress())
    except Exception as error:
        return True, failure(cell, error)


def _portable(error: Exception) -> Exception:
    """An error that another process can read: its own class where that survives pickling, else a WorkError."""
    if isinstance(error, (InputError, WorkError)):
        return type(error)(error.what, error.remedy)
    return WorkError(f"{type(error).__name__}: {error}", "See the failed cell's file")
