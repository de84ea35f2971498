"""Informed routing: execute or forecast each unit of a language model, per token.

Names are loaded on first use, so that importing the package costs nothing. The routed classes must however be known
to transformers for `AutoModelForCausalLM`; a small hook registers them when transformers is there already.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "RoutedModelForCausalLM": "routed_model",
    "RoutedConfig": "routed_model",
    "Recipe": "config",
    "RoutingConfig": "config",
    "InformedRoutingError": "errors",
    "InputError": "errors",
    "WorkError": "errors",
    "fit": "training.fit",
}

if TYPE_CHECKING:
    from .config import Recipe, RoutingConfig
    from .errors import InformedRoutingError, InputError, WorkError
    from .routed_model import RoutedConfig, RoutedModelForCausalLM
    from .training.fit import fit

__all__ = [
    "InformedRoutingError",
    "InputError",
    "Recipe",
    "RoutedConfig",
    "RoutedModelForCausalLM",
    "RoutingConfig",
    "WorkError",
    "__version__",
    "fit",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


if "transformers" in sys.modules:
    import_module(".routed_model", __name__)
