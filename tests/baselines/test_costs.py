"""Parameters, MACs and KV cache of the models that the paper prunes against counts by hand and the paper's."""

from __future__ import annotations

from typing import Any

import pytest
from tests.tiny import make_tiny, random_ids
from transformers import LlamaConfig, MistralConfig

from informed_routing.baselines.depth_pruning import remove_layers
from informed_routing.baselines.dropping import drop_units
from informed_routing.baselines.footprint import footprint
from informed_routing.baselines.shapes import SlicedShapes, empty_model
from informed_routing.baselines.static import prune, shape_report
from informed_routing.errors import InputError

_COMMON: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_COMMON
)
LLAMA_3B = LlamaConfig(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    tie_word_embeddings=True,
    **_COMMON,
)
PREFILL_2K = (2048 + 1) / 2


def test_dense_llama_8b() -> None:
    """Per layer: Q and O 33.55M, K and V 8.39M, MLP 176.16M weights."""
    found = footprint(empty_model(LLAMA_8B), PREFILL_2K)
    weights = 32 * (33_554_432 + 8_388_608 + 176_160_768)
    assert found.parameters == 8_030_261_248
    assert found.body_parameters == weights + 32 * 2 * 4096
    assert found.macs == weights + 32 * 2 * 4096 * PREFILL_2K
    assert found.kv_elements == 32 * 2 * 1024
    assert found.kv_bytes(2) == 131_072


def test_dense_llama_3b_counts_tied_embeddings_once() -> None:
    assert footprint(empty_model(LLAMA_3B), 1).parameters == 3_212_749_824


@pytest.mark.parametrize("method", ["shortgpt", "shortened-ppl", "shortened-taylor"])
@pytest.mark.parametrize("context", [PREFILL_2K, 16_384])
def test_eight_of_32_blocks_are_a_quarter_of_the_body(method: str, context: float) -> None:
    """Table 1.3, last row: 25.0 % of the MACs at every length; section 8.1: 21.7 % of all parameters."""
    report = shape_report(LLAMA_8B, method, 0.25, context=context)
    saved = report.saved()
    assert len(report.removed) == 8
    assert saved["macs"] == saved["body_parameters"] == saved["kv_elements"] == 0.25
    assert saved["parameters"] == pytest.approx(0.217, abs=5e-4)


def test_forty_percent_is_thirteen_blocks() -> None:
    assert len(shape_report(LLAMA_8B, "shortgpt", 0.4, context=1).removed) == 13


def test_half_of_the_attention_units() -> None:
    """25 % of all units. Unlike in table 1.3, keys and values of dropped attention are saved as well."""
    saved = shape_report(LLAMA_8B, "llm-drop-attention", 0.25, context=PREFILL_2K).saved()
    attention = 33.554432 + 8.388608 + 2 * 4096 * PREFILL_2K / 1e6
    assert saved["macs"] == pytest.approx(0.5 * attention / (attention + 176.160768))
    assert saved["kv_elements"] == 0.5


def test_half_of_the_ffn_units() -> None:
    saved = shape_report(LLAMA_8B, "llm-drop-ffn", 0.25, context=PREFILL_2K).saved()
    layer = 218.103808 + 2 * 4096 * PREFILL_2K / 1e6
    assert saved["macs"] == pytest.approx(0.5 * 176.160768 / layer)
    assert saved["kv_elements"] == 0


def test_mixed_units_have_to_be_named() -> None:
    with pytest.raises(InputError, match="depend on which units"):
        shape_report(LLAMA_8B, "llm-drop", 0.25, context=1)
    report = shape_report(LLAMA_8B, "llm-drop", 0.0, context=1, removed=[(3, "ffn"), (5, "attention")])
    assert report.removed == ("layers.3.ffn", "layers.5.attention")
    assert report.realised == report.sparsity == 2 / 64


@pytest.mark.parametrize(
    ("share", "width", "total", "body"),
    [
        (0.10, 3680, -1.4, -2.4),
        (0.20, 3272, 10.1, 10.1),
        (0.25, 3072, 15.6, 16.1),
        (0.30, 2864, 21.3, 22.3),
        (0.33, 2744, 24.6, 25.8),
        (0.35, 2656, 26.9, 28.3),
        (0.40, 2456, 32.3, 34.1),
        (0.47, 2168, 39.8, 42.3),
        (0.50, 2048, 43.0, 45.7),
    ],
)
def test_slicing_llama_8b(share: float, width: int, total: float, body: float) -> None:
    """Table 7.3: "sparsity" is not a share of the parameters."""
    report = shape_report(LLAMA_8B, "slicegpt", share, context=PREFILL_2K)
    saved = report.saved()
    assert report.width == width
    assert 100 * saved["parameters"] == pytest.approx(total, abs=0.051)
    assert 100 * saved["body_parameters"] == pytest.approx(body, abs=0.051)
    assert saved["kv_elements"] == 0
    assert report.realised == 1 - width / 4096


@pytest.mark.parametrize(
    ("share", "total", "body"),
    [(0.25, 3.2, 14.2), (0.30, 9.6, 20.7), (0.35, 15.6, 26.9), (0.40, 21.6, 32.9), (0.50, 33.2, 44.8)],
)
def test_slicing_llama_3b(share: float, total: float, body: float) -> None:
    """Table 7.3: an untied head eats most of the saving."""
    saved = shape_report(LLAMA_3B, "slicegpt", share, context=1).saved()
    assert 100 * saved["parameters"] == pytest.approx(total, abs=0.051)
    assert 100 * saved["body_parameters"] == pytest.approx(body, abs=0.051)


@pytest.mark.parametrize("round_to", [8, 128])
@pytest.mark.parametrize("measure", ["parameters", "body"])
def test_width_for_a_share_of_the_parameters(measure: Any, round_to: int) -> None:
    """The largest multiple that removes enough."""
    d, f, kv, layers, vocabulary = 4096, 14336, 1024, 32, 128256

    def removed(width: int) -> float:
        """By hand: matrices, two shortcuts a layer, and what the last layer adds for writing the whole width."""
        body = layers * (width * (2 * d + 2 * kv + 3 * f) + 2 * width**2) + (d - width) * (f + width)
        dense = layers * (d * (2 * d + 2 * kv + 3 * f) + 2 * d)
        if measure == "body":
            return 1 - body / dense
        return 1 - (body + vocabulary * (width + d)) / (dense + 2 * vocabulary * d + d)

    shapes = SlicedShapes(LLAMA_8B, measure)
    width = shapes.width_for(0.25, round_to)
    assert shapes.removed(width) == pytest.approx(removed(width), abs=1e-12)
    assert width % round_to == 0
    assert removed(width) >= 0.25 > removed(width + round_to)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 0.4, 0.5])
def test_width_for_a_share_of_the_width_is_rounded_down(share: float) -> None:
    shapes = SlicedShapes(LLAMA_8B, "slice")
    for multiple in (8, 128):
        assert shapes.width_for(share, multiple) == int((1 - share) * 4096 + 1e-6) // multiple * multiple
    assert shapes.width_for(0.0, 24) == 4096


def test_unreachable_share_is_refused() -> None:
    with pytest.raises(InputError, match="no sliced width removes 99%"):
        SlicedShapes(LLAMA_3B, "parameters").width_for(0.99, 128)


def test_sliding_windows_limit_the_keys() -> None:
    config = MistralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, sliding_window=100
    )
    costs = [footprint(empty_model(config), context).macs for context in (99, 100, 101)]
    assert costs[1] - costs[0] == 2 * 2 * 64
    assert costs[2] == costs[1]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3", "olmo2"])
def test_counts_follow_the_modules(family: str) -> None:
    model = make_tiny(family, num_hidden_layers=4)
    before = footprint(model, 5)
    remove_layers(model, [1, 2])
    after = footprint(model, 5)
    assert after.body_parameters == before.body_parameters / 2
    assert after.kv_elements == before.kv_elements / 2
    assert before.parameters - after.parameters == after.body_parameters
    drop_units(model, [(0, "attention"), (1, "ffn")])
    assert footprint(model, 5).kv_elements == after.kv_elements / 2
    assert footprint(model, 5).macs == pytest.approx(after.macs / 2)


@pytest.mark.parametrize("method", ["shortgpt", "llm-drop-attention", "llm-drop-ffn", "slicegpt"])
def test_the_shape_alone_gives_the_costs_of_the_real_model(method: str) -> None:
    model = make_tiny("llama", num_hidden_layers=4)
    wanted = shape_report(model.config, method, 0.25, context=8.5)
    found = prune(model, method, 0.25, random_ids(4, 16))
    assert (found.before, found.after, found.realised) == (wanted.before, wanted.after, wanted.realised)
