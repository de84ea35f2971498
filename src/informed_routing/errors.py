"""One exception family. Each error says what was wrong and what to do about it."""

from __future__ import annotations

__all__ = ["InformedRoutingError", "InputError", "WorkError"]


class InformedRoutingError(Exception):
    """Base of all errors raised on purpose.

    `what` names the offending value, `remedy` the next step. `exit_code` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what.rstrip(".")
        self.remedy = remedy
        super().__init__(what, remedy)

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}".strip()


class InputError(InformedRoutingError, ValueError):
    """The user gave something that cannot work (exit code 2)."""

    exit_code = 2


class WorkError(InformedRoutingError, RuntimeError):
    """The work itself failed: disk, network, numbers (exit code 1)."""

    exit_code = 1
