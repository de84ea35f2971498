"""Static layers on the torch back ends: equal to each other and to what they stand for, cached or not, saved or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.routed import _randomised, execute, left_padded
from tests.tiny import make_tiny, random_ids
from transformers import DynamicCache

from informed_routing.config.folder import RoutingConfig, ThresholdRow
from informed_routing.config.parts import ForecasterConfig, RouterConfig, SelectionConfig
from informed_routing.errors import InputError
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, ExecuteRouted, Threshold
from informed_routing.routing.state import Observation

LAYERS = (2, 4)
FAMILIES = ("llama", "gemma3_text", "smollm3", "olmo2")


def static_model(family: str = "llama", layers: tuple[int, ...] = LAYERS, **forecaster: Any) -> RoutedModelForCausalLM:
    """Five layers of which some are static; routers and forecasters are random."""
    model = RoutedModelForCausalLM.attach(
        make_tiny(family, num_hidden_layers=5),
        ForecasterConfig(rank=8, **forecaster),
        RouterConfig(kind="linear"),
        selection=SelectionConfig(static_layers=layers),
    )
    return _randomised(model, 1)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    return model(ids, **given).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", [ExecuteRouted(), Threshold(0.0)])
def test_sparse_is_masked_and_cached_is_uncached_with_padding(family: str, rule: Any) -> None:
    model, ids = static_model(family), random_ids(2, 12)
    mask = left_padded(ids, (0, 4))
    model.set_decision(rule)
    model.set_execution("masked")
    wanted = logits(model, ids, attention_mask=mask)
    model.set_execution("sparse")
    real = mask.bool()
    assert torch.allclose(logits(model, ids, attention_mask=mask)[real], wanted[real], atol=1e-4)
    cache, parts = DynamicCache(config=model.config), []
    for start, stop in ((0, 6), (6, 9), (9, 10), (10, 12)):
        found = logits(model, ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        parts.append(found)
    assert torch.allclose(torch.cat(parts, 1)[real], wanted[real], atol=1e-4)
    assert [cache.get_seq_length(place) for place in range(5)] == [12, 12, 0, 12, 0]


def test_empty_layers_of_a_cache_are_reordered_repeated_and_cropped() -> None:
    model, ids = static_model(), random_ids(2, 9)
    model.set_decision(Threshold(0.0))
    whole = logits(model, ids)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :7], past_key_values=cache)
    cache.crop(-2)
    cache.reorder_cache(torch.LongTensor([1, 0]))
    swapped = logits(model, ids.flip(0)[:, 5:], past_key_values=cache)
    assert torch.allclose(swapped.flip(0), whole[:, 5:], atol=1e-4)
    beams = model.generate(ids[:1], max_new_tokens=4, num_beams=3, do_sample=False)
    greedy = model.generate(ids[:1], max_new_tokens=1, do_sample=False)
    assert beams.shape == (1, 13)
    assert torch.equal(greedy[0, -1], whole[0, -1].argmax())


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_and_static_is_the_model_without_these_layers_bit_for_bit(family: str) -> None:
    model, ids = static_model(family, fallback="zero"), random_ids(2, 10)
    pruned = make_tiny(family, num_hidden_layers=5)
    decoder: Any = pruned.model
    for place in LAYERS:
        decoder.layers[place].forward = lambda hidden, *_, **__: hidden
    model.set_decision(ExecuteRouted())
    assert torch.equal(logits(model, ids), logits(pruned, ids))


def test_sparsity_0_is_the_original_model_which_does_not_go_on_with_a_cache_that_lacks_keys() -> None:
    model, ids = static_model(), random_ids(1, 8)
    dense = logits(make_tiny("llama", num_hidden_layers=5), ids)
    assert torch.equal(logits(model, ids), dense)
    model.set_decision(ExecuteRouted())
    assert not torch.allclose(logits(model, ids), dense)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :6], past_key_values=cache)
    model.set_sparsity(0)
    assert torch.equal(logits(model, ids), dense)
    with pytest.raises(InputError, match="no keys of layer 2"):
        logits(model, ids[:, 6:], past_key_values=cache)


def test_a_forecaster_of_the_whole_update_makes_a_static_layer_the_layer_itself() -> None:
    model, ids = static_model(layers=(2,)), random_ids(1, 8)
    seen: list[Observation] = []
    for rule in (AlwaysExecute(), ExecuteRouted()):
        using = model.routing_state.using(observer=lambda one: seen.append(one) if one.index == 5 else None)
        with using, model.deciding(rule), torch.no_grad():
            model.hidden_states(ids)
    dense, static = seen
    assert torch.equal(dense.output, static.output)  # layers before it execute in both
    assert torch.allclose(dense.residual + dense.output, dense.after, atol=1e-5)
    assert torch.equal(dense.x, static.x)
    forecaster: Any = model.units[5].forecaster
    assert torch.allclose(static.after, static.residual + forecaster(static.x))


def test_a_slice_of_a_static_layer_reads_its_own_neurons() -> None:
    model, ids = static_model(fallback="slim", slice=0.25), random_ids(1, 8)
    unit, layer = model.units[5], model.decoder.layers[2]
    hidden = torch.randn(1, 3, 64)
    x = unit.unit.normed(layer, hidden)
    forecaster: Any = unit.forecaster
    wanted = unit.unit.run_slice(layer, x, forecaster.index) + forecaster(x)
    assert torch.allclose(unit.forecast(layer, x, x), wanted)
    model.set_decision(Threshold(0.0))
    sparse = logits(model, ids)
    model.set_execution("masked")
    assert torch.allclose(sparse, logits(model, ids), atol=1e-4)


def test_costs_by_hand_and_what_is_counted() -> None:
    model, ids = static_model(layers=(2,)), random_ids(1, 10)
    attention, ffn = model.costs[4:6]
    assert (attention.router, attention.forecaster, ffn.router, ffn.forecaster) == (0, 0, 0, 2 * 64 * 8)
    model.set_decision(ExecuteRouted())
    logits(model, ids)
    found = model.routing_stats()
    assert found["units"] == pytest.approx(2 / 10)
    assert found["kv"] == pytest.approx(1 / 5)
    projections = 64 * 64 * 2 + 64 * 32 * 2
    layer = 10 * (projections + 3 * 64 * 128) + 55 * 2 * 64  # of 10 tokens, which see 55 keys
    assert found["macs"] == pytest.approx((layer - 10 * 2 * 64 * 8) / (5 * layer))
    assert [one["executed"] for one in found["per_unit"][4:6]] == [0, 0]
    assert torch.allclose(model.token_compute(), torch.full((1, 10), 0.8))
    model.reset_routing_stats()
    model.set_sparsity(0)
    logits(model, ids)
    assert model.routing_stats()["macs"] == 0


def calibrated(model: RoutedModelForCausalLM) -> RoutedModelForCausalLM:
    rows = [(-3.0, 0.4, 0.3), (0.0, 0.6, 0.5)]
    table = tuple(ThresholdRow(threshold=t, units=u, attention=u, ffn=u, macs=m) for t, u, m in rows)
    model.with_thresholds(table, "units", 0.5, 32)
    return model


def test_the_dial_begins_at_what_static_layers_save() -> None:
    model = calibrated(static_model())
    model.set_sparsity(0.4)
    assert model.routing_state.decision.threshold == -3.0
    model.set_sparsity(0.5)
    with pytest.raises(InputError, match="the static layers save already"):
        model.set_sparsity(0.2)
    model.set_sparsity(0)
    assert model.routing_state.original


def test_a_saved_model_loads_as_it_was_and_folders_without_static_layers_do_not_name_them(tmp_path: Path) -> None:
    model = calibrated(static_model())
    model.save_pretrained(tmp_path / "routed")
    base = make_tiny("llama", num_hidden_layers=5)
    loaded = RoutedModelForCausalLM.from_pretrained(tmp_path / "routed", base=base)
    assert loaded.routing_config.selection.static_layers == LAYERS
    model.set_sparsity(0.5)
    ids = random_ids(1, 8)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    names = {name for name, _ in loaded.routing_parameters() if name.startswith("layers.2.")}
    assert {name.split(".")[2] for name in names} == {"ffn"}
    assert not any(".router." in name for name in names)
    assert "static_layers" not in SelectionConfig().model_dump()
    assert "static_layers" in RoutingConfig.model_validate(loaded.routing_config.model_dump()).selection.model_dump()


@pytest.mark.parametrize(
    "selection",
    [
        {"static_layers": (0,)},
        {"static_layers": (-1,)},
        {"static_layers": (5,)},
        {"static_layers": (2,), "granularity": "layer"},
        {"static_layers": (2,), "first_tokens": 2},
    ],
)
def test_what_static_layers_do_not_go_with_is_refused(selection: dict[str, Any]) -> None:
    with pytest.raises((InputError, ValidationError)):
        RoutedModelForCausalLM.attach(
            make_tiny("llama", num_hidden_layers=5),
            ForecasterConfig(fallback="zero"),
            selection=SelectionConfig(**selection),
        )


def test_other_refusals_say_why() -> None:
    with pytest.raises(InputError, match="first of its kind"):
        static_model("gemma3_text", layers=(1,))
    model = static_model()
    with pytest.raises(InputError, match="static layers"):
        model.set_execution("sparse", "drop")
    model.set_decision(ExecuteRouted())
    with pytest.raises(InputError, match="output_attentions"):
        logits(model, random_ids(1, 4), output_attentions=True)


@pytest.mark.parametrize("family", ["llama", "smollm3", "qwen3"])
@pytest.mark.parametrize("fallback", ["forecaster", "zero", "slim"])
@pytest.mark.parametrize("rule", [ExecuteRouted(), Threshold(0.0), AlwaysExecute()])
def test_the_cpu_engine_is_the_masked_reference_and_counts_as_it_does(family: str, fallback: str, rule: Any) -> None:
    share: dict[str, Any] = {"slice": 0.25} if fallback == "slim" else {}
    model, ids = static_model(family, fallback=fallback, **share), random_ids(2, 12)
    mask = left_padded(ids, (0, 4))
    real = mask.bool()
    model.set_execution("masked")
    model.set_decision(rule)
    wanted, counted, compute = logits(model, ids, attention_mask=mask), model.routing_stats(), model.token_compute()
    execute(model, "native")
    model.set_decision(rule)
    found = logits(model, ids, attention_mask=mask)
    assert model.routing_state.native.engine is not None
    assert torch.allclose(found[real], wanted[real], atol=1e-3)
    stats = model.routing_stats()
    assert stats.pop("macs") == pytest.approx(counted.pop("macs"))
    assert stats == counted
    if not rule.original:
        assert torch.allclose(model.token_compute()[real], compute[real])
    cache, parts = DynamicCache(config=model.config), []
    for start, stop in ((0, 6), (6, 9), (9, 10), (10, 12)):
        parts.append(logits(model, ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache))
    assert torch.allclose(torch.cat(parts, 1)[real], wanted[real], atol=1e-3)
    kept = 12 if rule.original else 0
    assert [cache.get_seq_length(place) for place in range(5)] == [12, 12, kept, 12, kept]
    if not kept:
        empty: Any = cache.layers[2]
        assert empty.keys is None


@pytest.mark.parametrize(("weights", "like"), [("bfloat16", 0.999), ("int8", 0.999), ("int4", 0.93)])
def test_static_layers_in_every_format(weights: Any, like: float) -> None:
    model, ids = static_model(), random_ids(1, 12)
    model.set_decision(ExecuteRouted())
    wanted = logits(model, ids)
    execute(model, "native", weights=weights)
    found = logits(model, ids)
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > like


def test_caches_of_the_cpu_engine_go_to_torch_and_back_but_not_on_to_the_original() -> None:
    model, ids = static_model(), random_ids(2, 12)
    model.set_decision(Threshold(0.0))
    whole = logits(model, ids)
    execute(model, "native")
    cache = DynamicCache(config=model.config)
    parts = [logits(model, ids[:, :5], past_key_values=cache)]
    cache.reorder_cache(torch.LongTensor([1, 0]))
    cache.reorder_cache(torch.LongTensor([1, 0]))
    model.set_execution("sparse")
    parts.append(logits(model, ids[:, 5:8], past_key_values=cache))
    execute(model, "native")
    logits(model, ids[:, 8:11], past_key_values=cache)
    cache.crop(-3)
    parts.append(logits(model, ids[:, 8:], past_key_values=cache))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-3)
    model.set_sparsity(0)
    with pytest.raises(InputError, match="that were static"):
        logits(model, ids[:, :1], past_key_values=cache)
    fresh = DynamicCache(config=model.config)
    logits(model, ids[:, :5], past_key_values=fresh)
    model.set_decision(Threshold(0.0))
    logits(model, ids[:, 5:8], past_key_values=fresh)
    model.set_sparsity(0)
    with pytest.raises(InputError, match="that were static"):
        logits(model, ids[:, 8:9], past_key_values=fresh)
    fresh.reset()
    assert torch.allclose(
        logits(model, ids, past_key_values=fresh), logits(make_tiny("llama", num_hidden_layers=5), ids), atol=1e-3
    )
