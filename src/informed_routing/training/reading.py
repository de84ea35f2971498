"""What a stage reads, as data: a fit chooses its text by it, and a study counts its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.recipe import StageConfig

if TYPE_CHECKING:
    from ..assets import Split


@dataclass(frozen=True)
class Reading:
    """Rows of `length` tokens from one split of a recipe's text, and how many of them set weights."""

    split: Split
    length: int
    rows: int | None
    """How many rows are chosen, all where the text has fewer; None for all."""
    order: str
    """Decides, with the recipe's seed, in which order rows are taken; empty for that of the text."""
    counted: int
    """Rows that set weights, each as often as one process reads it; 0 where they only place a threshold or judge."""
    even: bool = False
    """As many rows of each text of the recipe as it has, not as many as its length is worth."""

    @property
    def tokens(self) -> int:
        """Text that sets weights, in a text that is long enough."""
        return self.counted * self.length

    @classmethod
    def once(cls, split: Split, length: int, tokens: int, order: str) -> Reading:
        """A choice of rows worth `tokens` tokens, one at least, that sets weights in a single reading."""
        rows = max(tokens // length, 1)
        return cls(split, length, rows, order, rows)

    @classmethod
    def aside(cls, split: Split, length: int, tokens: int, order: str = "", *, even: bool = False) -> Reading:
        """A choice of rows worth `tokens` tokens, one at least, that sets no weights."""
        return cls(split, length, max(tokens // length, 1), order, 0, even)

    @classmethod
    def steps(cls, config: StageConfig, order: str = "") -> Reading:
        """All rows of the training split, for the steps of a gradient stage."""
        return cls("train", config.sequence_length, None, order, config.steps * sequences_a_step(config))


def sequences_a_step(config: StageConfig) -> int:
    """Sequences that each process reads before the optimiser moves."""
    return config.batch_size * config.gradient_accumulation


def tokens_a_step(config: StageConfig) -> int:
    """Tokens that each process reads before the optimiser moves."""
    return sequences_a_step(config) * config.sequence_length
