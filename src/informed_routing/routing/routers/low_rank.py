"""d -> width -> 2 without an activation."""

from __future__ import annotations

from .base import Router, RouterForm


class LowRankRouter(Router):
    """Logits W2 (W1 x + b1) + b2."""

    default_width = 16
    init_nonlinearity = "linear"

    def form(self) -> RouterForm:
        return self._form(relu=False)


KIND = LowRankRouter
