"""Results printed elsewhere that stand beside those of a study, never for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .results import Entry


@dataclass(frozen=True)
class Printed:
    """One printed row: `values` by column."""

    method: str
    recovered: bool
    sparsity: float
    values: dict[str, float]


class Reference(Protocol):
    """A source of printed results, which knows what its own numbers say. `study/paper/entry.py` has one."""

    def rows(self, table: str, model: str) -> Sequence[Printed]:
        """The printed rows of a table; none for one that it lacks, or that is of another model."""

    def page(self, found: Mapping[str, Sequence[Entry]], model: str) -> str | None:
        """How a model's entries of each grid agree with it, as Markdown; None where nothing can be judged."""
