"""Families that are not in the table: understood by their code, as far as it goes, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_types
import torch
from tests.tiny import FAMILIES as TINY
from tests.tiny import OTHERS, make_tiny, random_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from informed_routing.config.parts import ForecasterConfig, SelectionConfig
from informed_routing.errors import InputError
from informed_routing.execution import remembered, self_check
from informed_routing.execution.cpu import build
from informed_routing.models import source
from informed_routing.models.discover import family_of
from informed_routing.models.families import FAMILIES
from informed_routing.models.head import base_logits, lm_head
from informed_routing.models.layer_code import Passed, Unread, read_layer, told
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold

READ = (
    "gemma",
    "ministral",
    "glm4",
    "helium",
    "hyperclovax",
    "qwen3_moe",
    "mixtral",
    "arcee",
    "ernie4_5",
    "granitemoeshared",
)
"""Whose attention is one of the table's; of the others it runs whole but for its private matrices."""


def _routed(name: str, **overrides: Any) -> RoutedModelForCausalLM:
    torch.manual_seed(0)
    model = RoutedModelForCausalLM.attach(make_tiny(name, **overrides), ForecasterConfig(rank=8))
    for unit in model.units:
        for parameter in unit.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.set_decision(Threshold(0.0))
    return model


@pytest.mark.parametrize("name", [*TINY, "olmo3", "granite"])
def test_code_says_what_the_table_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(name)
    row = FAMILIES[name]
    monkeypatch.setattr("informed_routing.models.discover.FAMILIES", {})
    found = family_of(model)
    parts = ("attention_in_norm", "attention_out_norm", "ffn_in_norm", "ffn_out_norm", "attention", "ffn")
    others = ("attention_dropout", "ffn_dropout", "residual_scale", "qkv", "gate_up", "qk_norm", "rotates")
    scores = ("attention_scale", "attention_softcap", "logits_divisor", "logits_softcap", "in_parts")
    for field in (*parts, *others, *scores):
        assert getattr(found, field) == getattr(row, field), field


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_known_of_each(name: str) -> None:
    routed = _routed(name)
    assert routed.routing_config.selection.units == "both"
    assert all(unit.router is not None for unit in routed.units)
    families = [unit.unit.family for unit in routed.units if unit.kind == "attention"]
    assert all(family.in_parts == (name in READ) == (family.private == ()) for family in families)
    assert not any(family.in_place for family in families)


@pytest.mark.parametrize("name", OTHERS)
def test_skipping_is_the_masked_reference(name: str) -> None:
    routed, ids = _routed(name), random_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = []
    for execution in ("masked", "sparse"):
        routed.set_execution(execution)  # type: ignore[arg-type]
        found.append(routed(ids, attention_mask=mask).logits)
    assert 0.03 < routed.routing_stats()["macs"] < 0.95
    torch.testing.assert_close(found[0][1], found[1][1], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found[0][0, 5:], found[1][0, 5:], atol=2e-4, rtol=1e-3)
    dense = make_tiny(name)(ids, attention_mask=mask).logits
    assert not torch.allclose(found[1], dense, atol=1e-2)
    routed.set_sparsity(0)
    assert torch.equal(routed(ids, attention_mask=mask).logits, dense)


@pytest.mark.parametrize("name", OTHERS)
def test_a_cached_text_is_the_whole_one(name: str) -> None:
    routed, ids = _routed(name), random_ids(1, 12)
    whole = routed(ids).logits
    cache = DynamicCache(config=routed.config)
    parts = [routed(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 7), (7, 8), (8, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_macs_are_those_that_are_computed(name: str) -> None:
    """Of one FFN for one token, with as many experts as it goes to."""
    routed = RoutedModelForCausalLM.attach(make_tiny(name, experts_implementation="eager"))
    for unit, cost in zip(routed.units, routed.costs, strict=True):
        if unit.kind != "ffn":
            continue
        layer = routed.decoder.layers[unit.index // 2]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unit.unit.run(layer, torch.randn(1, 1, 64), _nothing())
        assert cost.execute == counter.get_total_flops() / 2


def _nothing() -> Any:
    from informed_routing.models.calls import NOTHING

    return NOTHING


def test_what_cannot_be_routed_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match=r"attention of layer 0 \(BloomAttention\) cannot be routed"):
        RoutedModelForCausalLM.attach(make_tiny("bloom"))
    for selection in (SelectionConfig(static_layers=(1,)), SelectionConfig(granularity="layer")):
        with pytest.raises(InputError, match=r"attention of layer 0 \(DeepseekV3Attention\) cannot be routed"):
            RoutedModelForCausalLM.attach(make_tiny("deepseek_v3"), selection=selection)
    routed = RoutedModelForCausalLM.attach(make_tiny("deepseek_v3"))
    with pytest.raises(InputError, match="drop no keys"):
        routed.set_execution("sparse", "drop")


def test_routers_of_experts_are_not_recorded_while_tokens_skip_them() -> None:
    routed = _routed("qwen3_moe")
    with pytest.raises(InputError, match="output_router_logits"):
        routed(random_ids(1, 5), output_router_logits=True)
    routed.set_sparsity(0)
    assert routed(random_ids(1, 5), output_router_logits=True).router_logits is not None


class _Layer(nn.Module):
    """A layer that is not of the library."""

    def forward(self, hidden_states: Any, attention_mask: Any = None) -> Any:
        return hidden_states


def test_code_that_says_something_else_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unread, match="_Layer is not that of transformers"):
        read_layer(_Layer())
    model = make_tiny("llama")
    layer = model.model.layers[0]
    kind = type(layer)

    def clamped(self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = residual + hidden_states.clamp(-1, 1)
        return hidden_states

    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", clamped)
        with pytest.raises(Unread, match="clamp"):
            read_layer(layer)
    layer.__class__ = type("Mine", (kind,), {"forward": clamped, "__module__": __name__})
    with pytest.raises(Unread, match="Mine is not that of transformers"):
        read_layer(layer)


def test_the_same_code_is_told_from_other_code() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention

    assert source.same_code(LlamaAttention.forward, Qwen2MoeAttention.forward)
    assert not source.same_code(LlamaRMSNorm.forward, GemmaRMSNorm.forward)
    assert not source.same_code(len, len)  # without source nothing is known


@pytest.mark.parametrize("name", ["ministral3", "olmo", "diffllama", "hunyuan_v1_dense", "glm4_moe", "starcoder2"])
def test_an_attention_that_only_looks_like_one_that_is_known_runs_whole(name: str) -> None:
    """Scaled queries at long positions, clipped ones, norms behind the rotation: few tokens would not show it."""
    family = family_of(tiny_types.make(name))
    assert (family.in_parts, family.native) == (False, ())


@pytest.mark.parametrize(
    "name", ["ernie4_5", "helium", "hyperclovax", "gemma", "glm4", "emu3", "granite_swa", "ministral"]
)
def test_engines_do_not_know_what_differs_in_some_part(name: str) -> None:
    """Interleaved rotation, rotation of a part, factors, other norms and dropouts: shapes are those of Llama."""
    assert family_of(tiny_types.make(name)).native == ()


@pytest.mark.parametrize("name", ["internlm3", "iquestcoder"])
def test_engines_know_what_is_the_code_of_a_family_that_they_know(name: str) -> None:
    model = tiny_types.make(name)
    assert family_of(model).native == ("cpu", "gpu")
    if build.compiler() is not None:
        routed = RoutedModelForCausalLM.attach(model, ForecasterConfig(rank=8))
        routed.set_execution("native")  # compared with the torch back ends
        with torch.no_grad():
            assert routed.runs_native


def test_logits_that_another_head_makes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remembered, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(self_check, "lm_head", lambda model: lambda hidden: 2 * model.lm_head(hidden))
    with pytest.raises(InputError, match="logits are not those of the head"):
        RoutedModelForCausalLM.attach(make_tiny("qwen3_moe"))


@pytest.mark.parametrize("name", ["hyperclovax", "granitemoeshared", "gemma"])
def test_heads_that_were_read_make_the_base_models_logits(name: str) -> None:
    model, ids = make_tiny(name), random_ids(1, 6)
    hidden = model.model(ids).last_hidden_state
    torch.testing.assert_close(base_logits(model, hidden), model(ids).logits)
    torch.testing.assert_close(lm_head(model)(hidden), model(ids).logits)


def test_what_a_layer_does_not_pass_on_does_not_reach_its_attention() -> None:
    layer = make_tiny("gpt_oss").model.layers[0]
    passed = Passed((("cache_params", "past_key_values"),), rest=False)
    given = {"past_key_values": "cache", "use_cache": True, "other": 1}
    assert told(passed, layer, given) == {"cache_params": "cache"}
    assert told(passed._replace(rest=True), layer, given) == {"cache_params": "cache", "other": 1}
