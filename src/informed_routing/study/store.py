"""The folder of a study.

cells/NAME_KEY.json     a finished cell, named by a hash of all that determines it
failed/NAME_KEY.json    why a cell failed; removed when it succeeds
stages/NAME-KEY/        what training left; stage.json in it says that it is complete
tasks/                  results of single tasks, so that a killed evaluation continues
speed/NAME_KEY.json     seconds of a cell, from the speed pass
GRID.md, .csv, .svg     the tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from ..files.atomic import remove_left_overs, write_json
from .plan import Cell
from .stages import Stage

State = Literal["done", "failed", "started", "waiting"]
Record = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """Where a study keeps what it has found."""

    root: Path

    def __post_init__(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--out {self.root} is a file", "Give a folder")

    # -- cells ------------------------------------------------------------------------------------------

    def record(self, cell: Cell) -> Record | None:
        """The finished record of a cell; None where it is missing, damaged or that of another cell."""
        found = _read(self.root / "cells" / cell.file)
        return found if found is not None and found.get("key") == cell.key else None

    def failure(self, cell: Cell) -> Record | None:
        """What a failed cell said; None for any other."""
        return _read(self.root / "failed" / cell.file)

    def speed(self, cell: Cell) -> Record | None:
        """A cell's record of the speed pass; None where there is none."""
        return _read(self.root / "speed" / cell.file)

    def keep(self, cell: Cell, record: Record) -> None:
        """Write a finished record; an earlier failure is forgotten."""
        write_json(self.root / "cells" / cell.file, record)
        (self.root / "failed" / cell.file).unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, failure: Record) -> None:
        """Write what a failed cell said."""
        write_json(self.root / "failed" / cell.file, failure)

    def keep_speed(self, cell: Cell, record: Record) -> None:
        """Write a record of the speed pass."""
        write_json(self.root / "speed" / cell.file, record)

    def state(self, cell: Cell) -> State:
        """How far a cell is."""
        if self.record(cell) is not None:
            return "done"
        if self.failure(cell) is not None:
            return "failed"
        return "started" if any(self.stage_folder(stage).is_dir() for stage in cell.stages) else "waiting"

    # -- stages -----------------------------------------------------------------------------------------

    def stage_folder(self, stage: Stage) -> Path:
        """Where a stage leaves its model."""
        return self.root / "stages" / stage.name

    def stage_report(self, stage: Stage) -> Record | None:
        """What a finished stage reported, None while it is not finished."""
        return _read(self.stage_folder(stage) / "stage.json")

    def finish_stage(self, stage: Stage, report: Record) -> None:
        """Write what a stage reports, which makes it finished."""
        write_json(self.stage_folder(stage) / "stage.json", report)

    @property
    def tasks(self) -> Path:
        """Where results of tasks are kept."""
        return self.root / "tasks"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second study out of the folder; a killed process leaves no lock behind."""
        from filelock import FileLock, Timeout

        lock = FileLock(str(self.root / ".lock"), timeout=0)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise InputError(f"another study is running in {self.root}", "Wait for it, or give another --out") from None
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--out {self.root} cannot be written: {reason}", "Give another folder") from None
        try:
            for folder in (self.root, *(self.root / name for name in ("cells", "failed", "speed", "stages", "tasks"))):
                remove_left_overs(folder, alone=True)
            yield
        finally:
            lock.release()


def stage_seconds(report: Record) -> float:
    """Seconds of a finished stage, over all of its parts."""
    return float(sum(report["seconds"].values()))


def _read(path: Path) -> Record | None:
    """A JSON mapping; None when it is missing or damaged (files here are whole or absent): it is made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
