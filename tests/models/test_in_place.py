"""Layers whose code is not understood: units that decide where they are called, and matrices left out of mixers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_types
import torch
from tests.tiny import random_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from informed_routing.config.parts import ForecasterConfig, RouterConfig, SelectionConfig
from informed_routing.errors import InputError
from informed_routing.execution import remembered
from informed_routing.models import in_place
from informed_routing.models.decoder import decoder_of, layers_of
from informed_routing.models.head import lm_head
from informed_routing.models.layer_code import Unread
from informed_routing.models.private import LENGTH, private_matrices
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold

STRUCTURES = (
    *("gpt2", "gpt_neox", "gptj", "falcon", "phi", "cohere"),  # units side by side, other names for layers, one scale
    *("gemma3n_text", "gemma4_text", "deepseek_v4", "minimax"),  # mixed streams, layers with settings of their own
    *("nemotron_h", "falcon_h1", "bamba", "recurrent_gemma"),  # one unit a layer, two mixers, states
    *("opt", "mamba", "xlstm", "longcat_flash"),  # no FFN of their own, no attention, two in a layer
    *("gemma3", "qwen3_5", "fuyu"),  # decoders beside parts for images
)
STATES = ("bamba", "recurrent_gemma", "mamba", "xlstm", "minimax", "nemotron_h", "falcon_h1", "qwen3_5")
"""Whose base model is not the same with padding, or in parts."""


def _routed(name: str) -> Any:
    torch.manual_seed(0)
    model = RoutedModelForCausalLM.attach(tiny_types.make(name), ForecasterConfig(rank=8))
    for unit in model.units:
        for parameter in unit.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.set_decision(Threshold(0.0))
    return model


@pytest.mark.parametrize("name", STRUCTURES)
def test_skipping_is_the_masked_reference_and_all_executed_the_base_model(name: str) -> None:
    routed, ids = _routed(name), random_ids(2, 14)
    found = []
    for execution in ("masked", "sparse"):
        routed.set_execution(execution)
        found.append(routed(ids).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
    assert 0.001 < routed.routing_stats()["macs"] < 0.95
    dense = tiny_types.make(name)(ids).logits
    assert not torch.allclose(found[1], dense, atol=1e-2)
    torch.testing.assert_close(lm_head(routed)(routed.hidden_states(ids)), found[1], atol=1e-3, rtol=1e-3)
    routed.set_sparsity(0)
    assert torch.equal(routed(ids).logits, dense)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name not in STATES])
def test_generated_text_is_that_of_whole_forwards(name: str) -> None:
    routed, ids = _routed(name), random_ids(1, 6)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    text = routed.generate(ids, **given)
    for _ in range(6):
        logits = routed(ids).logits[:, -1:]
        logits[..., 2] = -torch.inf  # the end of a text, which is not to come yet
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    assert torch.equal(text, ids)


@pytest.mark.parametrize(
    ("name", "private"),
    [
        ("phi", {("q_proj", "dense")}),
        ("gpt2", {("c_proj",)}),
        ("gpt_oss", {("q_proj", "o_proj")}),
        ("deepseek_v3", {("q_a_proj", "q_b_proj", "o_proj")}),
        ("glm_moe_dsa", {("q_b_proj", "o_proj")}),  # what q_a_proj makes also chooses keys, which later layers use
        ("qwen3_5_text", {("out_proj", "in_proj_z"), ("q_proj", "o_proj")}),
        ("mamba", {("out_proj",)}),
        ("bloom", {()}),  # adds what it reads
        ("dbrx", {()}),
    ],
)
def test_private_matrices_are_those_that_nobody_else_needs(name: str, private: set[Any]) -> None:
    model = tiny_types.make(name)
    layers = layers_of(model)
    mixers = [getattr(layer, str(in_place.find_mixer(layer, in_place.find_ffn(layer)))) for layer in layers]
    found = private_matrices(decoder_of(model), mixers, random_ids(1, LENGTH))
    assert set(found) == private


def test_private_matrices_are_computed_for_executed_tokens_alone() -> None:
    routed, ids = _routed("phi"), random_ids(1, 24)
    macs = []
    for threshold in (-torch.inf, torch.inf):
        routed.set_decision(Threshold(threshold))
        routed.reset_routing_stats()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            routed.hidden_states(ids)
        macs.append(counter.get_total_flops() / 2)
    units = zip(routed.units, routed.costs, strict=True)
    saved = sum(cost.execute - cost.forecaster for _, cost in units)
    assert macs[0] - macs[1] == 24 * saved


def test_a_folder_says_what_is_private(tmp_path: Path) -> None:
    routed, ids = _routed("phi"), random_ids(1, 9)
    tiny_types.make("phi").save_pretrained(tmp_path / "base")
    routed.save_pretrained(tmp_path / "routed")
    loaded = RoutedModelForCausalLM.from_pretrained(tmp_path / "routed", base=tmp_path / "base", dtype=torch.float32)
    assert loaded.routing_config.private == (("q_proj", "dense"),) * 4
    loaded.set_decision(Threshold(0.0))
    assert torch.equal(loaded(ids).logits, routed(ids).logits)
    for config in (
        loaded.routing_config.model_copy(update={"private": (("q_proj", "other"),) * 4}),
        loaded.routing_config.model_copy(update={"private": (("q_proj", "k_proj", "dense"),) * 4}),
    ):
        with pytest.raises(InputError, match=r"no matrix other|the self-check failed"):
            RoutedModelForCausalLM.attach(tiny_types.make("phi"), routing_config=config)


@pytest.mark.parametrize("name", ["gpt2", "phi", "mamba"])
def test_copies_and_pickles_compute_the_same(name: str) -> None:
    routed, ids = _routed(name), random_ids(1, 7)
    wanted = routed(ids).logits
    assert torch.equal(copy.deepcopy(routed)(ids).logits, wanted)
    assert torch.equal(pickle.loads(pickle.dumps(routed))(ids).logits, wanted)


def test_routers_learn_where_units_are_called() -> None:
    routed, ids = _routed("phi"), random_ids(2, 10)
    routed.train()
    routed.requires_grad_(False)
    for unit in routed.units:
        unit.requires_grad_(True)
    with routed.deciding(lambda logits: torch.sigmoid(logits[..., 1] - logits[..., 0])):
        routed(ids, labels=ids).loss.backward()
    for unit in routed.units:
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in unit.router.parameters())


@torch.no_grad()
def test_a_ranking_router_weighs_both_kinds_of_unit() -> None:
    """What MoD's routers give the updates of chosen tokens reaches them wherever units are called."""
    nothing, ranking = ForecasterConfig(fallback="zero"), RouterConfig(kind="ranking")
    chosen = SelectionConfig(decision="top-k")
    model = RoutedModelForCausalLM.attach(tiny_types.make("phi"), nothing, ranking, selection=chosen)
    ids, dense = random_ids(1, 9), tiny_types.make("phi")(random_ids(1, 9)).logits
    model.set_execution("sparse")
    model.set_decision(Threshold(-torch.inf))  # everything executes
    assert not torch.allclose(model(ids).logits, dense, atol=1e-2)
    state = model.routing_state
    assert set(state.forward.weights) == {unit.index for unit in model.units}
    wanted = tiny_types.make("phi")
    for place, layer in enumerate(wanted.model.layers):
        for index, module in ((2 * place, layer.self_attn), (2 * place + 1, layer.mlp)):
            weight = state.forward.weights[index].unsqueeze(-1)

            def weigh(_: Any, __: Any, output: Any, weight: Any = weight) -> Any:
                return (weight * output[0], *output[1:]) if isinstance(output, tuple) else weight * output

            module.register_forward_hook(weigh)
    torch.testing.assert_close(model(ids).logits, wanted(ids).logits, atol=1e-4, rtol=1e-4)


def test_what_is_not_known_of_such_layers_is_refused() -> None:
    with pytest.raises(InputError, match="the stream of layer 0"):
        RoutedModelForCausalLM.attach(tiny_types.make("phi"), router=RouterConfig(input="residual"))
    with pytest.raises(InputError, match="no FFNs of their own"):
        RoutedModelForCausalLM.attach(tiny_types.make("opt"), selection=SelectionConfig(units="ffn"))
    with pytest.raises(InputError, match="a part of its own that is called decoder"):
        RoutedModelForCausalLM.attach(tiny_types.make("modernbert-decoder"))
    routed = _routed("phi")
    with pytest.raises(InputError, match="outside its layer"):
        routed.decoder.layers[0].mlp(torch.randn(1, 3, 64))


def test_an_ffn_that_mixes_tokens_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remembered, "cache_dir", lambda: tmp_path)
    model = tiny_types.make("phi")
    kind = type(model.model.layers[0].mlp)
    plain = kind.forward

    def mixing(self: Any, hidden_states: Any) -> Any:
        return plain(self, hidden_states.cumsum(1))

    monkeypatch.setattr(kind, "forward", mixing)
    with pytest.raises(InputError, match="the self-check failed"):
        RoutedModelForCausalLM.attach(model)


def test_what_an_ffn_gives_back_is_read() -> None:
    def one(self: Any, x: Any) -> Any:
        return x

    def either(self: Any, x: Any) -> Any:
        if x is None:
            return x, None
        return x

    assert in_place.outputs_of(one) == 0
    with pytest.raises(Unread, match="gives back"):
        in_place.outputs_of(either)


def test_what_adds_its_own_input_is_no_ffn() -> None:
    def plain(self: Any, x: Any) -> Any:
        residuals = x
        x = self.experts(x)
        return x + self.shared(residuals)

    def added(self: Any, x: Any) -> Any:
        before = x
        return self.norm(self.outer(x) + before)

    def grown(self: Any, x: Any) -> Any:
        y = self.outer(x)
        y += x
        return y

    assert [in_place.adds_input(function) for function in (plain, added, grown)] == [False, True, True]
    xlnet = tiny_types.make("xlnet")
    assert in_place.find_ffn(layers_of(xlnet)[0]) is None
