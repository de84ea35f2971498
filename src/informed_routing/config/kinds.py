"""Which kinds of router, rule, fallback and stage there are: the files of their packages, one kind each.

Settings are checked before anything is imported, so the names come from the file names: `low-rank` is `low_rank.py`.
"""

from __future__ import annotations

import functools
from importlib import import_module, resources
from typing import Any

_HOMES = {"stages": "informed_routing.training"}
_METHOD = "informed_routing.routing"


@functools.cache
def kinds_of(package: str) -> tuple[str, ...]:
    """Names of the kinds in a package, such as `routers`, in alphabetical order."""
    files = resources.files(_HOMES.get(package, _METHOD)) / package
    names = [path.name.removesuffix(".py") for path in files.iterdir() if path.name.endswith(".py")]
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_") and name != "base"))


def check_kind(package: str, name: str) -> str:
    """The name. Raises ValueError, which settings report, when there is no such kind."""
    known = kinds_of(package)
    if name not in known:
        raise ValueError(f"{name!r} is not one of {', '.join(known)}")
    return name


def kind(package: str, name: str) -> Any:
    """What the file of a kind calls KIND."""
    home = _HOMES.get(package, _METHOD)
    return import_module(f"{home}.{package}.{check_kind(package, name).replace('-', '_')}").KIND


@functools.cache
def stages_in_order() -> tuple[str, ...]:
    """Names of the stages of a fit as they run, which their files say: those import little."""
    return tuple(sorted(kinds_of("stages"), key=lambda name: kind("stages", name).place))
