"""Put a model back as it was when work on it, in place, fails half way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])

_PARTS = ("_modules", "_parameters", "_buffers")


@contextmanager
def restored_on_failure(model: Any, changed: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Undo, if the block raises, what it does to classes, attributes, modules and the values of `changed`."""
    if not isinstance(model, nn.Module):  # the block will say so
        yield
        return
    before = [
        (module, module.__class__, dict(vars(module)), {part: dict(vars(module)[part]) for part in _PARTS})
        for module in model.modules()
    ]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(parameter, parameter.detach().clone()) for parameter in changed]
    try:
        yield
    except BaseException:
        for module, kind, attributes, parts in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for part, content in parts.items():
                held = vars(module)[part]
                held.clear()
                held.update(content)
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)
        with torch.no_grad():
            for parameter, value in values:
                parameter.data.copy_(value)
        raise


def all_or_nothing(method: Function) -> Function:
    """A function `(model, ...)` that leaves the model as it was when it raises."""

    @functools.wraps(method)
    def guarded(model: Any, *args: Any, **kwargs: Any) -> Any:
        with restored_on_failure(model):
            return method(model, *args, **kwargs)

    return guarded  # type: ignore[return-value]
