"""How long-running work reports on itself. Holds no torch, so that the command line can import it cheaply."""

from __future__ import annotations

from typing import Protocol

__all__ = ["NullProgress", "Progress"]


class Progress(Protocol):
    """What the library calls; `informed_routing.cli.progress` shows it on stderr.

    One stage at a time: `stage` opens it (and closes the one before), `advance` says how far it is, `done`
    closes the last one. The time left is worked out by the implementation.
    """

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps (0 when the number is not known)."""

    def advance(self, step: int, **metrics: float | str) -> None:
        """`step` steps of the stage are finished; `metrics` are shown beside it (loss, sparsity, ...)."""

    def message(self, text: str) -> None:
        """One line worth keeping."""

    def done(self) -> None:
        """The work is over, well or not."""


class NullProgress:
    """Shows nothing: the default of every library function."""

    def stage(self, name: str, total: int) -> None:
        pass

    def advance(self, step: int, **metrics: float | str) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def done(self) -> None:
        pass
