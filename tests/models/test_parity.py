"""A routed model that executes everything is the base model, bit for bit, in every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.routed import left_padded, make_routed
from tests.tiny import FAMILIES, make_tiny, random_ids

from informed_routing.models.families import FAMILIES as TABLE
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, DecisionRule, Threshold

EVERYTHING = pytest.mark.parametrize(
    "decision", [AlwaysExecute(), Threshold(float("-inf"))], ids=["dense", "routers-on"]
)


def _pads(side: str, ids: torch.Tensor) -> torch.Tensor | None:
    if side == "none":
        return None
    mask = left_padded(ids, (0, 3, 5))
    return mask.flip(1) if side == "right" else mask


@pytest.mark.parametrize("execution", ["sparse", "masked"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@EVERYTHING
def test_prefill_equals_base(family: str, side: str, execution: str, decision: DecisionRule) -> None:
    base, routed = make_tiny(family), make_routed(family)
    routed.set_decision(decision)
    routed.set_execution(execution)  # type: ignore[arg-type]
    ids = random_ids(3, 21)
    mask = _pads(side, ids)
    with torch.no_grad():
        wanted = base(ids, attention_mask=mask).logits
        found = routed(ids, attention_mask=mask).logits
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert torch.equal(found[real], wanted[real])


@pytest.mark.parametrize("family", FAMILIES)
@EVERYTHING
def test_cached_decode_equals_base(family: str, decision: DecisionRule) -> None:
    base, routed = make_tiny(family), make_routed(family)
    routed.set_decision(decision)
    ids = random_ids(3, 12)
    mask = left_padded(ids, (0, 2, 4))
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "eos_token_id": None}
    wanted, found = base.generate(ids, **settings), routed.generate(ids, **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))


def test_every_row_of_the_table_is_tested() -> None:
    untested = set(TABLE) - set(FAMILIES)
    assert untested <= {"olmo3", "granite"}, f"add {untested} to tests/tiny.py"


def test_a_routed_model_is_an_ordinary_transformers_model() -> None:
    from transformers import LlamaForCausalLM, PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    routed = make_routed("llama")
    assert isinstance(routed, RoutedModelForCausalLM)
    assert isinstance(routed, LlamaForCausalLM)
    assert isinstance(routed, PreTrainedModel)
    assert routed.config.model_type == "llama"
    # Pipelines and the Trainer's label smoothing look the class up by name.
    assert type(routed).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert "Routed" in repr(type(routed))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_static_cache_gives_the_same_text(family: str, batch: int) -> None:
    routed = make_routed(family, eos_token_id=None)
    routed.set_decision(Threshold(0.0))
    settings: dict[str, Any] = {"input_ids": random_ids(batch, 12), "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(routed.generate(**settings), routed.generate(**settings, cache_implementation="static"))


def test_copies_do_not_share_their_state() -> None:
    routed = make_routed("llama")
    twin = copy.deepcopy(routed)
    twin.set_decision(Threshold(0.0))
    assert routed.routing_state.dense
    assert twin.units[0] is not routed.units[0]
    assert twin.decoder.layers[0].routing_state is twin.routing_state


def test_hidden_states_are_recorded_as_in_the_base() -> None:
    base, routed = make_tiny("llama"), make_routed("llama")
    ids = random_ids(1, 9)
    with torch.no_grad():
        wanted = base(ids, output_hidden_states=True).hidden_states
        found = routed(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_peft_wraps_a_routed_model() -> None:
    from peft import LoraConfig, get_peft_model

    routed = make_routed("llama")
    routed.set_decision(Threshold(0.0))
    ids = random_ids(2, 9)
    with torch.no_grad():
        wanted = routed(ids).logits
        adapted = get_peft_model(routed, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        assert torch.allclose(adapted(input_ids=ids).logits, wanted, atol=1e-5)
