"""Settings: frozen, and checked before any work starts.

A `Recipe` is what a user writes in YAML; a `RoutingConfig` is what a routing folder stores.
"""

from .folder import RoutingConfig, ThresholdRow
from .parts import ForecasterConfig, RouterConfig, SelectionConfig
from .recipe import Recipe

__all__ = ["ForecasterConfig", "Recipe", "RouterConfig", "RoutingConfig", "SelectionConfig", "ThresholdRow"]
