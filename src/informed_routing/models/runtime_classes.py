"""Classes that are made at run time from a base model's own, and how their instances are pickled and copied.

Pickle finds a class by its name in a module, where these are not. So an instance says which function made its class,
and from which class; both have names. This package itself reads no pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Maker = Callable[[type], type]


def made_by(maker: Maker, base: type) -> dict[str, Any]:
    """What a class that `maker(base)` makes has in its namespace, so that its instances can be pickled."""
    return {"_made_by": (maker, base), "__reduce_ex__": _reduce}


def _reduce(self: Any, protocol: Any) -> Any:
    makers: list[Maker] = []
    base = type(self)
    while "_made_by" in vars(base):
        maker, base = vars(base)["_made_by"]
        makers.append(maker)
    if not makers:  # somebody else's class on top of ours: its own affair
        return object.__reduce_ex__(self, protocol)
    state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)  # objects have it from Python 3.11 on
    return new_instance, (base, tuple(reversed(makers))), state


def new_instance(base: Any, makers: tuple[Maker, ...]) -> Any:
    """An instance without content of the class that the makers make of `base`, one after the other."""
    for maker in makers:
        base = maker(base)
    return base.__new__(base)
