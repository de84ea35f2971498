"""A run that is interrupted at a given place."""

from __future__ import annotations

from informed_routing.progress import NullProgress


class StopAt(NullProgress):
    """Raises KeyboardInterrupt at one step of one stage, as Ctrl-C would."""

    def __init__(self, stage: str, step: int) -> None:
        self.wanted, self.step, self.name = stage, step, ""

    def stage(self, name: str, total: int) -> None:
        self.name = name

    def advance(self, step: int, **metrics: float | str) -> None:
        if self.name == self.wanted and step >= self.step:
            raise KeyboardInterrupt
