"""Routers and decision rules."""

from __future__ import annotations

import pytest
import torch

from informed_routing.config.parts import RouterConfig
from informed_routing.errors import InputError
from informed_routing.routing.decision import AlwaysExecute, GumbelSample, Threshold
from informed_routing.routing.router import make_router
from informed_routing.routing.routers.mlp import MlpRouter


@pytest.mark.parametrize(
    ("hidden", "rank", "width"),
    [(4096, 100, 824), (3072, 100, 568), (576, 32, 80), (576, 100, 144), (64, 64, 16)],
)
def test_paper_width_or_the_baselines_where_nothing_is_left(hidden: int, rank: int, width: int) -> None:
    assert MlpRouter.width_for(RouterConfig(kind="mlp"), hidden, rank) == width


def test_parameter_counts_of_the_paper() -> None:
    """268.54 M for 64 units of Llama 3.1 8B, biases not counted."""
    router = 4096 * 824 + 824 * 2
    assert 64 * (router + 2 * 4096 * 100) == pytest.approx(268.54e6, rel=1e-4)
    made = make_router(RouterConfig(kind="mlp"), 256, 8)
    assert sum(p.numel() for n, p in made.named_parameters() if n.endswith("weight")) == 256 * 48 + 48 * 2


def test_width_above_the_hidden_size_is_refused() -> None:
    with pytest.raises(InputError, match="router width 100 is above"):
        make_router(RouterConfig(kind="mlp", width=100), 64, 8)


@pytest.mark.parametrize("kind", ["mlp", "linear", "low-rank"])
def test_fresh_routers_favour_executing(kind: str) -> None:
    torch.manual_seed(0)
    margins = make_router(RouterConfig(kind=kind), 64, 8).margin(torch.randn(500, 64))
    assert margins.dtype == torch.float32
    assert float(margins.mean()) == pytest.approx(1.0, abs=0.3)


def test_half_precision_input_gives_float32_logits() -> None:
    router = make_router(RouterConfig(kind="mlp"), 64, 8).to(torch.bfloat16)
    assert router(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.float32


def test_gumbel_samples_execute_with_the_sigmoid_of_the_margin_whatever_tau() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.2]).expand(200_000, 2)
    for tau in (5.0, 1.0):
        gate = GumbelSample(tau)(logits)
        assert set(gate.unique().tolist()) == {0.0, 1.0}
        assert float(gate.mean()) == pytest.approx(float(torch.sigmoid(torch.tensor(1.2))), abs=0.005)


def test_less_noise_samples_nearer_to_the_threshold_rule() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50_000, 2)
    wanted = Threshold(0.0)(logits)
    agreement = [float(((GumbelSample(1.0, noise)(logits) > 0.5) == wanted).float().mean()) for noise in (1.0, 0.3, 0)]
    assert agreement[0] < agreement[1] < agreement[2] == 1.0


def test_gumbel_sample_has_a_gradient() -> None:
    logits = torch.zeros(64, 2, requires_grad=True)
    GumbelSample(1.0)(logits)[:8].sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) > 0


def test_thresholds_and_always() -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.5]])
    assert Threshold(0.5)(logits).tolist() == [True, False, False]
    assert AlwaysExecute()(logits).all()
