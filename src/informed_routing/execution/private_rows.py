"""Private matrices (`models/private.py`) that are computed for executed tokens alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..models.runtime_classes import made_by
from ..routing.state import RoutingState


@functools.cache
def rows_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a linear layer that computes the rows that the state asks for; the others are zero."""
    base_forward: Any = base.forward

    @functools.wraps(base_forward)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = self.routing_state.forward.rows
        total = x.shape[:-1].numel()
        if asked is None or args or kwargs or asked.total != total:
            return base_forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
        index = asked.index
        some: Tensor = base_forward(self, x.reshape(total, -1).index_select(0, index))
        rows = some.new_zeros(total, some.shape[-1]).index_copy(0, index, some)
        return rows.view(*x.shape[:-1], -1)

    names = {"forward": forward, "__module__": __name__, **made_by(rows_class, base)}
    return type(base.__name__, (base,), names)


def make_private(mixer: nn.Module, names: tuple[str, ...], state: RoutingState) -> None:
    """Let the named linear layers of a mixer compute the rows that are asked for."""
    for name in names:
        linear: Any = mixer.get_submodule(name)
        linear.routing_state = state
        linear.__class__ = rows_class(type(linear))  # type: ignore[arg-type]


@contextmanager
def rows(state: RoutingState, index: Tensor, total: int) -> Iterator[None]:
    """Within, private matrices are computed for the tokens `index` int64 [n] of `total` alone."""
    state.forward.rows = Asked(index, total)
    try:
        yield
    finally:
        state.forward.rows = None


class Asked:
    """Tokens by flat index int64 [n] among all of a call."""

    def __init__(self, index: Tensor, total: int) -> None:
        self.index, self.total = index, total
