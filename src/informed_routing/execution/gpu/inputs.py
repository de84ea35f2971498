"""What one call's kernels read besides weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Inputs:
    """Everything that one call's kernels read besides weights; a recorded step keeps its own."""

    hidden: Tensor
    """[T, d]: embeddings; copied before it is changed."""
    cos: Tensor
    """[T, head_dim] float32."""
    sin: Tensor
    past: Tensor
    """[1] int32."""
    start: Tensor
    """[B] int32."""
    valid: Tensor | None
    """[T] int8."""
    limits: Tensor
    """[T] float32: the margin above which a row executes."""
    forced: Tensor | None
    """[units, T] bool."""
    batch: int
    whole: tuple[bool, bool] = (False, False)
    """Kinds of unit (attention, FFN) whose calls execute all rows because skipping some costs more."""

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return len(self.hidden) // self.batch
