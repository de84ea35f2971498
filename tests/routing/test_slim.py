"""The slim fallback: some of an FFN's own neurons and a forecast of the rest, by one definition in all torch paths."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tests.routed import left_padded, make_routed
from tests.tiny import FAMILIES, make_tiny, random_ids
from torch.utils.flop_counter import FlopCounterMode

from informed_routing.config.parts import ForecasterConfig, RouterConfig
from informed_routing.errors import InputError
from informed_routing.execution.formats import FORMATS
from informed_routing.execution.gpu.availability import unsupported
from informed_routing.models.families import FAMILIES as ROWS
from informed_routing.models.fingerprint import print_of
from informed_routing.models.slices import slice_output
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, Given, Threshold
from informed_routing.routing.fallbacks.forecaster import Forecaster
from informed_routing.routing.fallbacks.slim import SlimFallback
from informed_routing.routing.limits import work_of
from informed_routing.routing.state import Observation
from informed_routing.routing.target import BudgetMeter
from informed_routing.training.forecast import fit_closed_form, measure, observe
from informed_routing.training.slices import choose_slices

OUT_NORMED = {name for name, row in ROWS.items() if row.ffn_out_norm is not None}


def slim(family: str = "llama", share: float = 0.25, **overrides: Any) -> RoutedModelForCausalLM:
    """A tiny routed model whose slices are random ones."""
    own = {"slice": share, "target": "raw" if family in OUT_NORMED else "update"}
    model = make_routed(family, fallback="slim", forecaster=own, **overrides)
    generator = torch.Generator().manual_seed(3)
    for unit in model.units[1::2]:
        ffn(unit).choose(torch.rand(ffn(unit).of, generator=generator))
    return model


def ffn(unit: Any) -> SlimFallback:
    assert isinstance(unit.forecaster, SlimFallback)
    return unit.forecaster


class _PerUnit:
    def __init__(self, gates: list[torch.Tensor]) -> None:
        self.gates, self.calls = gates, 0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        gate = self.gates[self.calls % len(self.gates)]
        self.calls += 1
        return gate


_ROUTED = {family: slim(family) for family in FAMILIES}


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    batch=st.integers(1, 3),
    length=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    kv=st.sampled_from(["keep", "drop"]),
    padded=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_sparse_equals_masked(
    family: str, batch: int, length: int, share: float, kv: str, padded: bool, seed: int
) -> None:
    routed = _ROUTED[family]
    generator = torch.Generator().manual_seed(seed)
    ids = random_ids(batch, length, seed=seed)
    pads = [0] + [int(torch.randint(0, length, (), generator=generator)) for _ in range(batch - 1)]
    mask = left_padded(ids, tuple(pads)) if padded else None
    gates = [torch.rand(batch, length, generator=generator) < share for _ in routed.units]
    found = {}
    for execution in ("sparse", "masked"):
        routed.set_decision(_PerUnit(gates))
        routed.set_execution(execution, kv)  # type: ignore[arg-type]
        with torch.no_grad():
            found[execution] = routed(ids, attention_mask=mask, use_cache=False).logits
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    largest = float(found["masked"].abs().max())
    assert torch.allclose(found["sparse"][real], found["masked"][real], rtol=1e-4, atol=2e-4 * largest)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_tokens_are_uncached_ones(family: str) -> None:
    routed = slim(family)
    routed.set_decision(Threshold(0.0))
    ids = random_ids(2, 12)
    mask = left_padded(ids, (0, 3))
    with torch.no_grad():
        whole = routed(ids, attention_mask=mask, use_cache=False).logits
        out = routed(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
        parts = [out.logits]
        for end in range(9, 13):
            past = out.past_key_values
            out = routed(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=past, use_cache=True)
            parts.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(
        torch.cat(parts, 1)[real], whole[real], rtol=1e-4, atol=2e-4 * float(whole[real].abs().max())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_neurons_and_no_correction_are_the_unit(family: str) -> None:
    """The slice is the unit's own arithmetic, whatever norms and scales stand around it."""
    routed = slim(family)
    layer = routed.decoder.layers[0]
    unit = layer.ffn_routing
    whole = SlimFallback(64, 1, 128, 128)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.zero_()
        unit.forecaster = whole
        hidden = torch.randn(2, 5, 64)
        x = unit.unit.normed(layer, hidden)
        wanted = unit.unit.update(layer, unit.unit.run(layer, x, None))
        torch.testing.assert_close(unit.forecast(layer, unit.features(hidden, x), x), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_unit_counts_in_its_slice_too() -> None:
    """Layers that are known only whole give what their rows would: the slice of an adapted FFN, before merging."""
    from peft import LoraConfig, get_peft_model

    base = make_tiny("llama")
    mlp = base.model.layers[0].mlp
    x, index = torch.randn(7, 64), torch.tensor([2, 5, 8, 100])
    plain = slice_output(ROWS["llama"], mlp, x, index)
    adapted: Any = get_peft_model(base, LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False))
    with torch.no_grad():
        live = slice_output(ROWS["llama"], mlp, x, index)
        adapted.merge_and_unload()
        merged = slice_output(ROWS["llama"], mlp, x, index)
    assert not torch.allclose(live, plain, atol=1e-2)
    torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_forecast_and_what_came_before_and_no_base_weight() -> None:
    routed = slim()
    routed.requires_grad_(False)
    for unit in routed.units:
        assert unit.forecaster is not None
        unit.forecaster.requires_grad_(True)
    routed.set_decision(Given(torch.zeros(1, 6, dtype=torch.bool)))
    layer = routed.decoder.layers[0]
    unit = layer.ffn_routing
    hidden = torch.randn(1, 6, 64, requires_grad=True)
    with torch.no_grad():
        for parameter in ffn(unit).parameters():
            parameter.zero_()
    unit.forecast(layer, hidden, hidden).square().sum().backward()
    assert hidden.grad is not None
    assert float(hidden.grad.abs().max()) > 0  # through the slice: the forecast is zero
    assert ffn(unit).outer.bias.grad is not None
    assert all(parameter.grad is None for parameter in layer.mlp.parameters())


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_shares_outside_0_to_1_are_refused(share: float) -> None:
    with pytest.raises(ValidationError, match="slice"):
        ForecasterConfig(fallback="slim", slice=share)


@pytest.mark.parametrize(("share", "how"), [(0.01, "none"), (0.99, "all")])
def test_slices_of_no_neuron_and_of_all_are_refused(share: float, how: str) -> None:
    base = make_tiny("llama")
    with pytest.raises(InputError, match=f"is {how} of an FFN's 128 neurons"):
        RoutedModelForCausalLM.attach(base, ForecasterConfig(rank=8, fallback="slim", slice=share))
    RoutedModelForCausalLM.attach(base, ForecasterConfig(rank=8))  # it is as it was


@pytest.mark.parametrize("fallback", ["forecaster", "zero"])
def test_a_slice_of_nothing_is_refused(fallback: str) -> None:
    with pytest.raises(ValidationError, match="slice is for fallback slim"):
        ForecasterConfig(fallback=fallback, slice=0.25)


def test_silu_has_no_closed_form_here_either() -> None:
    with pytest.raises(ValidationError, match="activation"):
        ForecasterConfig(fallback="slim", activation="silu")


def test_a_family_whose_ffn_is_not_known_is_refused_by_name() -> None:
    base = make_tiny("llama")
    with (
        mock.patch.dict(ROWS, llama=replace(ROWS["llama"], gate_up=None)),
        pytest.raises(InputError, match="neurons of a LlamaMLP are not known"),
    ):
        RoutedModelForCausalLM.attach(base, ForecasterConfig(rank=8, fallback="slim"))


@pytest.mark.parametrize("target", ["update", "normalised"])
def test_a_normed_output_needs_the_raw_target(target: Any) -> None:
    with pytest.raises(InputError, match=r"Set forecaster\.target = raw"):
        RoutedModelForCausalLM.attach(
            make_tiny("gemma3_text"), ForecasterConfig(rank=8, fallback="slim", target=target)
        )


def test_the_gpu_engine_says_why_torch_computes() -> None:
    model = slim()
    assert "only the CPU engine computes" in str(unsupported(model))
    assert "slice" not in str(unsupported(make_routed()))


def test_the_form_for_engines_has_the_slice() -> None:
    forms = [unit.forms()[1] for unit in slim().units[:2]]
    assert [form is not None and form.slice is not None for form in forms] == [False, True]


# -- the fit ---------------------------------------------------------------------------------------------------------


def test_the_chosen_neurons_put_out_most() -> None:
    """By hooks: the input of the down projection is what neurons give, its columns are where they go."""
    model = slim(share=0.5)
    rows = random_ids(6, 16)
    seen: dict[int, torch.Tensor] = {}
    weights: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        return lambda _module, given: seen.__setitem__(number, given[0].reshape(-1, 128))

    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(keep(number)) for number, layer in enumerate(model.decoder.layers)
    ]
    observe(
        model,
        rows,
        lambda one: weights.__setitem__(one.index, one.relative_weight),
        AlwaysExecute(),
        batch_size=len(rows),
    )
    for handle in handles:
        handle.remove()
    choose_slices(model, rows)
    for number, layer in enumerate(model.decoder.layers):
        out = (weights[2 * number + 1] * seen[number].square()).sum(0) * layer.mlp.down_proj.weight.square().sum(0)
        wanted = sorted(out.argsort(descending=True)[:64].tolist())
        assert ffn(layer.ffn_routing).index.tolist() == wanted


@pytest.mark.parametrize("family", ["llama", "olmo2", "phi3"])
def test_observers_see_what_the_slice_leaves(family: str) -> None:
    """In dense and in routed forwards, masked: output = slice + rest, by the unit's own input."""
    model = slim(family)
    layers = model.decoder.layers

    def look(one: Observation) -> None:
        unit = model.units[one.index]
        own = unit.own_slice(layers[one.index // 2], one.read)
        if unit.kind == "attention":
            assert own is None
            assert one.rest is one.output
        else:
            assert own is not None
            torch.testing.assert_close(own + one.rest, one.output)
            assert float(own.abs().max()) > 1e-2

    observe(model, random_ids(2, 9), look, AlwaysExecute())
    observe(model, random_ids(2, 9), look, Threshold(0.0))


def explained(fallback: str, family: str, fitted: torch.Tensor, unseen: torch.Tensor, **own: Any) -> list[float]:
    config = ForecasterConfig(rank=8, fallback=fallback, target="raw" if family in OUT_NORMED else "update", **own)
    model = RoutedModelForCausalLM.attach(make_tiny(family), config, RouterConfig(kind="linear"))
    if fallback == "slim":
        choose_slices(model, fitted)
    fit_closed_form(model, fitted, config)
    return measure(model, unseen).explained


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_a_slice_and_a_forecast_explain_more_than_the_forecast(family: str) -> None:
    fitted, unseen = random_ids(24, 64, seed=1), random_ids(8, 64, seed=2)
    plain = explained("forecaster", family, fitted, unseen)
    small, half = (explained("slim", family, fitted, unseen, slice=share) for share in (0.25, 0.5))
    assert plain[0] == pytest.approx(small[0], abs=1e-5)  # attention of the first layer has the same forecaster
    for index in range(1, len(plain), 2):
        assert small[index] >= plain[index]
        assert half[index] > small[index]


# -- costs -----------------------------------------------------------------------------------------------------------


def counted(model: RoutedModelForCausalLM, ids: torch.Tensor) -> float:
    """Multiply-accumulates of all products of a forward of the decoder."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.hidden_states(ids)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_products_are_those_that_costs_say(share: float) -> None:
    """Slim against zero: what an approximated token costs more is forecast and slice, counted in torch itself."""
    ids, gate = random_ids(1, 10), torch.tensor([[True, False] * 5])
    found = {}
    for fallback in ("slim", "zero"):
        own = {"slice": share} if fallback == "slim" else {}
        model = make_routed(fallback=fallback, forecaster=own)
        model.set_decision(Given(gate))
        model.set_execution("sparse")
        found[fallback] = counted(model, ids)
        if fallback == "slim":
            costs = model.costs
            assert model.stats.unit_macs(dense=False).sum() > 0
    assert found["slim"] - found["zero"] == pytest.approx(5 * sum(cost.forecaster for cost in costs))
    assert [cost.slice for cost in costs] == [0, 3 * 64 * 128 * share] * 3
    assert all(cost.forecaster == cost.slice + 2 * 8 * 64 for cost in costs)


def test_training_and_statistics_charge_the_slice() -> None:
    plain, routed = make_routed(), slim(share=0.5)
    everything = torch.ones(len(routed.units))
    kinds = [unit.kind for unit in routed.units]
    meters = [BudgetMeter(model.costs, kinds, "macs", 8) for model in (plain, routed)]
    dense = sum(cost.dense(8) for cost in routed.costs)
    slices = sum(cost.slice for cost in routed.costs)
    saved = [float(meter.saved(everything)) for meter in meters]
    assert saved[0] - saved[1] == pytest.approx(slices / dense, abs=1e-6)
    for model in (plain, routed):
        model.set_decision(Given(torch.zeros(1, 6, dtype=torch.bool)))
        with torch.no_grad():
            model(random_ids(1, 6))
    difference = routed.stats.unit_macs(dense=False) - plain.stats.unit_macs(dense=False)
    assert float(difference.sum()) == pytest.approx(6 * slices)


def test_bytes_of_a_slice_are_the_body_s_where_nothing_else_reads_them() -> None:
    storage = FORMATS["int4"].storage
    for gate, read in ((torch.zeros(1, 3), 1), (torch.tensor([[1, 0, 0]]), 0), (torch.ones(1, 3), 0)):
        moved = []
        for model in (make_routed(), slim(share=0.5)):
            model.set_decision(Given(gate.bool()))
            with torch.no_grad():
                model(random_ids(1, 3))
            moved.append(work_of(model.stats, storage, 0, 0, decode=True, dense=False).total_bytes())
        weights = 3 * 3 * 64 * 64
        assert moved[1] - moved[0] == pytest.approx(read * weights * storage.body)


# -- kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_save_and_load_round_trip(family: str, tmp_path: Path) -> None:
    routed = slim(family)
    routed.save_pretrained(tmp_path)
    stored = load_file(str(tmp_path / "routing.safetensors"))
    index = stored["layers.1.ffn.forecaster.index"]
    assert index.dtype == torch.int64
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == 32
    assert "layers.1.attention.forecaster.index" not in stored
    sizes = {name: tensor.numel() for name, tensor in stored.items() if "ffn.forecaster" in name and "layers.0" in name}
    assert sum(sizes.values()) == 32 + 2 * 8 * 64 + 8 + 64  # no weight of the base model
    again = RoutedModelForCausalLM.from_pretrained(tmp_path, base=make_tiny(family))
    copies = [again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))]
    ids = random_ids(2, 16)
    routed.set_decision(Threshold(0.0))
    with torch.no_grad():
        wanted = routed(ids).logits
        for model in copies:
            model.set_decision(Threshold(0.0))
            assert torch.equal(model(ids).logits, wanted)
    half = RoutedModelForCausalLM.from_pretrained(tmp_path, base=make_tiny(family).to(torch.bfloat16))
    assert ffn(half.units[3]).index.tolist() == index.tolist()
    again.save_pretrained(tmp_path / "more", state_dict=routed.state_dict())
    assert torch.equal(
        load_file(str(tmp_path / "more" / "routing.safetensors"))["layers.1.ffn.forecaster.index"], index
    )


def test_a_slice_does_not_change_what_the_base_model_is_recognised_by() -> None:
    assert print_of(slim()) == print_of(make_tiny("llama"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index.flip(0), "no ascending choice of 128 neurons"),
        (lambda index: index + 120, "no ascending choice"),
        (lambda index: index - 127, "no ascending choice"),
        (lambda index: torch.zeros_like(index), "no ascending choice"),
        (lambda index: index[:-1], "does not fit"),
        (lambda index: index.float(), "does not fit"),
    ],
)
def test_a_damaged_choice_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    slim().save_pretrained(tmp_path)
    path = tmp_path / "routing.safetensors"
    stored = load_file(str(path))
    name = "layers.1.ffn.forecaster.index"
    save_file({**stored, name: change(stored[name]).contiguous()}, str(path))
    with pytest.raises(InputError, match=said):
        RoutedModelForCausalLM.from_pretrained(tmp_path, base=make_tiny("llama"))


def test_folders_without_slices_are_as_they_were(tmp_path: Path) -> None:
    make_routed().save_pretrained(tmp_path)
    assert "slice" not in (tmp_path / "routing_config.json").read_text()
    slim().save_pretrained(tmp_path / "slim")
    assert '"slice": 0.25' in (tmp_path / "slim" / "routing_config.json").read_text()
    assert ForecasterConfig(fallback="slim").share == 0.125
    assert "slice" not in ForecasterConfig().model_dump()


def test_attention_has_the_forecaster_of_the_same_rank() -> None:
    model = slim()
    assert [type(unit.forecaster) for unit in model.units[:2]] == [Forecaster, SlimFallback]
    assert [unit.forecaster.rank for unit in model.units if unit.forecaster] == [8] * 6
