"""The profitability switch of the torch back end: what does not pay is executed whole, and said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_types
import torch
from tests.tiny import make_tiny, random_ids
from torch import nn

from informed_routing.config.parts import ForecasterConfig
from informed_routing.errors import InputError
from informed_routing.execution import worth
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold
from informed_routing.routing.rules.base import GivenByUnit


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(worth, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(worth, "_FOUND", {})
    return tmp_path / "torch-prices"


def _routed(model: Any) -> Any:
    torch.manual_seed(0)
    routed = RoutedModelForCausalLM.attach(model, ForecasterConfig(rank=8))
    for unit in routed.units:
        for parameter in unit.parameters():
            nn.init.normal_(parameter, std=0.3)
    routed.set_execution("sparse", policy="auto")
    routed.set_decision(Threshold(0.0))
    return routed


def _prices(monkeypatch: pytest.MonkeyPatch, **kinds: bool) -> list[str]:
    """Say which kinds of unit pay; the list is of those that were measured."""
    asked: list[str] = []

    def measured(skip: Any, routed: Any, *_: Any) -> dict[str, float]:
        asked.append(routed.kind)
        return {"whole": 1.0, **dict.fromkeys(("none", "half", "all"), 0.5 if kinds[routed.kind] else 1.5)}

    monkeypatch.setattr(worth, "_measured", measured)
    return asked


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_units_that_do_not_pay_are_executed_whole(name: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    make = make_tiny if name == "llama" else tiny_types.make
    routed, ids = _routed(make(name)), random_ids(2, 12)
    exact = _routed(make(name))
    exact.set_execution("sparse")
    asked = _prices(monkeypatch, attention=False, ffn=False)
    assert torch.equal(routed(ids).logits, make(name)(ids).logits)
    shares = routed.routing_stats()
    assert shares["units"] == 0
    assert {unit["rounded_up"] for unit in shares["per_unit"]} == {1.0}
    assert sorted(set(asked)) == ["attention", "ffn"]
    assert len(list(cache.glob("*.json"))) == len(asked) == 2  # layers are alike

    monkeypatch.setattr(worth, "_FOUND", {})
    routed.routing_state.pays.clear()
    monkeypatch.setattr(worth, "_measured", lambda *_: pytest.fail("measured twice"))
    routed(ids)
    monkeypatch.setattr(worth, "_FOUND", {})
    routed.routing_state.pays.clear()
    for path in cache.glob("*.json"):
        path.unlink()
    _prices(monkeypatch, attention=True, ffn=True)
    torch.testing.assert_close(routed(ids).logits, exact(ids).logits)


@torch.no_grad()
def test_margins_that_are_asked_for_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    routed, ids = _routed(make_tiny("llama")), random_ids(1, 12)
    _prices(monkeypatch, attention=False, ffn=False)
    routed(ids)
    with routed.routing_state.using(record_margins=True):
        routed(ids)
    assert len(routed.routing_state.forward.margins) == len(routed.units)


@torch.no_grad()
def test_each_kind_is_asked_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    routed = _routed(make_tiny("llama"))
    _prices(monkeypatch, attention=False, ffn=True)
    routed(random_ids(1, 12))
    shares = routed.routing_stats()
    assert (shares["attention"], shares["ffn"] > 0.1) == (0, True)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "gpt2", "qwen3_5_text", "mamba", "deepseek_v3"])
def test_prices_are_measured_on_the_call_at_hand(name: str, cache: Path) -> None:
    routed = _routed(make_tiny(name) if name == "llama" else tiny_types.make(name))
    ids = random_ids(1, 9)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert routed.generate(ids, **given).shape == (1, 12)
    assert len(list(cache.glob("*.json"))) >= 2  # of the prompt and of single tokens


@torch.no_grad()
def test_prices_are_read_for_the_share_that_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = {"whole": 1.0, "none": 0.2, "half": 0.6, "all": 1.4}
    monkeypatch.setattr(worth, "_measured", lambda *_: prices)
    for share, pays in ((0.0, True), (0.5, True), (0.75, False), (1.0, False)):
        routed = _routed(make_tiny("llama"))
        routed.routing_state.choose(share=share)
        routed(random_ids(1, 16))
        assert set(routed.routing_state.pays.values()) == {pays}


@torch.no_grad()
def test_a_share_that_was_seen_is_the_one_that_is_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    routed, ids = _routed(make_tiny("llama")), random_ids(1, 16)
    _prices(monkeypatch, attention=True, ffn=True)
    gates = torch.ones(len(routed.units), 1, 16, dtype=torch.bool)
    gates[:, :, 4:] = False
    routed.set_decision(GivenByUnit(gates))
    routed(ids)
    assert set(routed.routing_state.shares.values()) == {0.25}


def test_what_it_does_not_go_with_is_refused() -> None:
    routed = _routed(make_tiny("llama"))
    with pytest.raises(InputError, match="masked execution computes everything"):
        routed.set_execution("masked", policy="auto")
    with pytest.raises(InputError, match="does not go with kv='drop'"):
        routed.set_execution("sparse", "drop", policy="auto")
