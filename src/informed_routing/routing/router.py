"""Routers by the names that settings give them."""

from __future__ import annotations

from ..config.kinds import kind
from ..config.parts import RouterConfig
from .routers.base import Router


def make_router(config: RouterConfig, hidden_size: int, forecaster_rank: int) -> Router:
    """A fresh router of the configured kind. Raises InputError for a width above `hidden_size`."""
    made: Router = kind("routers", config.kind)(config, hidden_size, forecaster_rank)
    return made
