"""SkipGPT: as published (linear routers at layer entry) and as the paper re-ran it (MLP routers after the norm)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.baselines.small_fit import check_usable, fitted
from tests.routed import left_padded, make_baseline
from tests.tiny import make_tiny, random_ids

from informed_routing.baselines.dynamic import attach, recipe_of
from informed_routing.baselines.skipgpt import load_released
from informed_routing.errors import InputError
from informed_routing.execution.choose import native_reason
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, DecisionRule, Threshold

BOTH = pytest.mark.parametrize("name", ["skipgpt", "skipgpt-faithful"])


@BOTH
@pytest.mark.parametrize("execution", ["sparse", "masked"])
@pytest.mark.parametrize("rule", [AlwaysExecute(), Threshold(float("-inf"))])
def test_all_executed_is_the_base_model(name: str, execution: str, rule: DecisionRule) -> None:
    base, routed = make_tiny("llama", num_hidden_layers=4), make_baseline(name)
    routed.set_execution(execution)  # type: ignore[arg-type]
    routed.set_decision(rule)
    ids = random_ids(2, 13)
    with torch.no_grad():
        assert torch.equal(routed(ids).logits, base(ids).logits)


@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_both_routers_of_a_layer_read_the_stream_at_its_entry(execution: str) -> None:
    """The published forward, by hand: the FFN's router does not see what attention wrote."""
    routed = make_baseline("skipgpt-faithful")
    routed.set_execution(execution)  # type: ignore[arg-type]
    routed.set_decision(Threshold(0.0))
    routed.routing_state.choose(record_margins=True)
    ids = random_ids(2, 13)
    with torch.no_grad():
        entries = routed(ids, output_hidden_states=True).hidden_states
        for layer in range(4):
            for unit in routed.units[2 * layer : 2 * layer + 2]:
                assert unit.router is not None
                logits = entries[layer] @ unit.router.outer.weight.T + unit.router.outer.bias
                wanted = logits[..., 1] - logits[..., 0]
                torch.testing.assert_close(
                    routed.routing_state.forward.margins[unit.index], wanted, rtol=1e-4, atol=1e-4
                )
    assert 0.05 < routed.routing_stats()["units"] < 0.95
    assert routed.routing_state.forward.layer_input is None  # nothing of the graph is kept alive


def test_the_layer_by_hand() -> None:
    """h1 = h + a Attn(norm(h)); h2 = h1 + m FFN(norm(h1)), with a and m decided on h."""
    base, routed = make_tiny("llama", num_hidden_layers=1), make_baseline("skipgpt-faithful", num_hidden_layers=1)
    ids = random_ids(1, 17)
    layer = base.model.layers[0]
    with torch.no_grad():
        h = base.model.embed_tokens(ids)
        margins = torch.stack([unit.router.margin(h) for unit in routed.units if unit.router is not None])
        threshold = float(margins.median())
        routed.set_decision(Threshold(threshold))
        a, m = (margins > threshold).unsqueeze(-1)
        rope = base.model.rotary_emb(h, torch.arange(17)[None])
        attended = layer.self_attn(layer.input_layernorm(h), position_embeddings=rope, attention_mask=None)[0]
        h1 = h + a * attended
        h2 = h1 + m * layer.mlp(layer.post_attention_layernorm(h1))
        wanted = base.lm_head(base.model.norm(h2))
        assert 0 < int(a.sum()) < 17
        assert 0 < int(m.sum()) < 17
        torch.testing.assert_close(routed(ids).logits, wanted, rtol=1e-4, atol=1e-4)


@BOTH
def test_sparse_equals_masked_and_decode_equals_prefill(name: str) -> None:
    routed = make_baseline(name)
    routed.set_decision(Threshold(0.0))
    ids = random_ids(3, 14)
    mask = left_padded(ids, (0, 2, 5))
    with torch.no_grad():
        sparse = routed(ids, attention_mask=mask).logits
        out = routed(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
        parts = [out.logits]
        for end in range(10, 15):
            settings = {"attention_mask": mask[:, :end], "past_key_values": out.past_key_values}
            out = routed(ids[:, end - 1 : end], **settings)
            parts.append(out.logits)
        routed.set_execution("masked")
        masked = routed(ids, attention_mask=mask).logits
    torch.testing.assert_close(sparse[mask.bool()], masked[mask.bool()], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], sparse[mask.bool()], rtol=1e-3, atol=1e-3)


def test_published_start_and_the_re_run_start() -> None:
    """Kaiming weights with zero bias skip about half of all units at step 0; the re-run's width is d/4."""
    torch.manual_seed(0)
    faithful = attach(make_tiny("llama"), "skipgpt-faithful")
    for unit in faithful.units:
        assert unit.router is not None
        assert not unit.router.outer.bias.any()
        assert unit.router.outer.weight.abs().max() > 0.8 * (3 / 64) ** 0.5
    faithful.set_decision(Threshold(0.0))
    with torch.no_grad():
        faithful(random_ids(8, 32))
    assert 0.3 < faithful.routing_stats()["units"] < 0.7
    again = attach(make_tiny("llama"), "skipgpt").units[0]
    assert again.forecaster is None
    assert again.router is not None
    assert again.router.inner is not None
    assert again.router.inner.out_features == 64 // 4


def test_recipes_have_the_facts() -> None:
    faithful, again = recipe_of("skipgpt-faithful"), recipe_of("skipgpt")
    assert (faithful.route.coefficient, faithful.route.tau_start, faithful.route.tau_end) == (8, 5, 1)
    assert (faithful.lora.rank, faithful.lora.targets) == (16, ("q_proj", "v_proj", "gate_proj"))
    assert (again.router.kind, again.router.input, again.route.coefficient) == ("mlp", "normed", 8)
    with pytest.raises(InputError, match="'skipgtp' is not known"):
        recipe_of("skipgtp")


def test_engines_refuse_routers_at_layer_entry_by_name() -> None:
    routed = make_baseline("skipgpt-faithful", hidden_size=64)
    assert "router.input = layer" in (native_reason(routed) or "")
    with pytest.raises(InputError, match=r"router\.input = layer"):
        routed.set_execution("native")
    assert routed.routing_state.execution == "sparse"


# -- released checkpoints -----------------------------------------------------------------------------------


def _released(layers: int = 4, width: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.router_{kind}" for i in range(layers) for kind in ("attention", "mlp")]
    weights = {f"{name}.weight": torch.randn(2, width, generator=generator) for name in names}
    return weights | {f"{name}.bias": torch.randn(2, generator=generator) for name in names}


def test_released_routers_execute_by_class_0() -> None:
    routed, tensors = make_baseline("skipgpt-faithful"), _released()
    load_released(routed, tensors)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for unit in routed.units:
        name = f"model.layers.{unit.index // 2}.router_{'attention' if unit.kind == 'attention' else 'mlp'}"
        logits = x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        assert unit.router is not None
        torch.testing.assert_close(unit.router.margin(x), logits[:, 0] - logits[:, 1])


def _without(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in _released().items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_without("model.layers.2.router_mlp.bias"), "lacks the bias of layer 2 ffn"),
        (_released(layers=5), "has, unlike this model, the bias of layer 4 attention"),
        (_released(width=32), r"has shape \(2, 32\), not \(2, 64\)"),
        ({"model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 64)}, "no tensor of a released SkipGPT router"),
    ],
)
def test_checkpoints_that_do_not_fit_change_nothing(tensors: dict[str, torch.Tensor], message: str) -> None:
    routed = make_baseline("skipgpt-faithful")
    before = {name: parameter.clone() for name, parameter in routed.routing_parameters()}
    with pytest.raises(InputError, match=message):
        load_released(routed, tensors)
    assert all(torch.equal(before[name], parameter) for name, parameter in routed.routing_parameters())


def test_released_routers_need_a_model_of_their_kind() -> None:
    with pytest.raises(InputError, match="mlp routers with input normed"):
        load_released(make_baseline("skipgpt"), _released())


@BOTH
def test_fit_leaves_a_usable_folder(name: str, tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = fitted(name, tiny_folder, text_file, tmp_path / "out")
    check_usable(model, "skipgpt")
    model.save_pretrained(tmp_path / "copy")
    again = RoutedModelForCausalLM.from_pretrained(tmp_path / "copy")
    near = {"base_model": again.routing_config.base_model.model_copy(update={"near": None})}  # seen from elsewhere
    assert again.routing_config.model_copy(update=near) == model.routing_config.model_copy(
        update={"base_model": model.routing_config.base_model.model_copy(update={"near": None})}
    )
