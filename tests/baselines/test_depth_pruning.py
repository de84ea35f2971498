"""Deleted layers: an ordinary smaller model that computes what skipping them computed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, make_tiny, random_ids
from transformers import AutoModelForCausalLM

from informed_routing.baselines.depth_pruning import remove_layers
from informed_routing.baselines.dropping import running
from informed_routing.errors import InputError

IDS = random_ids(2, 20)
LAYERS = 6
REMOVED = (0, 3, 4)


def _skipping(model: Any, layers: tuple[int, ...]) -> torch.Tensor:
    """Logits of the whole model with these layers passing the stream through."""
    from contextlib import ExitStack

    with torch.no_grad(), ExitStack() as stack:
        for index in layers:
            stack.enter_context(running(model.model.layers[index], ()))
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_deletion_equals_skipping(family: str) -> None:
    """Also where layers differ in kind: windows and rotary embeddings go with their layer, not with its place."""
    wanted = _skipping(make_tiny(family, num_hidden_layers=LAYERS), REMOVED)
    model = make_tiny(family, num_hidden_layers=LAYERS)
    remove_layers(model, REMOVED)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, wanted)


def test_the_reference_skips_really() -> None:
    """The skipping that the other tests compare with, against a plain loop over the layers' own forward."""
    model = make_tiny("llama", num_hidden_layers=LAYERS)
    body = model.model
    with torch.no_grad():
        hidden = body.embed_tokens(IDS)
        rope = body.rotary_emb(hidden, position_ids=torch.arange(IDS.shape[1])[None])
        for index, layer in enumerate(body.layers):
            if index not in REMOVED:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rope)
        wanted = model.lm_head(body.norm(hidden))
    assert torch.equal(_skipping(model, REMOVED), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_removed_is_the_dense_model(family: str) -> None:
    dense, model = make_tiny(family), make_tiny(family)
    remove_layers(model, ())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_saves_and_loads_as_an_ordinary_model(family: str, tmp_path: Path) -> None:
    model = make_tiny(family, num_hidden_layers=LAYERS)
    remove_layers(model, REMOVED)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    if family == "gemma2":
        again.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3_text"])
def test_decodes_with_a_smaller_cache(family: str) -> None:
    """Cached decoding equals a forward without cache, past the sliding window too."""
    model = make_tiny(family, num_hidden_layers=LAYERS)
    remove_layers(model, REMOVED)
    out = model.generate(
        IDS[:, :12],
        attention_mask=torch.ones(2, 12, dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert len(out.past_key_values) == LAYERS - len(REMOVED)
    assert all(layer.keys is not None for layer in out.past_key_values.layers)
    with torch.no_grad():
        whole = model(out.sequences, use_cache=False).logits[:, 11:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-4, atol=1e-3)


def test_per_layer_settings_follow_their_layers() -> None:
    model = make_tiny("smollm3", num_hidden_layers=LAYERS)
    before = list(model.config.no_rope_layers)
    remove_layers(model, REMOVED)
    assert model.config.no_rope_layers == [before[index] for index in (1, 2, 5)]
    assert model.config.num_hidden_layers == len(model.config.layer_types) == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_windows_of_qwen_begin_at_the_same_layer() -> None:
    settings: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4}
    model = make_tiny("qwen2", num_hidden_layers=LAYERS, **settings)
    wanted = _skipping(make_tiny("qwen2", num_hidden_layers=LAYERS, **settings), REMOVED)
    remove_layers(model, REMOVED)
    assert model.config.max_window_layers == 2
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, wanted)


def test_loads_without_this_package(tmp_path: Path) -> None:
    """In an interpreter that never imports it."""
    model = make_tiny("qwen3", num_hidden_layers=LAYERS)
    remove_layers(model, REMOVED)
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32).eval();"
        "o = m.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None);"
        "assert 'informed_routing' not in sys.modules; print(o.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.stdout.strip().splitlines()[-1] == str(wanted.tolist())


@pytest.mark.parametrize(("removed", "message"), [((7,), "layer 7 does not exist"), (range(LAYERS), "all 6 layers")])
def test_impossible_removals_are_refused(removed: Any, message: str) -> None:
    model = make_tiny("llama", num_hidden_layers=LAYERS)
    with pytest.raises(InputError, match=message):
        remove_layers(model, removed)
    assert len(model.model.layers) == LAYERS
