"""The closed form's margins are those that routers have afterwards."""

from __future__ import annotations

import pytest
import torch

from informed_routing.config.parts import RouterConfig
from informed_routing.routing.router import make_router


@pytest.mark.parametrize("kind", ["linear", "low-rank", "mlp"])
def test_a_router_takes_the_margin_that_was_solved(kind: str) -> None:
    router = make_router(RouterConfig(kind=kind), 32, 4)
    generator = torch.Generator().manual_seed(0)
    weights, x = torch.randn(32, generator=generator), torch.randn(50, 32, generator=generator)
    router.take(weights, 0.3)
    margin = router.margin(x)
    assert (margin < 0).any()  # of an MLP one hidden unit alone gives only what is above the constant
    torch.testing.assert_close(margin, x @ weights + 0.3, atol=1e-4, rtol=1e-4)
