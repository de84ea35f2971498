"""Criteria of the static baselines: what matters least comes first, and numbers agree with plain definitions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tests.baselines.conftest import with_idle
from tests.tiny import FAMILIES, make_tiny
from torch import Tensor
from torch.nn import functional as F

from informed_routing.baselines import scores
from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.progress import NullProgress

QUIET = NullProgress()


def _lowest(found: dict[Any, float], count: int) -> set[Any]:
    return set(sorted(found, key=found.__getitem__)[:count])


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("score", [scores.block_influence, scores.perplexity_without])
def test_idle_layers_go_first(score: Any, family: str, rows: Tensor) -> None:
    model = make_tiny(family, num_hidden_layers=8)
    with torch.no_grad():
        for index in (2, 5):
            layer = model.model.layers[index]
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.zero_()
    found = score(model, rows, 4, QUIET)
    if score is scores.block_influence:
        assert _lowest(found, 2) == {2, 5}
    else:  # leaving out a layer may help: these two are exactly neutral
        dense = token_perplexity(model, rows).token_perplexity
        assert found[2] == found[5] == dense
        assert all(found[index] != dense for index in found if index not in (2, 5))


def test_block_influence_is_one_minus_the_mean_cosine(rows: Tensor) -> None:
    model = make_tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        states = model.model(rows, output_hidden_states=True).hidden_states
        # The last of these is behind the final norm, so the last layer is not compared.
        wanted = [1 - float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in itertools.pairwise(states)]
    found = scores.block_influence(model, rows, 4, QUIET)
    assert [found[index] for index in range(3)] == pytest.approx(wanted[:3], abs=1e-6)


def test_first_positions_can_be_left_out(rows: Tensor) -> None:
    model = make_tiny("llama", num_hidden_layers=3)
    with torch.no_grad():
        states = model.model(rows, output_hidden_states=True).hidden_states
    wanted = 1 - float(F.cosine_similarity(states[0][:, 5:], states[1][:, 5:], dim=-1).mean())
    assert scores.block_influence(model, rows, 4, QUIET, skip_positions=5)[0] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_unit_distance_of_idle_units_is_zero(family: str, rows: Tensor) -> None:
    model = make_tiny(family, num_hidden_layers=3)
    with torch.no_grad():
        for parameter in model.model.layers[1].self_attn.o_proj.parameters():
            parameter.zero_()
        for parameter in model.model.layers[2].mlp.down_proj.parameters():
            parameter.zero_()
    found = scores.unit_distance(model, rows, 4, QUIET)
    assert list(found) == [(layer, kind) for layer in range(3) for kind in ("attention", "ffn")]
    assert found[1, "attention"] == pytest.approx(0, abs=1e-6)
    assert found[2, "ffn"] == pytest.approx(0, abs=1e-6)
    assert min(value for unit, value in found.items() if unit not in [(1, "attention"), (2, "ffn")]) > 1e-3


def test_perplexity_without_a_layer_is_that_of_the_smaller_model(rows: Tensor) -> None:
    from informed_routing.baselines.depth_pruning import remove_layers

    found = scores.perplexity_without(make_tiny("qwen3", num_hidden_layers=4), rows, 4, QUIET)
    smaller = make_tiny("qwen3", num_hidden_layers=4)
    remove_layers(smaller, [2])
    assert found[2] == pytest.approx(token_perplexity(smaller, rows).token_perplexity, rel=1e-6)


def test_taylor_is_first_order(rows: Tensor) -> None:
    """Against autograd on the model's own loss; independent of the batch size."""
    model = make_tiny("llama", num_hidden_layers=3)
    model(rows, labels=rows).loss.backward()
    wanted = [
        sum(float((p.detach() * p.grad).abs().sum()) for p in layer.parameters() if p.grad is not None and p.dim() == 2)
        for layer in model.model.layers
    ]
    model.zero_grad(set_to_none=True)
    for batch_size in (2, 6):
        found = scores.taylor(model, rows, batch_size, QUIET)
        assert list(found.values()) == pytest.approx(wanted, rel=1e-4)


def test_taylor_sees_layers_that_cannot_change_the_loss(rows: Tensor) -> None:
    model = with_idle((3,), count=5)
    with torch.no_grad():  # also nothing that its last matrices could pass on
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[3].self_attn, name).weight.zero_()
        model.model.layers[3].mlp.up_proj.weight.zero_()
    assert _lowest(scores.taylor(model, rows, 4, QUIET), 1) == {3}


@pytest.mark.parametrize(
    "score", [scores.block_influence, scores.unit_distance, scores.perplexity_without, scores.taylor]
)
def test_scoring_leaves_no_trace(score: Any, rows: Tensor) -> None:
    model, fresh = make_tiny("llama").train(), make_tiny("llama").train()
    model.lm_head.weight.requires_grad_(False)
    score(model, rows, 4, QUIET)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [
        name != "lm_head.weight" for name, _ in model.named_parameters()
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert not any(m._forward_hooks for m in model.model.layers)
    assert vars(model.model.layers[0]).keys() == vars(fresh.model.layers[0]).keys()
