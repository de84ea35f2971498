"""Informed routing: execute or forecast each unit of a language model, per token.

Names are loaded on first use, so that importing the package costs nothing. The routed classes must however be known
to transformers for `AutoModelForCausalLM`; a small hook registers them when its auto classes are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .persistence.registration import register_with_transformers

__version__ = "0.1.0"

_EXPORTS = {
    "RoutedModelForCausalLM": "routed_model",
    "RoutedConfig": "persistence.auto_config",
    "Recipe": "config",
    "RoutingConfig": "config",
    "InformedRoutingError": "errors",
    "InputError": "errors",
    "WorkError": "errors",
    "fit": "training.fit",
}

if TYPE_CHECKING:
    from .config.folder import RoutingConfig
    from .config.recipe import Recipe
    from .errors import InformedRoutingError, InputError, WorkError
    from .persistence.auto_config import RoutedConfig
    from .routed_model import RoutedModelForCausalLM
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


register_with_transformers()
