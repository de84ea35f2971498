"""Forecasters: the closed form is the least-squares optimum of every rank."""

from __future__ import annotations

import pytest
import torch

from informed_routing.routing.closed_form import Moments, solve
from informed_routing.routing.fallbacks.forecaster import Forecaster


def _data(rows: int = 4000, width: int = 12, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x = x + 2.0
    wanted = torch.randn(width, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    return x, x @ wanted * 0.1 + 5.0 + 0.1 * torch.randn(rows, width, generator=generator)


def _explained(forecaster: Forecaster, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        error = (y - forecaster(x)).square().sum()
    return float(1 - error / (y - y.mean(0)).square().sum())


def _moments(x: torch.Tensor, y: torch.Tensor, blocks: int = 7) -> Moments:
    moments = Moments(x.shape[1])
    for part_x, part_y in zip(x.chunk(blocks), y.chunk(blocks), strict=True):
        moments.add(part_x, part_y)
    return moments


@pytest.mark.parametrize("rank", [1, 2, 3, 12])
def test_closed_form_predicts_its_own_explained_variance(rank: int) -> None:
    x, y = _data()
    found = solve(_moments(x, y), ridge=0.0)
    forecaster = Forecaster(12, rank)
    forecaster.take(found)
    assert _explained(forecaster, x, y) == pytest.approx(float(found.explained[rank - 1]), abs=1e-4)


def test_no_other_map_of_the_rank_does_better() -> None:
    """Against the exact optimum by a separate route: the SVD of the least-squares prediction."""
    x, y = _data()
    found = solve(_moments(x, y), ridge=0.0)
    centred_x, centred_y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    predicted = centred_x @ torch.linalg.lstsq(centred_x, centred_y).solution
    left, values, right = torch.linalg.svd(predicted, full_matrices=False)
    for rank in (1, 2, 3):
        best = left[:, :rank] * values[:rank] @ right[:rank]
        optimum = 1 - (centred_y - best).square().sum() / centred_y.square().sum()
        assert float(found.explained[rank - 1]) == pytest.approx(float(optimum), abs=1e-5)


def test_gradient_descent_does_not_beat_the_closed_form() -> None:
    x, y = _data(rows=600)
    closed = Forecaster(12, 2)
    closed.take(solve(_moments(x, y), ridge=0.0))
    torch.manual_seed(0)
    trained = Forecaster(12, 2)
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-2)
    for _ in range(400):
        loss = (trained(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert _explained(trained, x, y) <= _explained(closed, x, y) + 1e-5
    assert _explained(trained, x, y) > 0.5


def test_weights_count_rows_as_repetitions() -> None:
    x, y = _data(rows=50)
    twice, weighted = Moments(12), Moments(12)
    twice.add(torch.cat([x, x[:10]]), torch.cat([y, y[:10]]))
    weight = torch.ones(50, 1)
    weight[:10] = 2.0
    weighted.add(x, y, weight)
    for one, other in zip(twice.tensors(), weighted.tensors(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


def test_a_unit_without_variance_is_solved() -> None:
    x, _ = _data(rows=100)
    found = solve(_moments(x, torch.zeros(100, 12)), ridge=1e-3)
    assert torch.isfinite(found.inner).all()
    assert torch.equal(found.outer_bias, torch.zeros(12))


def test_unfitted_forecaster_is_almost_greedy_routing() -> None:
    torch.manual_seed(0)
    assert float(Forecaster(64, 8)(torch.randn(10, 64)).abs().max()) < 1e-2
