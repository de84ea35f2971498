"""What only a few commands need is an extra of the package, and asked for by name before any work is done."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Literal

from .errors import InputError

Extra = Literal["data", "eval", "plots", "ray", "study", "whatif"]


class MissingExtra(InputError, ImportError):
    """A package that was not installed with this one."""


def need(*modules: str, extra: Extra, for_what: str) -> None:
    """Raise MissingExtra, which names the extra to install, if one of some modules is not installed.

    `for_what` begins the message and is a plural: "Parquet files".
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        wanted = f"{for_what} need {', '.join(missing)}, not installed here"
        newer = "with Python 3.11 or later: " if "arviz_stats" in missing and sys.version_info < (3, 11) else ""
        raise MissingExtra(wanted, f"Run: {newer}pip install 'informed-routing[{extra}]'")
