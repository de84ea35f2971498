"""Models that no transformers config describes (dropped, sliced) save themselves as what `load_static` reads.

Otherwise `save_pretrained` would write a folder that loads without an error, with random numbers for what is missing.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from ..models.runtime_classes import made_by
from .writing import save_static


def mark_reshaped(model: Any) -> None:
    """Make a reshaped model save itself by `save_static`, in place."""
    model.__class__ = _reshaped_class(type(model))  # type: ignore[arg-type]


@functools.cache
def _reshaped_class(base: type[nn.Module]) -> type[nn.Module]:
    if "_save_reshaped" in base.__dict__:
        return base
    names = {"save_pretrained": _save, "_save_reshaped": True, "__module__": __name__, **made_by(_reshaped_class, base)}
    return type(base.__name__, (base,), names)


def _save(self: Any, save_directory: str | Path, is_main_process: bool = True, **unknown: Any) -> None:
    """`save_static` without a tokenizer. Raises TypeError for what transformers could do with other models."""
    if unknown:
        raise TypeError(f"a dropped or sliced model is saved without {', '.join(unknown)}: leave it out")
    if is_main_process:
        save_static(self, None, save_directory)
