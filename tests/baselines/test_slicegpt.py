"""Slicing: exact where nothing is lost, and what is lost is what was least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.baselines.conftest import with_idle
from tests.routed import left_padded
from tests.tiny import FAMILIES, make_tiny, random_ids
from torch import Tensor

from informed_routing.baselines.remaining import sliced_width
from informed_routing.baselines.sliced import SLICEABLE, SlicedRMSNorm, reshape_sliced, untie_head
from informed_routing.baselines.slicegpt import slice_model
from informed_routing.errors import InputError
from informed_routing.progress import NullProgress

IDS = random_ids(3, 18)
QUIET = NullProgress()


def _sliced(family: str, width: int, rows: Tensor, **overrides: Any) -> Any:
    model = make_tiny(family, **overrides)
    slice_model(model, width, rows, 4, QUIET)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", SLICEABLE)
def test_slicing_nothing_gives_the_dense_logits(family: str, tied: bool, rows: Tensor) -> None:
    """Rotation and fused norms are exact but for rounding; these models' logits are of order 10 to 100."""
    mask = left_padded(IDS, (0, 3, 7))
    dense = make_tiny(family, tie_word_embeddings=tied)
    sliced = _sliced(family, 64, rows, tie_word_embeddings=tied)
    with torch.no_grad():
        wanted = dense(IDS, attention_mask=mask).logits[mask.bool()]
        found = sliced(IDS, attention_mask=mask).logits[mask.bool()]
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_slicing_nothing_in_float64_is_exact(rows: Tensor) -> None:
    """Biases on both sides too: what float32 left above is rounding, not a term forgotten."""
    settings = {"attention_bias": True, "mlp_bias": True}
    dense, sliced = make_tiny("llama", **settings).double(), make_tiny("llama", **settings).double()
    slice_model(sliced, 64, rows, 4, QUIET)
    for model in (dense, sliced):  # norms of the family compute in float32: take them out of the comparison
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.register_forward_hook(_norm_in_float64)
    with torch.no_grad():
        wanted = dense(IDS).logits
        assert float((sliced(IDS).logits - wanted).abs().max()) < 1e-7 * float(wanted.abs().max())


def _norm_in_float64(module: Any, given: tuple[Tensor, ...], _: Tensor) -> Tensor:
    width = getattr(module, "full_width", given[0].shape[-1])
    mean_square = given[0].square().sum(-1, keepdim=True) / width
    return given[0] * torch.rsqrt(mean_square + module.variance_epsilon) * getattr(module, "weight", 1.0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_stream_of_low_rank_loses_nothing(family: str, rows: Tensor) -> None:
    """If the residual stream lives in 24 dimensions, slicing to 24 keeps the logits."""
    dense, sliced = make_tiny(family), make_tiny(family)
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(64, 24, generator=generator))[0]
    for model in (dense, sliced):
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ basis @ basis.T)
            for layer in model.model.layers:
                for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    linear.weight.copy_(basis @ basis.T @ linear.weight)
    slice_model(sliced, 24, rows, 4, QUIET)
    with torch.no_grad():
        wanted, found = dense(IDS).logits, sliced(IDS).logits
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_error_grows_with_what_is_sliced_and_principal_directions_are_the_best(rows: Tensor) -> None:
    dense = make_tiny("llama")
    with torch.no_grad():
        wanted = dense.model(rows).last_hidden_state

        def error(width: int) -> float:
            model = _sliced("llama", width, rows)
            hidden = model.model(rows).last_hidden_state * dense.model.norm.weight
            return float((hidden - wanted).square().mean())

        errors = [error(width) for width in (64, 56, 40, 16)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-6 < errors[1]


@pytest.mark.parametrize("family", SLICEABLE)
def test_what_is_left_has_the_sliced_width(family: str, rows: Tensor) -> None:
    model = _sliced(family, 40, rows, tie_word_embeddings=True)
    layers = model.model.layers
    assert sliced_width(model) == model.config.hidden_size == 40
    assert model.model.embed_tokens.weight.shape == (128, 40)
    assert model.lm_head.weight.shape == (128, 64)
    assert layers[0].self_attn.q_proj.in_features == layers[0].mlp.down_proj.out_features == 40
    assert layers[-1].mlp.down_proj.out_features == layers[-1].ffn_shortcut.out_features == 64
    assert layers[0].attention_shortcut.weight.shape == (40, 40)
    assert not [name for name, _ in model.named_parameters() if name.endswith("layernorm.weight")]
    assert all(parameter.is_contiguous() and parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("family", SLICEABLE)
def test_cached_decoding_equals_no_cache(family: str, rows: Tensor) -> None:
    model = _sliced(family, 48, rows)
    mask = left_padded(IDS[:, :9], (0, 2, 4))
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS[:, :9], **settings), model.generate(IDS[:, :9], use_cache=False, **settings))


def test_calibration_does_not_depend_on_batches(rows: Tensor) -> None:
    one, other = make_tiny("llama"), make_tiny("llama")
    slice_model(one, 48, rows, 1, QUIET)
    slice_model(other, 48, rows, 6, QUIET)
    with torch.no_grad():
        torch.testing.assert_close(one(IDS).logits, other(IDS).logits, rtol=1e-3, atol=2e-2)


def test_idle_layers_have_identity_shortcuts(rows: Tensor) -> None:
    """Nothing is added to the stream, so its components stay: the bases before and behind are the same."""
    model = with_idle((1,), count=3)
    slice_model(model, 48, rows, 4, QUIET)
    shortcut = model.model.layers[1].attention_shortcut.weight
    torch.testing.assert_close(shortcut.abs(), torch.eye(48), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SLICEABLE])
def test_other_families_are_refused(family: str, rows: Tensor) -> None:
    with pytest.raises(InputError, match="cannot slice the family"):
        _sliced(family, 48, rows)


@pytest.mark.parametrize("width", [0, 65])
def test_impossible_widths_are_refused(width: int) -> None:
    with pytest.raises(InputError, match="not between 1 and 64"):
        reshape_sliced(make_tiny("llama"), width)


def test_norm_divides_by_the_original_width() -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, torch.zeros(2, 5, 8)], -1)
    wanted = torch.nn.functional.rms_norm(padded, (24,), eps=1e-5)[..., :16]
    torch.testing.assert_close(SlicedRMSNorm(24, 1e-5)(x), wanted)
    assert SlicedRMSNorm(24, 1e-5)(x.bfloat16()).dtype == torch.bfloat16


def test_untied_head_is_a_copy(tmp_path: Path) -> None:
    model = make_tiny("llama", tie_word_embeddings=True)
    untie_head(model)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.model.embed_tokens.weight.any()
    model.save_pretrained(tmp_path)
    assert not type(model).from_pretrained(tmp_path).lm_head.weight.any()
