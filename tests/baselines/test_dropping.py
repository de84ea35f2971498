"""Dropped units: no compute, weights or cache entries, and generation as without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.routed import left_padded
from tests.tiny import FAMILIES, make_tiny, random_ids
from torch import Tensor
from transformers import DynamicCache

from informed_routing.baselines.dropping import drop_units
from informed_routing.baselines.remaining import UnitName, dropped_units
from informed_routing.errors import InputError
from informed_routing.training.setup import enable_checkpointing

IDS = random_ids(3, 18)
DROPPED: list[UnitName] = [(0, "attention"), (1, "ffn"), (2, "attention"), (2, "ffn"), (4, "attention")]
LAYERS = 5


def _dropped(family: str, dropped: list[UnitName] = DROPPED, **overrides: Any) -> Any:
    model = make_tiny(family, num_hidden_layers=LAYERS, **overrides)
    drop_units(model, dropped)
    return model


def _silenced(family: str) -> Any:
    """A whole model whose dropped units write nothing: their last linear layer (and norm behind it) is zero."""
    model = make_tiny(family, num_hidden_layers=LAYERS)
    for index, kind in DROPPED:
        layer = model.model.layers[index]
        last = layer.self_attn.o_proj if kind == "attention" else layer.mlp.down_proj
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_model_whose_units_write_nothing(family: str) -> None:
    with torch.no_grad():
        assert torch.equal(_dropped(family)(IDS).logits, _silenced(family)(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_dropped_is_the_dense_model(family: str) -> None:
    model = _dropped(family, [])
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, make_tiny(family, num_hidden_layers=LAYERS)(IDS).logits)
    assert dropped_units(model) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weights_are_left(family: str) -> None:
    model, whole = _dropped(family), make_tiny(family, num_hidden_layers=LAYERS)
    names = {name for name, _ in model.named_parameters()}
    assert names < {name for name, _ in whole.named_parameters()}
    assert not [n for n in names if n.startswith(("model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.2."))]
    assert [n for n in names if n.startswith("model.layers.0.mlp")]
    assert dropped_units(model) == DROPPED


@pytest.mark.parametrize("own", [None, "lazy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_no_cache(family: str, own: str | None) -> None:
    """Left padding, past the sliding window, with the model's own cache and with one that grows layer by layer."""
    model = _dropped(family)
    mask = left_padded(IDS, (0, 3, 7))
    cache = DynamicCache() if own else None
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask, use_cache=False).logits
        out = model(IDS[:, :10], attention_mask=mask[:, :10], past_key_values=cache, use_cache=True)
        parts = [out.logits]
        for end in range(11, IDS.shape[1] + 1):
            out = model(
                IDS[:, end - 1 : end],
                attention_mask=mask[:, :end],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            parts.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-3, atol=5e-3)
    stored = [layer.keys is not None for layer in out.past_key_values.layers]
    assert stored == [False, True, False, True, False]
    assert out.past_key_values.get_seq_length() == IDS.shape[1]


def _generate(model: Any, **settings: Any) -> Tensor:
    ids, mask = IDS[:, :9], left_padded(IDS[:, :9], (0, 2, 4))
    return model.generate(ids, attention_mask=mask, max_new_tokens=7, eos_token_id=None, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "static"],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_generation_equals_no_cache(family: str, settings: dict[str, Any]) -> None:
    model = _dropped(family)
    plain = {key: value for key, value in settings.items() if key != "cache_implementation"}
    wanted = _generate(model, use_cache=False, **plain)
    assert torch.equal(_generate(model, **settings), wanted)
    assert torch.equal(_generate(model, **settings), wanted)  # nothing is left behind by the first call


def test_cache_can_be_cropped() -> None:
    model = _dropped("llama")
    with torch.no_grad():
        cache = model(IDS[:, :12], use_cache=True).past_key_values
        cache.crop(-4)
        assert cache.get_seq_length() == 8
        again = model(IDS[:, 8:], past_key_values=cache).logits
        torch.testing.assert_close(again, model(IDS).logits[:, 8:], rtol=1e-4, atol=1e-3)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = _dropped("llama").train()
        if checkpointing:
            enable_checkpointing(model)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append(model.model.layers[1].self_attn.q_proj.weight.grad)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("dropped", "message"),
    [([(9, "ffn")], "does not exist"), ([(layer, "attention") for layer in range(LAYERS)], "no attention")],
)
def test_impossible_removals_are_refused(dropped: list[UnitName], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _dropped("llama", dropped)
