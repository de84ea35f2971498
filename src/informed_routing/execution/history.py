"""The history of a text beside its cache: where a forward with a held rule finds it, and leaves it.

A cache that has one changes its class, so that whoever reorders, repeats or shortens it does the same to the history.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..models.runtime_classes import made_by
from ..routing.history import History


def history_of(cache: Any, units: int, batch: int) -> History:
    """The history of the texts in a cache, to be added to; an empty one where they begin.

    Raises InputError where a text has begun without a held rule, or its cache has been changed in other ways since.
    """
    past = 0 if cache is None else int(cache.get_seq_length())
    if not past:
        return History.empty(units, batch)
    found: History | None = getattr(cache, "routing_history", None)
    if found is None or found.length != past or found.approximated.shape != (units, batch):
        raise InputError(
            "a held rule does not know what was approximated of the text in this cache",
            "Begin it with the rule and a fresh cache, and not assisted; or use decision='threshold'",
        )
    return History(found.approximated.contiguous().clone(), past)


def keep_history(cache: Any, history: History, length: int) -> None:
    """Leave a history, to which a forward of `length` places was added, beside the cache that got their keys."""
    if cache is None:
        return
    history.length += length
    if not isinstance(cache, _Followed):
        kind: Any = type(cache)
        cache.__class__ = _followed_class(kind)
    cache.routing_history = history


def class_of(cache: Any) -> type:
    """The class that a cache had before there was a history beside it."""
    kind = type(cache)
    return kind.__mro__[2] if issubclass(kind, _Followed) else kind


class _Followed:
    """What a cache does to the history of its texts."""

    routing_history: History | None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change(lambda counts: counts[:, beam_idx.cpu()])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change(lambda counts: counts[:, indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change(lambda counts: counts.repeat_interleave(repeats, dim=1))

    def crop(self, tokens_to_remove: int) -> None:
        """Counts do not say of which tokens they are: after this the history is no longer known."""
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.routing_history = None

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.routing_history = None

    def _change(self, change: Any) -> None:
        if self.routing_history is not None:
            self.routing_history.approximated = change(self.routing_history.approximated)


@functools.cache
def _followed_class(base: type) -> type:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, **made_by(_followed_class, base)}
    return type(base.__name__, (_Followed, base), names)
