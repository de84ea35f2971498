"""The one door to the paper's room: what the `study` command shows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...progress import Progress
from ..reference import Printed
from ..report import Report, write_table
from ..results import Entry


class Paper:
    """The paper's numbers and claims, as a study's reference."""

    def rows(self, table: str, model: str) -> Sequence[Printed]:
        """The rows that the paper prints for a model; none for a table or a model that it lacks."""
        from .printed import printed

        return printed(table, model)

    def page(self, found: Mapping[str, Sequence[Entry]], model: str) -> str | None:
        """Which of its claims hold on a model, as Markdown; None where the grids judge none."""
        from .agreement import agreement

        return agreement(found, model)


def write_shapes(out: Path) -> Report:
    """Parameters and MACs on the paper's models, without weights: shapes.md and .csv."""
    from .shapes import shape_table

    report = Report([], {}, [])
    write_table(shape_table(), out, report)
    return report


def write_importance_sampling(out: Path, progress: Progress) -> dict[str, int]:
    """Run all experiments with known truth (minutes on one core), write them; returns the number of rows of each."""
    from .importance_sampling import run

    return {name: len(rows) for name, rows in run(out, progress=progress).items()}
