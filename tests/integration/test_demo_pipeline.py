"""The pipeline on the embedded default: a real model, a very short fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conftest import Demo

from informed_routing.assets import load_texts, pack
from informed_routing.config.recipe import Recipe
from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training.fit import fit

RECIPE = {
    "model": "demo:smollm2-135m",
    "data": ["demo:wiki", "demo:c4"],
    "dtype": "float32",
    "forecaster": {"rank": 32, "tokens": 4096},
    "router": {"warm_start_tokens": 1536, "sweeps": 2, "sweep_tokens": 1536},
    "forecast": {"sequence_length": 256},
    "route": {"steps": 2, "batch_size": 2, "sequence_length": 256, "warmup_steps": 0},
    "calibration": {"targets": [0.15, 0.3], "tokens": 3072, "sequence_length": 256},
}


@pytest.fixture(scope="module")
def routed(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> RoutedModelForCausalLM:
    folder: Path = tmp_path_factory.mktemp("demo") / "out"
    report = fit(Recipe.from_mapping(RECIPE), folder)
    explained = report["stages"]["forecast"]["quality"]["explained_variance"]
    assert 0.1 < explained["attention"] < 0.7
    assert 0.05 < explained["ffn"] < 0.7
    return RoutedModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def held_out(demo: Demo) -> torch.Tensor:
    return pack(load_texts("demo:wiki,demo:c4", "heldout"), demo.tokenizer, 256)[:12]


def test_short_fit_keeps_the_model_a_language_model(
    demo: Demo, routed: RoutedModelForCausalLM, held_out: torch.Tensor
) -> None:
    routed.set_sparsity(0.0)
    dense = token_perplexity(routed, held_out, 2).token_perplexity
    assert dense == pytest.approx(token_perplexity(demo.model, held_out, 2).token_perplexity, rel=1e-6)
    routed.set_sparsity(0.15)
    at_15 = token_perplexity(routed, held_out, 2).token_perplexity
    assert dense < at_15 < 1.5 * dense


def test_07_realised_sparsity_meets_the_target_on_unseen_text(
    routed: RoutedModelForCausalLM, held_out: torch.Tensor
) -> None:
    """Within 3 points on a few thousand tokens; half a point needs the calibration text of the slow study."""
    routed.set_sparsity(0.25)
    with torch.inference_mode():
        for start in range(0, len(held_out), 2):
            routed.hidden_states(held_out[start : start + 2])
    stats = routed.routing_stats()
    assert stats["units"] == pytest.approx(0.25, abs=0.03)
    assert stats["target"] == 0.25
    assert stats["units"] == pytest.approx((stats["attention"] + stats["ffn"]) / 2)
    assert stats["tokens"] == held_out.numel()


def test_sparse_equals_masked_on_the_real_model(routed: RoutedModelForCausalLM, held_out: torch.Tensor) -> None:
    routed.set_sparsity(0.25)
    found = {}
    for execution in ("sparse", "masked"):
        routed.set_execution(execution)  # type: ignore[arg-type]
        with torch.no_grad():
            found[execution] = routed(held_out[:1, :128]).logits
    routed.set_execution("sparse")
    assert torch.allclose(found["sparse"], found["masked"], atol=5e-3)


def test_batched_generation_equals_single(demo: Demo, routed: RoutedModelForCausalLM) -> None:
    routed.set_sparsity(0.25)
    tokenizer = demo.tokenizer
    tokenizer.padding_side = "left"
    prompts = ["The river rises in the mountains", "Water"]
    settings = {"max_new_tokens": 12, "do_sample": False}
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = routed.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):
        one = tokenizer(prompt, return_tensors="pt")
        alone = routed.generate(**one, **settings)[0, one["input_ids"].shape[1] :]
        length = min(len(alone), 8)  # float32 rounding may turn a near-tie later on
        assert together[row, :length].tolist() == alone[:length].tolist()


@pytest.mark.parametrize("settings", [{"do_sample": True, "top_p": 0.9}, {"num_beams": 3, "do_sample": False}])
@pytest.mark.parametrize("kv", ["keep", "drop"])
def test_sampling_and_beams_run(
    routed: RoutedModelForCausalLM, demo: Demo, settings: dict[str, object], kv: str
) -> None:
    routed.set_sparsity(0.25)
    routed.set_execution("sparse", kv)  # type: ignore[arg-type]
    tokens = demo.tokenizer("The river rises", return_tensors="pt")
    out = routed.generate(**tokens, max_new_tokens=6, eos_token_id=None, **settings)
    routed.set_execution("sparse", "keep")
    assert out.shape[1] == tokens["input_ids"].shape[1] + 6


def test_dropped_keys_really_shrink_the_cache(routed: RoutedModelForCausalLM, held_out: torch.Tensor) -> None:
    routed.set_sparsity(0.3)
    sizes = {}
    for kv in ("keep", "drop"):
        routed.set_execution("sparse", kv)  # type: ignore[arg-type]
        with torch.no_grad():
            cache = routed(held_out[:1], use_cache=True).past_key_values
        sizes[kv] = sum(layer.keys.numel() for layer in cache.layers if layer.keys is not None)
    routed.set_execution("sparse", "keep")
    attention = routed.routing_stats()["attention"]
    assert sizes["drop"] == pytest.approx((1 - attention) * sizes["keep"], rel=0.2)
    assert sizes["drop"] < sizes["keep"]
