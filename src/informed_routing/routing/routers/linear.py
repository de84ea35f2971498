"""d -> 2: the cheapest router, and the closed form's own shape."""

from __future__ import annotations

from ...config.parts import RouterConfig
from .base import Router, RouterForm


class LinearRouter(Router):
    """Logits W x + b."""

    @classmethod
    def width_for(cls, config: RouterConfig, hidden_size: int, forecaster_rank: int) -> None:
        """None: there is no hidden layer."""
        return None

    def form(self) -> RouterForm:
        return self._form(relu=False)


KIND = LinearRouter
