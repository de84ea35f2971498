"""The one entry: every method prunes, reports, generates, saves and loads; bad input is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.baselines.conftest import tiny_tokenizer, with_idle
from tests.routed import make_routed
from tests.tiny import make_tiny, random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from informed_routing.baselines.static import (
    METHODS,
    is_static_folder,
    load_static,
    prune,
    save_static,
    shape_report,
)
from informed_routing.errors import InputError

IDS = random_ids(2, 14)
FREE: dict[str, Any] = {"keep_first": 0, "keep_last": 0}
DEPTH = ("shortgpt", "shortened-ppl", "shortened-taylor")
DROP = ("llm-drop", "llm-drop-attention", "llm-drop-ffn")


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("method", [*DEPTH, *DROP])
def test_sparsity_zero_is_the_dense_model_bit_for_bit(method: str, rows: Tensor) -> None:
    model = make_tiny("llama")
    report = prune(model, method, 0.0, rows)
    assert torch.equal(_logits(model), _logits(make_tiny("llama")))
    assert report.removed == ()
    assert report.realised == report.tokens == 0
    assert set(report.saved().values()) == {0.0}


def test_slicing_nothing_reports_what_the_shortcuts_add(rows: Tensor) -> None:
    model = make_tiny("llama")
    report = prune(model, "slicegpt", 0.0, rows)
    assert report.width == 64
    assert report.after.body_parameters - report.before.body_parameters == 3 * (2 * 64 * 64 - 2 * 64)
    assert report.realised == 0
    assert float((_logits(model) - _logits(make_tiny("llama"))).abs().max()) < 5e-3


@pytest.mark.parametrize("method", ["shortgpt", "llm-drop", "llm-drop-attention", "llm-drop-ffn"])
def test_what_does_nothing_is_removed_without_loss(method: str, rows: Tensor) -> None:
    """Two of eight layers are idle: a quarter of the layers, or the first units of either kind."""
    model, dense = with_idle((2, 5)), with_idle((2, 5))
    sparsity = 0.25 if method in ("shortgpt", "llm-drop") else 0.125
    report = prune(model, method, sparsity, rows)
    kinds = {"shortgpt": [""], "llm-drop": [".attention", ".ffn"]}.get(method, [method.replace("llm-drop-", ".")])
    assert report.removed == tuple(f"layers.{layer}{kind}" for layer in (2, 5) for kind in kinds)
    ranking = [name for name in report.scores if name.endswith(tuple(kinds))]
    assert set(ranking[: len(report.removed)]) == set(report.removed)
    assert report.realised == sparsity
    assert torch.equal(_logits(model), _logits(dense))


@pytest.mark.parametrize("method", ["shortened-ppl", "shortened-taylor"])
def test_shortened_protects_the_ends(method: str, rows: Tensor) -> None:
    """The recipe keeps the first four and the last two, whatever their scores."""
    model = with_idle((1, 9), count=10)
    report = prune(model, method, 0.4, rows)
    assert report.removed == tuple(f"layers.{index}" for index in (4, 5, 6, 7))
    assert len(report.scores) == 10
    with pytest.raises(InputError, match="asks for 5 of 10 layers, and 4 may be removed"):
        prune(with_idle((), count=10), method, 0.5, rows)


def test_ranking_is_by_score_and_one_shot(rows: Tensor) -> None:
    model = make_tiny("llama", num_hidden_layers=8)
    report = prune(model, "shortened-ppl", 0.5, rows, **FREE)
    assert list(report.scores.values()) == sorted(report.scores.values())
    assert set(report.removed) == set(list(report.scores)[:4])
    assert report.tokens == rows.numel()
    assert report.before.context == 8.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_pruned_models_generate_save_and_load(family: str, method: str, rows: Tensor, tmp_path: Path) -> None:
    settings = FREE if method in DEPTH else {}
    model = make_tiny(family, num_hidden_layers=4, tie_word_embeddings=family != "mistral")
    report = prune(model, method, 0.25, rows, **settings)
    save_static(model, tiny_tokenizer(), tmp_path)
    assert is_static_folder(tmp_path)
    again, tokenizer = load_static(tmp_path, dtype="float32")
    assert torch.equal(_logits(again), _logits(model))
    assert tokenizer.convert_tokens_to_ids("w3") == 6
    assert again.prune_report == report
    assert not again.training
    generate = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(again.generate(IDS, **generate), model.generate(IDS, **generate))
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    save_static(again, tokenizer, tmp_path / "again")
    assert torch.equal(_logits(load_static(tmp_path / "again", dtype="float32")[0]), _logits(model))


@pytest.mark.parametrize("method", ["llm-drop", "slicegpt"])
def test_other_families_tied_weights_and_dtypes(method: str, rows: Tensor, tmp_path: Path) -> None:
    """Tied embeddings stay tied where they were, half precision keeps its rotary tables in float32."""
    family = "gemma3_text" if method == "llm-drop" else "smollm3"
    model = make_tiny(family, num_hidden_layers=4).bfloat16()
    model.model.rotary_emb.float()
    prune(model, method, 0.25, rows)
    save_static(model, tiny_tokenizer(), tmp_path)
    again, _ = load_static(tmp_path, dtype="bfloat16")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (method == "llm-drop")
    assert again.dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in again.model.rotary_emb.buffers())


@pytest.mark.parametrize("method", ["llm-drop", "slicegpt"])
def test_transformers_alone_refuses_what_it_would_get_wrong(method: str, rows: Tensor, tmp_path: Path) -> None:
    model = make_tiny("llama")
    prune(model, method, 0.25, rows)
    save_static(model, None, tmp_path)
    with pytest.raises(ValueError, match="informed_routing_static"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_depth_pruned_folder_is_an_ordinary_one(rows: Tensor, tmp_path: Path) -> None:
    model = make_tiny("llama", num_hidden_layers=4)
    prune(model, "shortgpt", 0.5, rows)
    save_static(model, None, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(_logits(again.eval()), _logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("name", ["pruning.json", "model.safetensors", "config.json"])
def test_damaged_folders_are_refused(name: str, rows: Tensor, tmp_path: Path) -> None:
    model = make_tiny("llama")
    prune(model, "llm-drop", 0.25, rows)
    save_static(model, None, tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError):
        load_static(tmp_path)
    path.unlink()
    with pytest.raises(InputError):
        load_static(tmp_path)


def test_weights_of_another_shape_are_refused(rows: Tensor, tmp_path: Path) -> None:
    for name, sparsity in (("one", 0.25), ("other", 0.5)):
        model = make_tiny("llama")
        prune(model, "slicegpt", sparsity, rows)
        save_static(model, None, tmp_path / name)
    (tmp_path / "one" / "model.safetensors").replace(tmp_path / "other" / "model.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        load_static(tmp_path / "other")


@pytest.mark.parametrize("method", ["llm-drop", "slicegpt"])
def test_a_reshaped_model_saves_itself_as_what_it_is(method: str, rows: Tensor, tmp_path: Path) -> None:
    """transformers' own folder would load with random weights for what is missing."""
    model = make_tiny("llama")
    prune(model, method, 0.25, rows)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again, _ = load_static(tmp_path, dtype="float32")
    assert torch.equal(_logits(again), _logits(model))
    again.save_pretrained(tmp_path / "again")
    assert is_static_folder(tmp_path / "again")
    with pytest.raises(TypeError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    assert not is_static_folder(tmp_path)
    with pytest.raises(InputError, match="no folder of a pruned model"):
        load_static(tmp_path)


@pytest.mark.parametrize(
    ("method", "sparsity", "settings", "message"),
    [
        ("magnitude", 0.25, {}, "'magnitude' is not known"),
        ("shortgpt", 1.0, {}, "not between 0 and 1"),
        ("shortgpt", -0.1, {}, "not between 0 and 1"),
        ("shortgpt", 0.25, {"round_to": 8}, "unknown setting round_to"),
        ("slicegpt", 0.25, {"measure": "depth"}, "measure = 'depth'"),
        ("llm-drop-attention", 0.5, {}, "no attention"),
        ("llm-drop-ffn", 0.75, {}, "asks for 6 of 8 units, and 4 may be removed"),
        ("slicegpt", 0.95, {}, "no sliced width removes 95%"),
    ],
)
def test_bad_input_is_refused(method: str, sparsity: float, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(make_tiny("llama", num_hidden_layers=4), method, sparsity, random_ids(2, 8), **settings)


def test_only_dense_models_are_pruned(rows: Tensor) -> None:
    with pytest.raises(InputError, match="routed"):
        prune(make_routed("llama"), "shortgpt", 0.3, rows)
    for method in ("llm-drop", "slicegpt"):
        model = make_tiny("llama")
        prune(model, method, 0.25, rows)
        with pytest.raises(InputError, match="pruned already"):
            prune(model, "shortgpt", 0.3, rows)


@pytest.mark.parametrize("rows", [torch.zeros(0, 8, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long)])
def test_empty_calibration_is_refused(rows: Tensor) -> None:
    with pytest.raises(InputError, match="nothing to calibrate on"):
        prune(make_tiny("llama"), "shortgpt", 0.3, rows)


def test_report_is_json(rows: Tensor) -> None:
    report = prune(make_tiny("llama", num_hidden_layers=4), "llm-drop", 0.25, rows)
    found = json.loads(json.dumps(report.as_dict()))
    assert found["measure"] == "units"
    assert found["removed"] == list(report.removed)
    assert found["saved"]["macs"] == 1 - report.after.macs / report.before.macs
    assert shape_report(make_tiny("llama").config, "shortgpt", 1 / 3, context=4).scores == {}
