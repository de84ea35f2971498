"""Run the cells of a study one after the other, or in parallel through Ray: the same records either way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..progress import NullProgress, Progress
from .cell import attempt
from .parallel import Finished, through_ray
from .plan import Cell
from .store import Store


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
    failed: dict[str, str] = {}
    with store.locked():
        waiting = [cell for cell in unique if store.record(cell) is None]
        finished = _one_by_one if ray is None else through_ray(ray)
        for cell, record in finished(waiting, store, device, progress) if waiting else ():
            if "error" in record:
                store.keep_failure(cell, record)
                failed[cell.name] = record["error"]
                progress.message(f"{cell.name} failed: {record['error']}")
            else:
                store.keep(cell, record)
                progress.message(f"{cell.name}: done")
    found = tuple(cell.name for cell in unique if cell not in waiting)
    return Outcome(tuple(cell.name for cell in waiting if cell.name not in failed), found, failed)


def _one_by_one(cells: Sequence[Cell], store: Store, device: str, progress: Progress) -> Iterator[Finished]:
    for number, cell in enumerate(cells, 1):
        progress.message(f"cell {number} of {len(cells)}: {cell.name}")
        yield cell, attempt(cell, store, device=device, progress=progress)
