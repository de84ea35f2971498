"""Rows of the table say what transformers' own modules do."""

from __future__ import annotations

from typing import Any

import pytest
from tests.tiny import FAMILIES as TINY
from tests.tiny import make_tiny
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from informed_routing.baselines.footprint import footprint
from informed_routing.errors import InputError
from informed_routing.models.families import FAMILIES, native_families
from informed_routing.routed_model import RoutedModelForCausalLM

EVERY = (*TINY, "olmo3", "granite")


@pytest.mark.parametrize("name", EVERY)
def test_parts_and_settings_are_there(name: str) -> None:
    model, family = make_tiny(name), FAMILIES[name]
    for layer in model.model.layers:
        parts = (family.attention_in_norm, family.attention_out_norm, family.ffn_in_norm, family.ffn_out_norm)
        others = (family.attention_dropout, family.ffn_dropout, family.residual_scale)
        for part in (family.attention, family.ffn, *parts, *others):
            assert part is None or hasattr(layer, part)
        attention = getattr(layer, family.attention or "")
        for fact in (family.rotates, family.attention_scale, family.attention_softcap):
            assert fact is None or hasattr(attention, fact)
        assert hasattr(attention, "qkv_proj") == (family.qkv == "fused")
        assert hasattr(getattr(layer, family.ffn or ""), "gate_up_proj") == (family.gate_up == "fused")
        assert hasattr(attention, "q_norm") == (family.qk_norm != "none")
    for field in (family.activation, family.sliding_window, family.logits_divisor, family.logits_softcap):
        assert field is None or hasattr(model.config, field)


@pytest.mark.parametrize("name", EVERY)
def test_windows_are_those_of_the_modules(name: str) -> None:
    model, family = make_tiny(name), FAMILIES[name]
    for place, layer in enumerate(model.model.layers):
        attention = getattr(layer, family.attention or "")
        if hasattr(attention, "sliding_window"):
            assert family.window(model.config, place) == attention.sliding_window


def test_a_window_counts_only_in_the_layers_that_slide() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = Qwen3Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=5, layer_types=kinds)
    assert [FAMILIES["qwen3"].window(config, layer) for layer in (0, 1)] == [5, None]
    assert FAMILIES["mistral"].window(MistralConfig(sliding_window=7), 1) == 7
    assert FAMILIES["mistral"].window(MistralConfig(sliding_window=None), 1) is None


def test_a_field_that_a_family_does_not_read_is_no_window() -> None:
    settings: dict[str, Any] = {"sliding_window": 7}
    config: Any = LlamaConfig(**settings)
    assert config.sliding_window == 7
    assert FAMILIES["llama"].window(config, 0) is None


@pytest.mark.parametrize("name", ["mistral", "gemma2", "smollm3", "olmo3", "phi3"])
def test_costs_and_footprint_see_the_same_windows(name: str) -> None:
    settings: dict[str, Any] = {"sliding_window": 8} if name == "phi3" else {}
    model = make_tiny(name, **settings)
    base = [footprint(model, context).macs for context in (8, 9, 40)]
    costs = RoutedModelForCausalLM.attach(model).costs
    routed = [sum(cost.dense(context) for cost in costs) for context in (8, 9, 40)]
    assert [b - base[0] for b in base] == [r - routed[0] for r in routed]


def test_layers_without_rotation_are_known() -> None:
    model = make_tiny("smollm3")
    family = FAMILIES["smollm3"]
    found = [family.has_rope(layer.self_attn) for layer in model.model.layers]
    assert found == [bool(flag) for flag in model.config.no_rope_layers]
    assert False in found
    assert True in found
    assert FAMILIES["llama"].has_rope(object())


def test_scores_are_scaled_and_capped_as_the_module_says() -> None:
    attention = make_tiny("gemma2").model.layers[0].self_attn
    family = FAMILIES["gemma2"]
    assert family.scale(attention) == attention.scaling
    assert family.softcap(attention) == attention.config.attn_logit_softcapping
    assert FAMILIES["llama"].softcap(attention) is None


@pytest.mark.parametrize("name", sorted({*native_families("cpu"), *native_families("gpu")}))
def test_native_engines_get_no_part_that_they_lack(name: str) -> None:
    family = FAMILIES[name]
    assert None not in (family.attention_in_norm, family.ffn_in_norm)
    absent = (family.attention_out_norm, family.ffn_out_norm, family.attention_softcap)
    factors = (family.residual_scale, family.embedding_factor, family.logits_divisor)
    assert {*absent, family.logits_softcap, *(factors if "gpu" in family.native else ())} == {None}
    assert family.qk_norm in ("none", "head")


def test_the_families_of_the_native_engines() -> None:
    known = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
    assert native_families("gpu") == known
    assert native_families("cpu") == (*known, "granite")


def test_lora_targets_exist() -> None:
    for name in EVERY:
        names = {key.rsplit(".", 1)[-1] for key, part in make_tiny(name).named_modules() if hasattr(part, "weight")}
        assert set(FAMILIES[name].lora_targets) <= names
    assert set(EVERY) == set(FAMILIES)


def test_what_takes_parts_out_wants_a_family_of_the_table() -> None:
    with pytest.raises(InputError, match="'gemma' is not in the table"):
        footprint(make_tiny("gemma", head_dim=16), 1)
