"""D-LLM: one decision for a layer, evicted keys, every token held to its own depth, routers and LoRA at once."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.baselines.small_fit import SHORT, check_usable, fitted
from tests.interruption import StopAt
from tests.routed import left_padded, make_baseline
from tests.tiny import make_tiny, random_ids
from torch.nn import functional as F

from informed_routing.baselines.dynamic import attach, recipe_of
from informed_routing.config.recipe import RouteStage
from informed_routing.errors import InputError
from informed_routing.execution.choose import native_reason
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, Given, GumbelSample, Threshold
from informed_routing.routing.target import BudgetMeter
from informed_routing.training.fit import fit
from informed_routing.training.token_target import TokenTargetObjective

LAYERS = 4


def _routed() -> RoutedModelForCausalLM:
    model = make_baseline("dllm")
    model.set_decision(Threshold(0.0))
    return model


@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_all_executed_is_the_base_model(execution: str) -> None:
    base, routed = make_tiny("llama", num_hidden_layers=LAYERS), _routed()
    routed.set_execution(execution)  # type: ignore[arg-type]
    ids = random_ids(3, 13)
    mask = left_padded(ids, (0, 2, 5))
    with torch.no_grad():
        wanted = base(ids, attention_mask=mask).logits[mask.bool()]
        routed.set_decision(Threshold(float("-inf")))
        torch.testing.assert_close(routed(ids, attention_mask=mask).logits[mask.bool()], wanted, rtol=1e-3, atol=1e-3)
        routed.set_sparsity(0)
        assert torch.equal(routed(ids, attention_mask=mask).logits[mask.bool()], wanted)


def test_router_by_hand_and_its_start() -> None:
    """d -> 512 -> RMS norm -> SiLU -> 2 on the raw layer input; biases 0.1 and 2.0: 87 % start executed."""
    model = attach(make_tiny("llama", num_hidden_layers=LAYERS), "dllm")
    router: Any = model.units[4].router
    assert router.outer.bias.tolist() == pytest.approx([0.1, 2.0])
    assert torch.sigmoid(router.outer.bias[1] - router.outer.bias[0]).item() == pytest.approx(0.87, abs=0.005)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    inner = x @ router.inner.weight.T + router.inner.bias
    assert inner.shape == (3, 512)
    normed = inner / (inner.square().mean(-1, keepdim=True) + 1e-6).sqrt() * router.norm.weight
    torch.testing.assert_close(router(x), F.silu(normed) @ router.outer.weight.T + router.outer.bias)
    assert [unit.router is not None for unit in model.units] == [False] * 4 + [True, False] * 2
    with pytest.raises(InputError, match="leaves none of 2 layers"):
        attach(make_tiny("llama", num_hidden_layers=2), "dllm")


@pytest.mark.parametrize("sample", [False, True])
def test_one_decision_a_layer_and_what_always_executes(sample: bool) -> None:
    routed = _routed()
    if sample:
        routed.train()
        routed.set_decision(GumbelSample())
    routed.set_execution("masked")
    ids = random_ids(3, 14)
    mask = left_padded(ids, (0, 2, 5))
    routed(ids, attention_mask=mask)
    gates = [routed.routing_state.forward.gates[i].detach().bool() for i in range(2 * LAYERS)]
    for layer in range(LAYERS):
        assert torch.equal(gates[2 * layer], gates[2 * layer + 1])
        assert not gates[2 * layer][~mask.bool()].any()
        if layer < 2:
            assert torch.equal(gates[2 * layer], mask.bool())
        else:
            assert all(gates[2 * layer][row, start : start + 2].all() for row, start in enumerate((0, 2, 5)))
            assert not torch.equal(gates[2 * layer], mask.bool())


def test_the_first_two_tokens_of_a_cached_sequence_are_not_those_of_the_call() -> None:
    routed = _routed()
    routed.set_decision(Threshold(1e9))
    ids = random_ids(1, 6)
    with torch.no_grad():
        out = routed(ids[:, :1], use_cache=True)
        for place in range(1, 6):
            assert bool(routed.routing_state.forward.gates[7].all()) == (place <= 2)
            out = routed(ids[:, place : place + 1], past_key_values=out.past_key_values)


def test_sparse_equals_masked() -> None:
    routed = _routed()
    ids = random_ids(3, 14)
    mask = left_padded(ids, (0, 2, 5))
    found = {}
    stats = {}
    for execution in ("sparse", "masked"):
        routed.set_execution(execution)  # type: ignore[arg-type]
        routed.reset_routing_stats()
        with torch.no_grad():
            found[execution] = routed(ids, attention_mask=mask).logits[mask.bool()]
        stats[execution] = routed.stats.macs()
    torch.testing.assert_close(found["sparse"], found["masked"], rtol=1e-3, atol=1e-3)
    assert stats["sparse"] == pytest.approx(stats["masked"])


class _Leaf:
    """A given gate as a leaf, to see its gradient."""

    def __init__(self, gate: torch.Tensor) -> None:
        self.gate = gate.requires_grad_()

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return self.gate * torch.ones_like(logits[..., 0])


def test_the_router_learns_what_the_whole_layer_would_have_done() -> None:
    """d loss / d gate = <d loss / d output, Layer(x) - x>, for a token that skipped, too."""
    base, routed = make_tiny("llama", num_hidden_layers=3), make_baseline("dllm", num_hidden_layers=3)
    routed.set_execution("masked")
    routed.train()
    gate = torch.ones(1, 9)
    gate[0, -1] = 0  # the last token: no other one attends to it
    leaf = _Leaf(gate)
    routed.set_decision(leaf)
    ids = random_ids(1, 9)
    direction = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []
    routed.decoder.layers[2].register_forward_hook(lambda _m, _i, output: kept.append(output))
    routed.decoder(ids, use_cache=False)
    (kept[0] * direction).sum().backward()
    with torch.no_grad():
        entry = base.model(ids, output_hidden_states=True).hidden_states[2]
        rope = base.model.rotary_emb(entry, torch.arange(9)[None])
        full = base.model.layers[2](entry, position_embeddings=rope, attention_mask=None)
        wanted = ((full - entry) * direction).sum(-1)
    assert leaf.gate.grad is not None
    torch.testing.assert_close(leaf.gate.grad, wanted, rtol=1e-3, atol=1e-3)


def test_every_token_is_held_to_its_own_depth() -> None:
    routed = make_baseline("dllm")
    meter = BudgetMeter(routed.costs, [unit.kind for unit in routed.units], "units", 8)
    config = RouteStage(sparsity=0.25, coefficient=5, steps=11, penalty="token", tau_start=1, tau_end=1, noise_end=1)
    objective = TokenTargetObjective(routed, config, meter)
    gate = (torch.rand(2, 10, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    ids = random_ids(2, 10)
    mask = left_padded(ids, (0, 3))
    routed.set_execution("masked")
    with torch.no_grad(), routed.deciding(Given(gate.bool())):
        routed(ids, attention_mask=mask)
    depth = (2 + 2 * gate) / LAYERS  # layers 0 and 1 always execute
    counted = torch.zeros(2, 10, dtype=torch.bool)
    counted[0, 2:], counted[1, 5:] = True, True  # neither padding nor first tokens
    mean = float((depth - 0.75).abs()[counted].mean())
    for step in (0, 5, 10):
        wanted = 5 * math.sin(math.pi / 2 * step / 10) * mean
        assert float(objective.penalty(step, torch.zeros(8), mask.bool())) == pytest.approx(wanted, abs=1e-6)


# -- the cache ------------------------------------------------------------------------------------------------


def test_skipped_tokens_leave_no_rows_in_the_cache() -> None:
    routed = _routed()
    ids = random_ids(1, 24)
    with torch.no_grad():
        out = routed(ids[:, :20], use_cache=True)
        executed = [routed.routing_state.forward.gates[2 * layer].sum() for layer in range(LAYERS)]
        for place in range(20, 24):
            out = routed(ids[:, place : place + 1], past_key_values=out.past_key_values)
            for layer in range(LAYERS):
                executed[layer] += routed.routing_state.forward.gates[2 * layer].sum()
    kept = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert kept == [int(count) for count in executed]
    assert kept[:2] == [24, 24]
    assert max(kept[2:]) < 24
    assert out.past_key_values.get_seq_length() == 24


def test_a_second_generation_equals_a_fresh_models() -> None:
    """The published code leaves old keys behind where a decode step skips."""
    routed = _routed()
    fresh = copy.deepcopy(routed)
    first, second = random_ids(2, 15), random_ids(2, 9, seed=5)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    routed.generate(first, **settings)
    assert torch.equal(routed.generate(second, **settings), fresh.generate(second, **settings))


def test_decode_equals_prefill() -> None:
    routed = _routed()
    ids = random_ids(2, 16)
    with torch.no_grad():
        whole = routed(ids, use_cache=False).logits
        out = routed(ids[:, :9], use_cache=True)
        parts = [out.logits]
        for place in range(9, 16):
            out = routed(ids[:, place : place + 1], past_key_values=out.past_key_values)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)


def test_macs_by_hand_in_prefill_and_decode() -> None:
    """Router once a layer, keys and values of executed tokens only, and no evicted key is read."""
    routed = _routed()
    ids = random_ids(1, 15)
    with torch.no_grad():
        routed(ids, use_cache=False)
        gates = [routed.routing_state.forward.gates[i][0] for i in range(2 * LAYERS)]
        dense = spent = 0.0
        for cost, gate, unit in zip(routed.costs, gates, routed.units, strict=True):
            count = int(gate.sum())
            dense += 15 * (cost.always + cost.execute) + cost.per_key * 15 * 16 / 2
            spent += count * (cost.always + cost.execute) + cost.per_key * count * (count + 1) / 2
            spent += 15 * cost.router
            assert cost.router == (64 * 512 + 512 * 2 if unit.index in (4, 6) else 0)
        assert routed.stats.macs() == (pytest.approx(dense), pytest.approx(spent))
        skipped = 15 * LAYERS - sum(int(gates[2 * layer].sum()) for layer in range(LAYERS))
        assert routed.routing_stats()["kv"] == pytest.approx(skipped / (15 * LAYERS))
        routed.reset_routing_stats()
        cache = routed(ids[:, :10], use_cache=True).past_key_values
        for place in range(10, 15):
            routed(ids[:, place : place + 1], past_key_values=cache)
    assert routed.stats.macs() == (pytest.approx(dense), pytest.approx(spent))


def test_engines_refuse_by_name() -> None:
    assert native_reason(make_baseline("dllm")) == "normed-mlp routers"


# -- fit ------------------------------------------------------------------------------------------------------


def test_fit_leaves_a_usable_folder(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    model = fitted("dllm", tiny_folder, text_file, tmp_path / "out")
    check_usable(model, "d-llm")
    assert model.routing_state.kv == "drop"
    adapter = json.loads((tmp_path / "out" / "lora" / "adapter_config.json").read_text())
    assert (adapter["r"], sorted(adapter["target_modules"])) == (8, ["k_proj", "q_proj", "v_proj"])
    report = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert report["stages"]["joint"]["train"]["tokens"] == 6 * 2 * 32
    model.set_decision(AlwaysExecute())


def test_joint_training_moves_both_parts_and_resumes_exactly(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    overrides = {**SHORT, "model": str(tiny_folder), "data": [str(text_file)], "route.checkpoint_every": 2}
    recipe = recipe_of("dllm").with_overrides(overrides)
    fit(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "parts", progress=StopAt("joint", 4))
    fit(recipe, tmp_path / "parts", resume=True)
    for name in ("routing.safetensors", "lora/adapter_model.safetensors"):
        wanted, found = load_file(str(tmp_path / "whole" / name)), load_file(str(tmp_path / "parts" / name))
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    adapter = load_file(str(tmp_path / "whole" / "lora" / "adapter_model.safetensors"))
    assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
