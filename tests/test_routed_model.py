"""What every routed model keeps to, whatever its family.

Each test would have caught a fault of the code that was published with one of the papers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.routed import left_padded, make_routed
from tests.tiny import FAMILIES, make_tiny, random_ids

from informed_routing.errors import InputError
from informed_routing.execution import sparse
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Given, GumbelSample, Threshold
from informed_routing.routing.fallbacks.forecaster import Forecaster
from informed_routing.routing.target import BudgetMeter
from informed_routing.training.route import approximated_shares

TOLERANCE = 2e-4  # float32, logits of order 10 to 100 in these models


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-4, atol=TOLERANCE * float(wanted.abs().max()))


class _PerUnit:
    """A fixed random selection for every unit in turn; the same for every forward of the same length."""

    def __init__(self, gates: list[torch.Tensor]) -> None:
        self.gates, self.calls = gates, 0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        gate = self.gates[self.calls % len(self.gates)]
        self.calls += 1
        return gate


@pytest.mark.parametrize("family", FAMILIES)
def test_all_execute_equals_dense_bit_for_bit(family: str) -> None:
    """More of this in tests/models/test_parity.py."""
    base, routed = make_tiny(family), make_routed(family)
    routed.set_decision(Threshold(float("-inf")))
    ids = random_ids(2, 16)
    mask = left_padded(ids, (0, 4))
    with torch.no_grad():
        wanted = base(ids, attention_mask=mask).logits[mask.bool()]
        assert torch.equal(routed(ids, attention_mask=mask).logits[mask.bool()], wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "phi3"])
@pytest.mark.parametrize("execution", ["sparse", "masked"])
def test_all_approximate_adds_only_forecasts(family: str, execution: str) -> None:
    routed = make_routed(family)
    routed.set_decision(Threshold(float("inf")))
    routed.set_execution(execution)  # type: ignore[arg-type]
    ids = random_ids(1, 10)
    with torch.no_grad():
        hidden = routed.hidden_states(ids)
        decoder = routed.decoder
        scale = decoder.embed_tokens(ids)
        if family == "gemma3_text":
            assert routed.routing_stats()["units"] == 1.0
            return  # its embeddings are scaled inside the decoder
        for layer in decoder.layers:
            for unit in (layer.attention_routing, layer.ffn_routing):
                features = unit.features(scale, unit.unit.normed(layer, scale))
                scale = scale + unit.forecaster(features)
    assert _close(hidden, decoder.norm(scale))


def test_zero_outer_weights_equal_greedy_routing() -> None:
    informed, greedy = make_routed("llama"), make_routed("llama", fallback="zero")
    with torch.no_grad():
        for one, other in zip(informed.units, greedy.units, strict=True):
            assert isinstance(one.forecaster, Forecaster)
            one.forecaster.outer.weight.zero_()
            one.forecaster.outer.bias.zero_()
            assert one.router is not None
            assert other.router is not None
            other.router.load_state_dict(one.router.state_dict())
    ids = random_ids(2, 16)
    for model in (informed, greedy):
        model.set_decision(Threshold(0.0))
    with torch.no_grad():
        assert torch.equal(informed(ids).logits, greedy(ids).logits)
    assert 0.05 < informed.routing_stats()["units"] < 0.95


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    batch=st.integers(1, 3),
    length=st.integers(1, 17),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    kv=st.sampled_from(["keep", "drop"]),
    padded=st.booleans(),
    block=st.sampled_from([1, 3, 128]),
    seed=st.integers(0, 10**6),
)
def test_sparse_equals_masked(
    family: str, batch: int, length: int, share: float, kv: str, padded: bool, block: int, seed: int
) -> None:
    """Random selections, empty and full ones, single tokens, ragged batches, both cache modes, any query block."""
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
        with torch.no_grad(), mock.patch.object(sparse, "QUERY_BLOCK", block):
            found[execution] = routed(ids, attention_mask=mask, use_cache=False).logits
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert _close(found["sparse"][real], found["masked"][real])


_ROUTED = {family: make_routed(family) for family in FAMILIES}


@pytest.mark.parametrize("kv", ["keep", "drop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_then_decode_equals_prefill(family: str, kv: str) -> None:
    """Routing is causal: what a token executes does not depend on later tokens."""
    routed = make_routed(family)
    routed.set_decision(Threshold(0.0))
    routed.set_execution("sparse", kv)  # type: ignore[arg-type]
    ids = random_ids(3, 20)
    mask = left_padded(ids, (0, 2, 5))
    with torch.no_grad():
        whole = routed(ids, attention_mask=mask, use_cache=False).logits
        out = routed(ids[:, :11], attention_mask=mask[:, :11], use_cache=True)
        parts = [out.logits]
        for end in range(12, 21):
            out = routed(
                ids[:, end - 1 : end],
                attention_mask=mask[:, :end],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            parts.append(out.logits)
    real = mask.bool()
    assert _close(torch.cat(parts, 1)[real], whole[real])
    assert 0.05 < routed.routing_stats()["units"] < 0.95


@pytest.mark.parametrize("kv", ["keep", "drop"])
def test_second_generate_equals_the_first(kv: str) -> None:
    routed = make_routed("llama")
    routed.set_decision(Threshold(0.0))
    routed.set_execution("sparse", kv)  # type: ignore[arg-type]
    fresh = copy.deepcopy(routed)
    ids, other = random_ids(2, 9), random_ids(3, 14, seed=5)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    first = routed.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    routed.generate(other, attention_mask=torch.ones_like(other), **settings)
    again = routed.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(first, again)
    assert torch.equal(first, fresh.generate(ids, attention_mask=torch.ones_like(ids), **settings))


def test_eval_is_deterministic_and_training_samples() -> None:
    routed = make_routed("llama")
    ids = random_ids(2, 16)
    routed.set_decision(Threshold(0.0))
    with torch.no_grad():
        assert torch.equal(routed(ids).logits, routed(ids).logits)
        routed.train()
        with routed.deciding(GumbelSample(1.0)):
            one, two = routed(ids).logits, routed(ids).logits
    assert not torch.equal(one, two)


def test_stats_split_units_and_exclude_pads() -> None:
    """The realised share against calibration is checked on the real model in test_demo_pipeline.py."""
    routed = make_routed("llama")
    routed.set_decision(Threshold(0.0))
    ids = random_ids(1, 13)
    with torch.no_grad():
        routed(ids)
        plain = routed.routing_stats()
        routed.reset_routing_stats()
        padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
        routed(padded, attention_mask=left_padded(padded, (6,)))
        with_pads = routed.routing_stats()
    assert with_pads["tokens"] == plain["tokens"] == 13
    for key in ("units", "attention", "ffn"):
        assert with_pads[key] == pytest.approx(plain[key])
    assert plain["units"] == pytest.approx((plain["attention"] + plain["ffn"]) / 2)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_save_and_load_round_trip(family: str, tmp_path: Path) -> None:
    routed = make_routed(family)
    routed.save_pretrained(tmp_path)
    again = RoutedModelForCausalLM.from_pretrained(tmp_path, base=make_tiny(family))
    ids = random_ids(2, 16)
    for model in (routed, again):
        model.set_decision(Threshold(0.0))
    with torch.no_grad():
        assert torch.equal(routed(ids).logits, again(ids).logits)


def test_wrong_base_model_is_refused_by_name(tmp_path: Path) -> None:
    make_routed("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="wrong base model"):
        RoutedModelForCausalLM.from_pretrained(tmp_path, base=make_tiny("llama", seed=3))


def test_damaged_tensors_are_refused(tmp_path: Path) -> None:
    make_routed("llama").save_pretrained(tmp_path)
    path = tmp_path / "routing.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        RoutedModelForCausalLM.from_pretrained(tmp_path, base=make_tiny("llama"))


def test_budget_loss_does_not_see_padding() -> None:
    routed = make_routed("llama").train()
    meter = BudgetMeter(routed.costs, [u.kind for u in routed.units], "units", 8)
    ids = random_ids(2, 10)
    gates = [torch.rand(2, 10) < 0.6 for _ in routed.units]
    wide = [torch.cat([g, torch.ones(2, 5, dtype=torch.bool)], 1) for g in gates]
    found = []
    for tokens, chosen in ((ids, gates), (torch.cat([ids, torch.zeros(2, 5, dtype=torch.long)], 1), wide)):
        mask = torch.zeros_like(tokens)
        mask[:, :10] = 1
        with torch.no_grad(), routed.deciding(_PerUnit(chosen)):
            routed.hidden_states(tokens, mask)
        shares = approximated_shares(routed.routing_state.forward.gates, mask.bool())
        found.append(float(meter.deviation(shares, 0.25, balanced=False)))
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_given_selection_is_used_for_all_units() -> None:
    routed = make_routed("llama")
    gate = torch.tensor([[True, False, True, True]])
    routed.set_decision(Given(gate))
    with torch.no_grad():
        routed(random_ids(1, 4))
    assert torch.equal(routed.token_compute(), gate.float())
