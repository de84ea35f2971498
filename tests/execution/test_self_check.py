"""A model that does not compute here what it must is refused when routing is attached, and left as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import FAMILIES, make_tiny, random_ids
from torch import Tensor
from transformers import DynamicCache

from informed_routing import RoutedModelForCausalLM
from informed_routing.errors import InputError
from informed_routing.execution import remembered, self_check, sparse
from informed_routing.execution.cpu import build
from informed_routing.execution.cpu.packing import Packer
from informed_routing.execution.formats import Format
from informed_routing.models import calls
from informed_routing.models.families import Family, native_families

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "cache_dir", lambda: tmp_path)


def test_an_argument_of_an_unknown_name_is_found_by_its_type_or_left_to_the_base_model() -> None:
    cache, mask = DynamicCache(), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    call = calls.read({"memory": cache, "allowed": mask, "turns": (torch.ones(1, 3, 4),) * 2, "use_cache": True})
    assert (call.cache, call.mask, call.use_cache, call.options) == (cache, mask, True, {})
    assert call.rope is not None
    assert calls.read({"sequence_lengths": [3, 4], "output_attentions": False}).options == {"sequence_lengths": [3, 4]}
    assert calls.read({"cache": cache, "past_key_values": DynamicCache()}).options.keys() == {"past_key_values"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family: str, tmp_path: Path) -> None:
    model = make_routed(family)
    if family in native_families("cpu") and build.compiler():
        model.set_execution("native")
    assert len(list((tmp_path / "self-checks").iterdir())) == 1 + (model.routing_state.native is not None)


def test_what_passed_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    make_routed("llama")
    monkeypatch.setattr(self_check, "_states", lambda *_: pytest.fail("checked twice"))
    make_routed("llama")
    with pytest.raises(pytest.fail.Exception):
        make_routed("llama", num_hidden_layers=4)  # another shape


def _refused(model: Any, match: str) -> str:
    with pytest.raises(InputError, match=match) as error:
        RoutedModelForCausalLM.attach(model)
    return str(error.value)


def test_a_renamed_argument_is_an_error_that_names_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny("llama")
    ids = random_ids(1, 9)
    before = model(ids).logits
    read = calls.read
    monkeypatch.setattr(calls, "read", lambda given: dataclasses.replace(read(given), cache=None))
    text = _refused(model, "cached tokens are not uncached ones")
    assert "transformers 5." in text
    assert "torch 2." in text
    assert "--skip-self-check" in text
    # the dense model is what it was
    assert type(model).__module__.startswith("transformers.")
    assert not any("routing" in name for name in [*vars(model), *vars(model.model), *model.state_dict()])
    assert torch.equal(model(ids).logits, before)
    monkeypatch.setenv(self_check.SKIP_VARIABLE, "1")
    RoutedModelForCausalLM.attach(model)


def test_a_wrong_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = sparse.attend_causal

    def one_more(
        family: Family, attention: Any, q: Tensor, keys: Tensor, values: Tensor, last: Tensor, block: int
    ) -> Tensor:
        return attend(family, attention, q, keys, values, (last + 1).clamp(max=keys.shape[-2] - 1), block)

    monkeypatch.setattr(sparse, "attend_causal", one_more)
    _refused(make_tiny("llama"), "skipping is not the masked reference")


def test_a_base_that_computes_another_thing_when_routed_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from informed_routing.models.units import Unit

    update = Unit.update
    monkeypatch.setattr(Unit, "update", lambda self, layer, output: 1.001 * update(self, layer, output))
    _refused(make_tiny("qwen2"), "with everything executed it is not the base model")


@needs_compiler
def test_a_stale_packed_weight_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_routed("llama")
    pack = Packer.linear

    def stale(self: Packer, weight: Tensor, bias: Any, kind: Format) -> Any:
        return pack(self, 1.01 * weight if weight.shape == (64, 128) else weight, bias, kind)

    monkeypatch.setattr(Packer, "linear", stale)
    with pytest.raises(InputError, match="skipping is not the masked reference"):
        model.set_execution("native")
    assert model.routing_state.native is None
    monkeypatch.undo()
    model.set_execution("native")


def test_the_check_leaves_statistics_and_settings_alone() -> None:
    model = make_routed("llama")
    assert model.routing_stats()["tokens"] == 0
    assert model.routing_state.dense
    assert model.routing_state.execution == "sparse"
    assert not model.routing_state.forward.gates
    assert make_tiny("llama").train().training
    assert RoutedModelForCausalLM.attach(make_tiny("llama").train()).training


def test_a_model_whose_forwards_were_replaced_is_refused() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = make_tiny("llama")
    add_hook_to_module(model.model.layers[1], AlignDevicesHook("cpu"))
    assert "remove_hook_from_module" in _refused(model, "LlamaDecoderLayer has a forward of its own")
    remove_hook_from_module(model, recurse=True)
    RoutedModelForCausalLM.attach(model)


@needs_compiler
def test_a_model_without_finite_numbers_is_not_taken_for_a_wrong_version() -> None:
    base = make_tiny("llama")
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
    model = RoutedModelForCausalLM.attach(base)
    model.set_execution("native")
    assert model.routing_state.execution == "native"
