"""A base model is recognised in every floating-point type, and nothing else is taken for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.persistence.conftest import logits
from tests.routed import make_routed
from tests.tiny import FAMILIES, make_tiny

from informed_routing.errors import InputError
from informed_routing.models.fingerprint import fingerprint, mismatch, reference_to
from informed_routing.routed_model import RoutedModelForCausalLM

load: Any = RoutedModelForCausalLM.from_pretrained
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _wide_range(model: Any) -> Any:
    """Values that float16 cannot hold as they are: subnormal ones, and some that overflow."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(2.0 ** torch.randint(-24, 4, tensor.shape, generator=generator).float())
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    return model


@pytest.mark.parametrize("fitted", DTYPES, ids=str)
@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("checkpoint", DTYPES, ids=str)
def test_one_checkpoint_in_any_dtype(checkpoint: torch.dtype, fitted: torch.dtype, loaded: torch.dtype) -> None:
    def model(dtype: torch.dtype) -> Any:
        return make_tiny("llama").to(checkpoint).to(dtype)

    assert mismatch(model(loaded), reference_to(model(fitted), "")) is None


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
def test_values_out_of_the_range_of_half_precision(loaded: torch.dtype) -> None:
    reference = reference_to(_wide_range(make_tiny("llama")), "")
    assert mismatch(_wide_range(make_tiny("llama")).to(loaded), reference) is None


def test_a_half_precision_copy_of_the_checkpoint_in_float32() -> None:
    reference = reference_to(make_tiny("llama"), "")
    assert mismatch(make_tiny("llama").bfloat16().float(), reference) is None
    almost = make_tiny("llama").bfloat16().float()
    almost.model.norm.weight.data[3] *= 1 + 2**-20
    assert mismatch(almost, reference) is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_single_weight_counts(family: str) -> None:
    model = make_tiny(family)
    reference = reference_to(model, "")
    assert mismatch(model, reference) is None
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        place = int(torch.randint(flat.numel(), (), generator=generator))
        before = flat[place].clone()
        flat[place] = before * (1 + 1e-6) + 1e-12
        assert mismatch(model, reference) is not None
        flat[place] = before
    assert mismatch(model, reference) is None


def test_rows_that_change_places_count() -> None:
    model = make_tiny("llama", vocab_size=4084)
    reference = reference_to(model, "")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
    assert mismatch(model, reference) is not None


@pytest.mark.parametrize(("fitted", "loaded"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_tuned_weights_count_across_half_precisions(fitted: torch.dtype, loaded: torch.dtype) -> None:
    """No digest can compare these, sums can: one weight matrix tuned by 2 % of its norm is noticed."""
    reference = reference_to(make_tiny("llama").to(fitted), "")
    other = make_tiny("llama")
    weight = other.model.layers[2].mlp.gate_proj.weight.data
    before, generator = weight.clone(), torch.Generator().manual_seed(0)
    assert mismatch(make_tiny("llama").to(loaded), reference) is None
    for _ in range(20):
        change = torch.randn(weight.shape, generator=generator)
        weight.copy_(before + 0.02 * before.norm() / weight.numel() ** 0.5 * change)
        assert "other weights" in str(mismatch(copy.deepcopy(other).to(loaded), reference))


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "rms_norm_eps", 1e-2),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        ("llama", "rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        ("llama", "hidden_act", "gelu"),
        ("llama", "num_key_value_heads", 4),
        ("llama", "tie_word_embeddings", True),
        ("mistral", "sliding_window", 4),
        ("mistral", "sliding_window", None),
        ("gemma2", "final_logit_softcapping", 5.0),
        ("gemma2", "attn_logit_softcapping", 5.0),
        ("gemma2", "query_pre_attn_scalar", 64),
        ("gemma2", "layer_types", ["full_attention"] * 3),
        ("smollm3", "no_rope_layers", [1, 1, 1]),
    ],
)
def test_settings_that_change_results_count(family: str, setting: str, value: Any) -> None:
    model = make_tiny(family)
    reference = reference_to(model, "")
    setattr(model.config, setting, value)
    assert setting in str(mismatch(model, reference))


def test_settings_without_effect_do_not_count() -> None:
    model = make_tiny("llama")
    reference = reference_to(model, "")
    model.config.update({"use_cache": False, "pad_token_id": 5, "max_position_embeddings": 9999})
    model.config._name_or_path = "elsewhere"
    model.set_attn_implementation("eager")
    stored = type(reference).model_validate_json(reference.model_dump_json())
    assert mismatch(model, stored) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_that_are_no_numbers_are_refused(folder: Path, value: float) -> None:
    base = make_tiny("llama")
    base.config.rms_norm_eps = value
    with pytest.raises(InputError, match="rms_norm_eps"):
        load(folder, base=base)
    with pytest.raises(InputError, match="rms_norm_eps"):
        RoutedModelForCausalLM.attach(base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 2}, "2 layers, not 3"),
        ({"hidden_size": 32}, "hidden size is 32, not 64"),
        ({"vocab_size": 130}, "other names or shapes"),
        ({"seed": 1}, "other weights"),
    ],
)
def test_another_model_is_named(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        load(folder, base=make_tiny("llama", **settings))
    assert "wrong base model" in str(raised.value)
    with pytest.raises(InputError, match="family mistral, not llama"):
        load(folder, base=make_tiny("mistral"))


def test_resized_embeddings_are_noticed(folder: Path) -> None:
    base = make_tiny("llama")
    base.resize_token_embeddings(130)
    with pytest.raises(InputError, match="other names or shapes"):
        load(folder, base=base)


def _as_of_version_0_1(folder: Path) -> None:
    path = folder / "routing_config.json"
    config = json.loads(path.read_text())
    for name in ("weights", "near"):
        del config["base_model"][name]
    path.write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "informed_routing"}')
    for name in ("modeling_informed_routing.py", "generation_config.json"):
        (folder / name).unlink()


def test_folders_of_earlier_versions(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    folder = on_disk()
    wanted = logits(load(folder, dtype="float32"))
    _as_of_version_0_1(folder)
    model = load(folder, dtype="float32")
    assert torch.equal(logits(model), wanted)
    assert load(folder, dtype="float16").dtype == torch.float16  # which its own fingerprint would not recognise
    with pytest.raises(InputError, match="wrong base model"):
        load(folder, base=make_tiny("llama", seed=1))
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(load(tmp_path / "new", dtype="float32")), wanted)
    model.model.norm.weight.data[3] += 1
    with pytest.raises(InputError, match="save_base"):
        model.save_pretrained(tmp_path / "newer")


def test_the_former_fingerprint_is_the_same_for_a_routed_model() -> None:
    assert fingerprint(make_routed("llama")) == fingerprint(make_tiny("llama"))


def test_a_base_with_a_live_adapter_is_refused(folder: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from tests.persistence.conftest import LORA

    base = make_tiny("llama")
    inject_adapter_in_model(LoraConfig(**LORA), base, adapter_name="mine")  # as add_adapter does
    with pytest.raises(InputError, match="adapter 'mine'"):
        load(folder, base=base)
    with pytest.raises(InputError, match="adapter 'mine'"):
        RoutedModelForCausalLM.attach(base)
