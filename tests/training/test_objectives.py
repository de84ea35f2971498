"""Losses, schedules, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import FAMILIES, make_tiny, random_ids
from torch.nn import functional as F

from informed_routing.config.recipe import LoraStage, ObjectiveConfig, RouteStage, StageConfig
from informed_routing.models.head import lm_head
from informed_routing.models.units import Unit
from informed_routing.routing.decision import Threshold
from informed_routing.routing.fallbacks.forecaster import Forecaster
from informed_routing.routing.state import KeyValues
from informed_routing.routing.target import BudgetMeter
from informed_routing.training import objectives
from informed_routing.training.lora import LoraObjective, add_lora
from informed_routing.training.objectives import next_token_loss
from informed_routing.training.route import RouteObjective, freeze_all_but, learning_rates, router_parameters
from informed_routing.training.schedule import Batches, learning_rate, linear
from informed_routing.training.setup import enable_checkpointing
from informed_routing.training.warm_start import warm_start


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 7)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunked_loss_and_gradient_equal_the_plain_ones(family: str) -> None:
    model = make_tiny(family)
    ids = random_ids(2, 12)
    hidden = model.model(ids).last_hidden_state.detach().requires_grad_()
    head = lm_head(model)
    with torch.no_grad():
        assert torch.allclose(head(hidden), model(ids).logits, atol=1e-4)
    loss = next_token_loss(hidden, ids, head, ObjectiveConfig())
    (found,) = torch.autograd.grad(loss, hidden)
    plain = F.cross_entropy(head(hidden)[:, :-1].reshape(-1, 128), ids[:, 1:].reshape(-1))
    (wanted,) = torch.autograd.grad(plain, hidden)
    assert float(loss) == pytest.approx(float(plain), rel=1e-5)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_distillation_is_zero_at_the_teacher_and_mixes() -> None:
    model = make_tiny("llama")
    ids = random_ids(2, 12)
    hidden = model.model(ids).last_hidden_state.detach()
    head = lm_head(model)
    other = hidden + 0.1 * torch.randn_like(hidden)
    distill = ObjectiveConfig(kind="distill")
    assert float(next_token_loss(hidden, ids, head, distill, hidden)) == pytest.approx(0, abs=1e-5)
    kl = float(next_token_loss(other, ids, head, distill, hidden))
    lm = float(next_token_loss(other, ids, head, ObjectiveConfig()))
    mixed = ObjectiveConfig(kind="mixed", distill_weight=0.25)
    assert kl > 0
    assert float(next_token_loss(other, ids, head, mixed, hidden)) == pytest.approx(0.25 * kl + 0.75 * lm, rel=1e-4)


def test_padding_does_not_count_in_the_loss() -> None:
    model = make_tiny("llama")
    ids = random_ids(1, 10)
    hidden = model.model(ids).last_hidden_state.detach()
    head = lm_head(model)
    padded_ids = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    padded = torch.cat([hidden, torch.randn(1, 4, 64)], 1)
    valid = padded_ids > 0
    wanted = float(next_token_loss(hidden, ids, head, ObjectiveConfig()))
    found = float(next_token_loss(padded, padded_ids, head, ObjectiveConfig(), valid=valid))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model = make_routed("llama")
        parameters = router_parameters(model)
        freeze_all_but(model, parameters)
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        meter = BudgetMeter(model.costs, [u.kind for u in model.units], "units", 8)
        torch.manual_seed(0)
        RouteObjective(model, RouteStage(steps=10), meter)(random_ids(2, 16), 3)["loss"].backward()
        found.append([p.grad if p.grad is not None else torch.zeros(1) for p in parameters.values()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert any(float(g.abs().max()) > 0 for g in found[0])


@pytest.mark.parametrize("kv", ["keep", "drop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hard_decisions_train_with_real_skipping_and_the_same_gradients(
    family: str, kv: KeyValues, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[int] = []
    monkeypatch.setattr(Unit, "run", _counting(Unit.run, tokens))
    found: dict[str, list[torch.Tensor]] = {}
    executed: dict[str, int] = {}
    for execution in ("masked", "sparse"):
        model = make_routed(family)
        model.set_execution(execution, kv)  # type: ignore[arg-type]
        parameters = add_lora(model, LoraStage(rank=2, targets=("o_proj", "down_proj")))
        freeze_all_but(model, parameters)
        with torch.no_grad():
            for i, parameter in enumerate(parameters.values()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 8)
        model.train()
        tokens.clear()
        LoraObjective(model, LoraStage(), Threshold(0.0))(random_ids(2, 16), 0)["loss"].backward()
        found[execution] = [p.grad for p in parameters.values() if p.grad is not None]
        executed[execution] = sum(tokens)
    assert executed["sparse"] < executed["masked"]
    assert len(found["sparse"]) == len(found["masked"]) > 0
    for one, other in zip(found["masked"], found["sparse"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()) + 1e-7)


def test_training_with_dropped_keys_and_a_cache() -> None:
    """What a trainer calls: a forward with labels, which asks for a cache unless told otherwise."""
    losses = []
    for use_cache in (True, False):
        model = make_routed("llama")
        model.set_execution("sparse", "drop")
        model.set_decision(Threshold(0.0))
        model.train()
        ids = random_ids(2, 16)
        losses.append(model(input_ids=ids, labels=ids, use_cache=use_cache).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)


def _counting(run: Callable[..., torch.Tensor], tokens: list[int]) -> Callable[..., torch.Tensor]:
    """`Unit.run` that notes how many tokens an FFN was given."""

    def counted(unit: Unit, layer: torch.nn.Module, x: torch.Tensor, kwargs: Any) -> torch.Tensor:
        if unit.kind == "ffn":  # attention is gathered in parts, not by this call
            tokens.append(x.shape[0] * x.shape[1])
        return run(unit, layer, x, kwargs)

    return counted


@pytest.mark.parametrize("kind", ["linear", "low-rank", "mlp"])
def test_warm_start_sets_the_sampled_share(kind: str) -> None:
    model = make_routed("llama", router=kind)
    meter = BudgetMeter(model.costs, [u.kind for u in model.units], "units", 16)
    report = warm_start(model, [random_ids(24, 32), random_ids(8, 32, seed=3)], meter, 0.3)
    explained, losses = report["explained"], report["losses"]
    assert isinstance(explained, dict)
    assert isinstance(losses, list)
    assert 0 < explained["miss_attention"] <= 1
    assert len(losses) == 2
    model.routing_state.choose(record_margins=True)
    model.set_decision(Threshold(float("-inf")))
    with torch.no_grad():
        model(random_ids(8, 32, seed=9))
    margins = torch.stack([model.routing_state.forward.margins[i].reshape(-1) for i in range(6)])
    assert float(1 - torch.sigmoid(margins).mean()) == pytest.approx(0.3, abs=0.05)


def test_warm_start_orders_units_by_what_approximating_them_costs() -> None:
    """A unit whose update is scaled down costs less to approximate: it gets the lower margins."""
    model = make_routed("llama", fallback="zero")
    layer = model.decoder.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight.mul_(1e-3)
    meter = BudgetMeter(model.costs, [u.kind for u in model.units], "units", 16)
    warm_start(model, [random_ids(24, 32)], meter, 0.3)
    model.routing_state.choose(record_margins=True)
    model.set_decision(Threshold(float("-inf")))
    with torch.no_grad():
        model(random_ids(8, 32, seed=9))
    means = [float(model.routing_state.forward.margins[i].mean()) for i in range(6)]
    assert means.index(min(means)) == 3


def test_sweeps_solve_the_forecasters_for_the_tokens_that_are_approximated() -> None:
    model = make_routed("llama")
    meter = BudgetMeter(model.costs, [u.kind for u in model.units], "units", 16)
    before = [u.forecaster.inner.weight.clone() for u in model.units if isinstance(u.forecaster, Forecaster)]
    warm_start(model, [random_ids(8, 32)], meter, 0.3, refit_ridge=1e-3)
    after_dense = [u.forecaster.inner.weight.clone() for u in model.units if isinstance(u.forecaster, Forecaster)]
    assert all(torch.equal(a, b) for a, b in zip(before, after_dense, strict=True))
    warm_start(model, [random_ids(8, 32), random_ids(8, 32, seed=3)], meter, 0.3, refit_ridge=1e-3)
    after = [u.forecaster.inner.weight for u in model.units if isinstance(u.forecaster, Forecaster)]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_forecasters_have_a_rate_of_their_own() -> None:
    names = ["a.router.outer.bias", "a.forecaster.inner.weight"]
    config = RouteStage(learning_rate=3e-4, forecaster_learning_rate=1e-3)
    assert learning_rates(config, names) == {names[0]: 3e-4, names[1]: 1e-3}


def test_batches_deal_out_every_row_once_an_epoch() -> None:
    rows = torch.arange(12)[:, None].expand(12, 4)
    dealt = [Batches(rows, 2, 5, rank, 2)[i][:, 0].tolist() for i in range(3) for rank in range(2)]
    assert sorted(row for part in dealt for row in part) == list(range(12))
    assert Batches(rows, 2, 5)[7].tolist() == Batches(rows, 2, 5)[7].tolist()
    assert Batches(rows, 6, 5)[0].tolist() != Batches(rows, 6, 5)[2].tolist()


def test_schedules() -> None:
    config = StageConfig(steps=100, learning_rate=1.0, warmup_steps=4, schedule="cosine")
    assert learning_rate(config, 0) == pytest.approx(0.2)
    assert learning_rate(config, 50) == pytest.approx(0.5)
    assert learning_rate(config, 99) < 0.01
    assert linear(5.0, 1.0, 0, 10) == 5.0
    assert linear(5.0, 1.0, 9, 10) == 1.0
