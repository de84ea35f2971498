"""KV caches of the native engines: a transformers cache whose layers keep keys as an engine reads them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import InputError
from ..models.calls import length_after_crop
from .history import class_of

Layer = TypeVar("Layer", bound="EngineLayer")


class EngineLayer(DynamicLayer):
    """Keys and values with room for more; the first `length` are real."""

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    @abstractmethod
    def take(self, keys: Tensor, values: Tensor) -> None:
        """Fill an empty layer with keys and values [B, heads, S, head_dim] as transformers keeps them."""

    @abstractmethod
    def plain(self) -> DynamicLayer:
        """The same content as transformers keeps it."""

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self.length = length_after_crop(self.length, tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.length = 0


def is_packed(cache: Any) -> bool:
    """Whether a cache is one of a native engine."""
    return isinstance(cache, Cache) and bool(cache.layers) and isinstance(cache.layers[0], EngineLayer)


def use_packed(cache: Cache, layers: Sequence[EngineLayer]) -> None:
    """Make a dynamic cache, in place, one of an engine, with what it holds."""
    for old, new in zip(cache.layers, layers, strict=False):
        if old.get_seq_length() and old.keys is not None and old.values is not None:  # type: ignore[union-attr]
            new.take(old.keys, old.values)  # type: ignore[union-attr]
    cache.layers = list(layers)


def use_plain(cache: Cache) -> None:
    """Give a packed cache back to transformers, in place: for calls that the engine does not do."""
    cache.layers = [layer.plain() if isinstance(layer, EngineLayer) else layer for layer in cache.layers]


def engine_layers(
    cache: Cache, batch: int, is_own: Callable[[Any], bool], fresh: Callable[[], list[Layer]]
) -> list[Layer]:
    """The layers of an accepted cache as one engine keeps them, converted if they are not its own.

    Raises InputError when they hold another number of sequences than `batch`.
    """
    if not is_packed(cache):
        use_packed(cache, fresh())
    elif not is_own(cache.layers[0]):  # begun by another engine, or with another format of weights
        use_plain(cache)
        use_packed(cache, fresh())
    layers = cast(list[Layer], cache.layers)
    stored = layers[0].values
    if stored is not None and len(stored) != batch:
        if layers[0].length:
            raise InputError(f"the cache holds {len(stored)} sequences, the call has {batch}", "Use a fresh cache")
        for layer in layers:
            layer.reset()
    return layers


def accepts(cache: Any) -> bool:
    """Whether a cache is an engine's own, or a plain one that can become so."""
    from transformers import DynamicCache

    if cache is None or is_packed(cache):
        return True
    if class_of(cache) is not DynamicCache:
        return False
    # Sliding layers that hold something have forgotten keys: their places are not those of an engine.
    empty = cache.get_seq_length() == 0
    return all(isinstance(layer, DynamicLayer) if empty else type(layer) is DynamicLayer for layer in cache.layers)
