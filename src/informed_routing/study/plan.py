"""From a grid to its cells, in the order in which they run."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputError
from .grid import Evaluation, Grid
from .identity import content_id, digest
from .stages import VERSION, Stage, Variant, last_stage

LONGEST_MODEL = 60
"""Bytes of a model's name in names of files."""


@dataclass(frozen=True)
class Cell:
    """One model to be made and judged: a row of a table at one sparsity."""

    model: str
    method: str
    label: str
    kind: str
    sparsity: float
    recovered: bool
    seed: int
    stage: Stage | None
    budget: str
    decision: str | None
    training: dict[str, Any] = field(hash=False)
    """Text and its form, for thresholds and the validation loss: data, dtype, sequence_length, calibration_tokens."""
    evaluation: Evaluation
    data_dir: str | None = None

    @cached_property
    def key(self) -> str:
        """A hash of everything that determines the result."""
        text = {**self.training, "data": [content_id(one) for one in self.training["data"]]}
        evaluation = self.evaluation.model_dump(mode="json", exclude={"batch_size", "native"})
        return digest(
            {
                "version": VERSION,
                "model": content_id(self.model),
                "stage": None if self.stage is None else self.stage.key,
                "sparsity": self.sparsity,
                "seed": self.seed,
                "budget": self.budget,
                "decision": self.decision,
                "text": text,
                "evaluation": evaluation,
                "tasks": None if self.data_dir is None else content_id(self.data_dir),
            }
        )

    @property
    def name(self) -> str:
        """What people call it, and what `--cells` matches."""
        model = "".join(c if c.isalnum() or c in "-." else "-" for c in self.model.rstrip("/").rsplit("/", 1)[-1])
        model = model.encode()[:LONGEST_MODEL].decode(errors="ignore")  # its key tells the cell apart
        parts = [model, self.method]
        if self.kind != "dense":
            parts.append(f"{100 * self.sparsity:g}")
        if self.recovered:
            parts.append("recovered")
        return "_".join([*parts, f"s{self.seed}"])

    @property
    def file(self) -> str:
        """Name of its record."""
        return f"{self.name}_{self.key[:12]}.json"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What has to be made for it, first one first."""
        return self.stage.chain if self.stage else ()

    @property
    def tokens(self) -> int:
        """Text that set its weights."""
        return self.stage.total_tokens if self.stage else 0

    def labels(self) -> dict[str, Any]:
        """How its record names it."""
        names = ("model", "method", "label", "kind", "sparsity", "recovered", "seed", "budget")
        return {"name": self.name, **{name: getattr(self, name) for name in names}}


def expand(grid: Grid, data_dir: str | Path | None = None) -> list[Cell]:
    """All cells of a grid, those that share stages beside each other.

    Raises InputError for settings that cannot work, and for methods that train on different amounts of text.
    """
    training = grid.training
    text = {name: getattr(training, name) for name in ("dtype", "sequence_length", "calibration_tokens")}
    text["data"] = list(training.data)
    cells = []
    for model in grid.models:
        for seed in grid.seeds:
            for name, method in grid.methods.items():
                wanted = (0.0,) if method.kind == "dense" else method.sparsities or grid.sparsities
                for sparsity in wanted:
                    for recovered in method.recovered:
                        variant = Variant(grid, method, model, sparsity, recovered, seed)
                        cells.append(
                            Cell(
                                model=model,
                                method=name,
                                label=method.label,
                                kind=method.kind,
                                sparsity=sparsity,
                                recovered=recovered,
                                seed=seed,
                                stage=last_stage(variant),
                                budget=grid.budget,
                                decision=method.decision,
                                training=text,
                                evaluation=grid.evaluation,
                                data_dir=None if data_dir is None else str(data_dir),
                            )
                        )
    if training.equal_tokens:
        check_equal_tokens(cells)
    return cells


def check_equal_tokens(cells: Sequence[Cell]) -> None:
    """Refuse cells of one model that train on different amounts of text, before and after recovery each.

    One step more or less is rounding. Cells that take no gradient step (the dense model, pruning alone) have nothing to
    be equal in. Raises InputError naming the cell that differs from most of the others.
    """
    groups: dict[tuple[str, bool], list[Cell]] = {}
    for cell in cells:
        if any(stage.kind != "prune" for stage in cell.stages):
            groups.setdefault((cell.model, cell.recovered), []).append(cell)
    for group in groups.values():
        usual = sorted(cell.tokens for cell in group)[len(group) // 2]
        for cell in group:
            if abs(cell.tokens - usual) >= max(step_tokens(cell), *(step_tokens(other) for other in group), 1):
                raise InputError(
                    f"cell {cell.name} trains on {cell.tokens:,} tokens, the others on {usual:,}",
                    "Leave its steps out, so that training.tokens sets them, or say `equal_tokens: false`",
                )


def step_tokens(cell: Cell) -> int:
    """Text of one step of a cell's last stage."""
    assert cell.stage is not None
    settings = cell.stage.settings
    if cell.stage.kind == "fit":
        config = settings["lora"] if settings["stages"] == ["lora"] else settings["route"]
    else:
        config = settings["lora"]
    return int(config["batch_size"] * config["gradient_accumulation"] * config["sequence_length"])


def matching(cells: Iterable[Cell], pattern: str | None) -> list[Cell]:
    """Cells whose name matches a pattern with `*` (or contains it). Raises InputError when none does."""
    found = list(cells)
    if pattern is None:
        return found
    chosen = [cell for cell in found if fnmatch.fnmatchcase(cell.name, pattern) or pattern in cell.name]
    if not chosen:
        raise InputError(f"no cell matches {pattern!r}", f"Names are such as {found[0].name}")
    return chosen
