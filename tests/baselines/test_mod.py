"""Mixture-of-Depths: top-k with a multiplier, decoupled and whole-block; the causal predictor that generates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.baselines.small_fit import check_usable, fitted
from tests.routed import left_padded, make_baseline
from tests.tiny import make_tiny, random_ids

from informed_routing.baselines.dynamic import recipe_of
from informed_routing.config.parts import ForecasterConfig, RouterConfig
from informed_routing.config.recipe import RouteStage
from informed_routing.errors import InputError
from informed_routing.execution.choose import native_reason
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, Threshold, TopK
from informed_routing.routing.routers.ranking import RankingRouter
from informed_routing.routing.target import BudgetMeter
from informed_routing.training.route import freeze_all_but, router_parameters
from informed_routing.training.top_k import TopKObjective

BOTH = pytest.mark.parametrize("name", ["mod", "mod-block"])


def _router(model: RoutedModelForCausalLM, index: int) -> RankingRouter:
    router = model.units[index].router
    assert isinstance(router, RankingRouter)
    return router


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 40),
    pads=st.integers(0, 39),
    sparsity=st.sampled_from([0.1, 0.25, 0.3, 0.4, 0.7]),
    seed=st.integers(0, 10**6),
)
def test_top_k_takes_the_highest_of_each_sequence(length: int, pads: int, sparsity: float, seed: int) -> None:
    pads = min(pads, length)
    margin = torch.randn(2, length, generator=torch.Generator().manual_seed(seed))
    margin[1, :pads] = -torch.inf
    gate = TopK(1 - sparsity)(torch.stack([torch.zeros_like(margin), margin], -1))
    for row, real in enumerate((length, length - pads)):
        assert int(gate[row].sum()) == math.ceil(round((1 - sparsity) * real, 9))
        if 0 < gate[row].sum() < length:
            assert margin[row][gate[row]].min() >= margin[row][~gate[row]].max()
    assert not gate[1, :pads].any()


@BOTH
@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_sparsity_0_is_the_base_model(name: str, execution: str) -> None:
    """The multiplier belongs to the decisions: without them it is not there."""
    base, routed = make_tiny("llama", num_hidden_layers=4), make_baseline(name)
    routed.set_execution(execution)  # type: ignore[arg-type]
    routed.set_decision(TopK(0.5))
    ids = random_ids(2, 13)
    with torch.no_grad():
        routed(ids)  # leaves nothing behind
        routed.set_sparsity(0)
        assert torch.equal(routed(ids).logits, base(ids).logits)


@BOTH
def test_all_executed_at_weight_1_is_the_base_model(name: str) -> None:
    base, routed = make_tiny("llama", num_hidden_layers=4), make_baseline(name)
    for unit in routed.units:
        if unit.router is not None:
            torch.nn.init.constant_(_router(routed, unit.index).score_layer.bias, 1e4)
    routed.set_decision(TopK(1.0))
    ids = random_ids(2, 13)
    with torch.no_grad():
        torch.testing.assert_close(routed(ids).logits, base(ids).logits, rtol=1e-3, atol=1e-3)


def test_decoupled_layer_by_hand() -> None:
    """x + sigmoid(r) f(x) for the chosen, with keys and values of all; both routers read the stream before the norm."""
    base, routed = make_tiny("llama", num_hidden_layers=1), make_baseline("mod", num_hidden_layers=1)
    routed.set_sparsity(0.25)
    ids = random_ids(1, 16)
    layer = base.model.layers[0]

    def gate(score: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(score).scatter(1, score.topk(12, dim=1).indices, 1.0)
        return (chosen * torch.sigmoid(score)).unsqueeze(-1)

    with torch.no_grad():
        h = base.model.embed_tokens(ids)
        rope = base.model.rotary_emb(h, torch.arange(16)[None])
        attended = layer.self_attn(layer.input_layernorm(h), position_embeddings=rope, attention_mask=None)[0]
        h = h + gate(_router(routed, 0).score(h)) * attended
        h = h + gate(_router(routed, 1).score(h)) * layer.mlp(layer.post_attention_layernorm(h))
        wanted = base.lm_head(base.model.norm(h))
        torch.testing.assert_close(routed(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert routed.routing_stats()["units"] == 0.25


def test_block_by_hand() -> None:
    """The chosen tokens go through the base model's layer by themselves, at their own positions."""
    base, routed = make_tiny("llama", num_hidden_layers=2), make_baseline("mod-block", num_hidden_layers=2)
    routed.set_sparsity(0.25)  # one of two layers at a capacity of one half
    ids = random_ids(1, 16)
    with torch.no_grad():
        h = base.model(ids, output_hidden_states=True).hidden_states[1]
        score = _router(routed, 2).score(h)
        chosen = score[0].topk(8).indices.sort().values
        cos, sin = base.model.rotary_emb(h, chosen[None])
        rows = h[:, chosen]
        block = base.model.layers[1](rows, position_embeddings=(cos, sin), attention_mask=None)
        h[:, chosen] = rows + torch.sigmoid(score[:, chosen]).unsqueeze(-1) * (block - rows)
        wanted = base.lm_head(base.model.norm(h))
        torch.testing.assert_close(routed(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        routed.set_execution("masked")
        torch.testing.assert_close(routed(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    assert routed.routing_stats()["units"] == 0.25
    assert routed.routing_stats()["kv"] == 0.25


@BOTH
def test_sparse_equals_masked_with_padding(name: str) -> None:
    routed = make_baseline(name)
    routed.set_decision(TopK(0.6))
    ids = random_ids(3, 14)
    mask = left_padded(ids, (0, 2, 9))
    logits = {}
    for execution in ("sparse", "masked"):
        routed.set_execution(execution)  # type: ignore[arg-type]
        with torch.no_grad():
            logits[execution] = routed(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits["sparse"], logits["masked"], rtol=1e-3, atol=1e-3)
    alone = routed(ids[2:, 9:]).logits[0]  # what a sequence executes does not depend on its padding
    torch.testing.assert_close(logits["masked"][-5:], alone, rtol=1e-3, atol=1e-3)


def test_capacity_counts_all_units() -> None:
    routed = make_baseline("mod-block")
    routed.set_sparsity(0.1)
    rule = routed.routing_state.decision
    assert isinstance(rule, TopK)
    assert rule.capacity == pytest.approx(0.8)
    with pytest.raises(InputError, match=r"only 0\.50 of the units are routed"):
        routed.set_sparsity(0.5)
    with pytest.raises(InputError, match="counts units, not macs"):
        routed.set_sparsity(0.1, "macs")
    with pytest.raises(InputError, match="not been calibrated"):
        routed.set_sparsity(0.1, decision="threshold")
    with pytest.raises(InputError, match="do not rank"):
        make_baseline("skipgpt").set_sparsity(0.1, decision="top-k")


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InputError, match="need each other"):
        recipe_of("mod").with_overrides({"selection.decision": "threshold"})
    with pytest.raises(InputError, match="share of units"):
        recipe_of("mod").with_overrides({"route.budget": "macs"})
    with pytest.raises(InputError, match="warm_start"):
        recipe_of("mod").with_overrides({"router.warm_start": True})
    with pytest.raises(InputError, match="joint with route or lora"):
        recipe_of("mod").with_overrides({"stages": ["joint", "lora"]})
    with pytest.raises(InputError, match=r"needs route\.steps"):
        recipe_of("mod").with_overrides({"route.steps": 0})
    with pytest.raises(InputError, match="need each other"):
        RoutedModelForCausalLM.attach(make_tiny("llama"), ForecasterConfig(), RouterConfig(kind="ranking"))


# -- training -------------------------------------------------------------------------------------------------


def _objective(model: RoutedModelForCausalLM) -> TopKObjective:
    meter = BudgetMeter(model.costs, [unit.kind for unit in model.units], "units", 8)
    return TopKObjective(model, RouteStage(sparsity=0.25, steps=4), meter)


@BOTH
def test_scores_learn_from_the_text_and_predictors_only_from_who_was_chosen(name: str) -> None:
    routed = make_baseline(name)
    freeze_all_but(routed, router_parameters(routed))
    routed.train()
    objective, ids = _objective(routed), random_ids(2, 16)
    objective(ids, 0)["loss"].backward()
    for parameter_name, parameter in router_parameters(routed).items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
        parameter.grad = None
    objective(ids, 0)
    objective.penalty(0, torch.zeros(8), None).backward()
    touched = {n for n, p in router_parameters(routed).items() if p.grad is not None and p.grad.any()}
    assert touched == {n for n in router_parameters(routed) if "score_layer" not in n}


def test_training_really_skips() -> None:
    routed = make_baseline("mod")
    routed.train()
    rows: list[int] = []
    for layer in routed.decoder.layers:
        layer.mlp.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[-2]))
    _objective(routed)(random_ids(1, 16), 0)
    assert rows == [12] * 4


def test_predictors_learn_who_is_chosen() -> None:
    routed = make_baseline("mod", num_hidden_layers=2)
    predictors = {n: p for n, p in router_parameters(routed).items() if "score_layer" not in n}
    freeze_all_but(routed, predictors)
    routed.train()
    objective, optimizer = _objective(routed), torch.optim.Adam(predictors.values(), lr=1e-2)
    for step in range(80):
        objective(random_ids(8, 32, seed=step), 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    routed.eval()
    ids = random_ids(8, 32, seed=1000)
    gates = []
    for rule in (objective.rule(0), Threshold(0.0)):
        routed.set_decision(rule)
        with torch.no_grad():
            routed(ids)
        gates.append(routed.routing_state.forward.gates[0])
    assert float((gates[0] == gates[1]).float().mean()) > 0.9


# -- generation -----------------------------------------------------------------------------------------------


def test_top_k_cannot_generate() -> None:
    routed = make_baseline("mod")
    routed.set_sparsity(0.25)
    ids = random_ids(1, 8)
    with pytest.raises(InputError, match=r"later ones too.* causal predictor: set_sparsity"):
        routed.generate(ids, max_new_tokens=2)
    cache = routed(ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="later ones too"):
        routed(ids[:, :1], past_key_values=cache)
    routed.set_sparsity(0)
    assert routed.generate(ids, max_new_tokens=2, eos_token_id=None).shape == (1, 10)


@BOTH
def test_decode_by_the_predictor_equals_its_prefill(name: str) -> None:
    """The same decisions, the same logits; and top-k does not have this property."""
    routed = make_baseline(name)
    routed.set_decision(Threshold(0.0))
    ids = random_ids(2, 20)
    with torch.no_grad():
        whole = routed(ids, use_cache=False).logits
        decided = torch.stack([routed.routing_state.forward.gates[i] for i in range(8)])
        out = routed(ids[:, :12], use_cache=True)
        logits, gates = [out.logits], [torch.stack([routed.routing_state.forward.gates[i] for i in range(8)])]
        for place in range(12, 20):
            out = routed(ids[:, place : place + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
            gates.append(torch.stack([routed.routing_state.forward.gates[i] for i in range(8)]))
        assert torch.equal(torch.cat(gates, -1), decided)
        torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-3, atol=1e-3)
        assert 0.1 < float(decided[-2:].float().mean()) < 0.9
        routed.set_decision(TopK(0.5))
        routed(ids)
        whole_gates = routed.routing_state.forward.gates[2][:, :12]
        routed(ids[:, :12])
        assert not torch.equal(routed.routing_state.forward.gates[2], whole_gates)


def test_engines_refuse_ranking_routers_by_name() -> None:
    assert native_reason(make_baseline("mod")) == "ranking routers"


@BOTH
def test_fit_leaves_a_usable_folder(name: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = fitted(name, tiny_folder, text_file, tmp_path / "out")
    assert isinstance(model.routing_state.decision, TopK)
    check_usable(model, "mod")
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").exists()
    model.set_decision(AlwaysExecute())
