"""A model for images and text: its decoder is routed inside it, and images go through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from informed_routing.assets.empty import load_empty
from informed_routing.config.parts import ForecasterConfig
from informed_routing.execution.inspection import inspect
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold

PATCH, SIDE, MERGED = 14, 4, 2
IMAGE, START, END = 100, 101, 102
"""Tokens of a place in an image, and of its beginning and end."""


def _model() -> Any:
    text = {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 256},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
        **{"patch_size": PATCH, "spatial_merge_size": MERGED, "fullatt_block_indexes": [1], "window_size": 28},
    }
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=vision, **tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and "norm" not in name:
                    weight.mul_(5.0)
                else:
                    weight.add_(torch.randn_like(weight) / 9)
    return model.eval()


def _picture() -> dict[str, Tensor]:
    """A red ring before a gradient, in the patches that the model reads, and a question about it."""
    places = torch.linspace(-1, 1, PATCH * SIDE)
    radius = (places[:, None] ** 2 + places[None] ** 2).sqrt()
    ring = ((radius - 0.6).abs() < 0.15).float()
    image = torch.stack([ring, places[:, None].expand_as(ring) / 2, places[None].expand_as(ring) / 2])
    patches = image.view(3, SIDE // MERGED, MERGED, PATCH, SIDE // MERGED, MERGED, PATCH)
    rows = patches.permute(1, 4, 2, 5, 0, 3, 6).reshape(SIDE * SIDE, 3, 1, PATCH, PATCH).expand(-1, -1, 2, -1, -1)
    merged = (SIDE // MERGED) ** 2
    ids = torch.tensor([[5, START, *([IMAGE] * merged), END, 17, 9, 33]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": rows.reshape(SIDE * SIDE, -1),
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@pytest.fixture
def routed() -> Any:
    torch.manual_seed(0)
    model = RoutedModelForCausalLM.attach(_model(), ForecasterConfig(rank=8))
    for unit in model.units:
        for parameter in unit.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.set_decision(Threshold(0.0))
    return model


@torch.no_grad()
def test_images_go_through_a_routed_decoder(routed: Any) -> None:
    given, found = _picture(), []
    for execution in ("masked", "sparse"):
        routed.set_execution(execution)
        found.append(routed(**given).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
    assert 0.05 < routed.routing_stats()["units"] < 0.95
    other = routed(**{**given, "pixel_values": -given["pixel_values"]}).logits
    assert not torch.allclose(other, found[1], atol=1e-2)
    dense = _model()(**given).logits
    assert not torch.allclose(found[1], dense, atol=1e-2)
    routed.set_sparsity(0)
    assert torch.equal(routed(**given).logits, dense)


@torch.no_grad()
def test_text_about_an_image_is_generated_with_a_cache(routed: Any) -> None:
    given = _picture()
    wanted = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    cached = routed.generate(**given, **wanted)
    assert torch.equal(cached, routed.generate(**given, **wanted, use_cache=False))
    routed.set_execution("masked")
    assert torch.equal(cached, routed.generate(**given, **wanted))


def test_a_model_for_images_is_loaded_saved_and_looked_at(routed: Any, tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "base")
    routed.save_pretrained(tmp_path / "routed")
    from informed_routing.assets import models

    assert models.auto_class("qwen2_5_vl") is AutoModelForImageTextToText
    found = inspect(load_empty(tmp_path / "base"))
    assert (found.layers, found.hidden_size, found.skippable > 0.1) == (3, 64, True)
    assert routed.routing_config.private == (("q_proj", "o_proj"),) * 3
