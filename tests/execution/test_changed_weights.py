"""The native engine's copies follow the model, in whatever way its weights change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import make_tiny, random_ids
from torch import Tensor, nn

from informed_routing.execution import changes
from informed_routing.execution.cpu import build
from informed_routing.models.calls import cache_of, cached
from informed_routing.routing.decision import Threshold

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
IDS = random_ids(1, 12)


def _down(model: Any) -> nn.Linear:
    return model.decoder.layers[1].mlp.down_proj  # type: ignore[no-any-return]


def _in_place(model: Any) -> None:
    with torch.no_grad():
        _down(model).weight.mul_(2)


def _through_data(model: Any) -> None:
    _down(model).weight.data.mul_(2)


def _one_element_through_data(model: Any) -> None:
    _down(model).weight.data[17, 33] += 5.0


def _through_numpy(model: Any) -> None:
    _down(model).weight.detach().numpy()[:] *= 2


def _replaced_data(model: Any) -> None:
    _down(model).weight.data = _down(model).weight.data * 2


def _replaced_module(model: Any) -> None:
    model.decoder.layers[1].mlp.down_proj = nn.Linear(128, 64, bias=False)


def _loaded(model: Any) -> None:
    model.load_state_dict({"model.layers.1.mlp.down_proj.weight": 2 * _down(model).weight.detach()}, strict=False)


def _norm(model: Any) -> None:
    model.decoder.norm.weight.data += 0.5


def _epsilon(model: Any) -> None:
    model.decoder.layers[0].input_layernorm.variance_epsilon = 0.3


def _embeddings(model: Any) -> None:
    model.get_input_embeddings().weight.data *= 1.5


def _head(model: Any) -> None:
    model.get_output_embeddings().weight.data[5] += 1.0


def _resized(model: Any) -> None:
    model.resize_token_embeddings(140)


def _routers(model: Any) -> None:
    model.units[2].router.outer.weight.data.neg_()


def _forecasters(model: Any) -> None:
    model.units[3].forecaster.outer.weight.data *= 3


def _other_dtype(model: Any) -> None:
    model.to(torch.bfloat16)


def _merged(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, settings).merge_and_unload()


CHANGES: list[Callable[[Any], None]] = [
    _in_place, _through_data, _one_element_through_data, _through_numpy, _replaced_data, _replaced_module, _loaded,
    _norm, _epsilon, _embeddings, _head, _resized, _routers, _forecasters, _other_dtype, _merged,
]  # fmt: skip


def _logits(model: Any, execution: str) -> Tensor:
    model.set_execution(execution)
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*norms of different epsilons")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_the_engine_computes_with_the_changed_weights(change: Callable[[Any], None]) -> None:
    model = make_routed("llama", tie_word_embeddings=False)
    model.set_decision(Threshold(0.0))
    before = _logits(model, "native")
    change(model)
    with torch.inference_mode():
        found = model(input_ids=IDS).logits.float()
    wanted = _logits(model, "sparse")
    tolerance = 0.3 if change is _other_dtype else 1e-4
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    if change is not _other_dtype:
        assert found.shape != before.shape or (found - before).abs().max() > 1e-3


def test_adapters_come_and_go() -> None:
    """Merged, unmerged, swapped; while one is not merged PyTorch computes, and says so once."""
    from peft import LoraConfig, get_peft_model

    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    model.set_execution("native")
    plain = _logits(model, "native")
    settings = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings).eval()
    adapted.add_adapter("other", settings)
    texts = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        with torch.inference_mode():
            if name == "default":
                with pytest.warns(RuntimeWarning, match="PyTorch computes"):
                    texts[name] = adapted(input_ids=IDS).logits
            texts[name] = adapted(input_ids=IDS).logits
            adapted.merge_adapter()
            torch.testing.assert_close(adapted(input_ids=IDS).logits, texts[name], atol=1e-4, rtol=1e-4)
            adapted.unmerge_adapter()
    assert (texts["default"] - texts["other"]).abs().max() > 1e-2
    assert (texts["default"] - plain).abs().max() > 1e-2
    adapted.unload()
    torch.testing.assert_close(_logits(model, "native"), plain, atol=1e-4, rtol=1e-4)


def test_weights_are_compared_once_where_they_are_said_to_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    model.set_execution("native")
    engine, read = model.routing_state.native.engine, list[bool]()
    is_of = engine.is_of

    def noted(model: Any, *, sample: bool = False) -> bool:
        read.append(sample)
        return is_of(model, sample=sample)  # type: ignore[no-any-return]

    monkeypatch.setattr(engine, "is_of", noted)
    with torch.inference_mode():
        output = model(input_ids=IDS, use_cache=True)
        model(input_ids=IDS[:, :1], **cached(model, cache_of(output)))
        assert read == [False, True]  # all at the beginning of a text, a sample for its further tokens
        with model.weights_fixed():
            for _ in range(3):
                model(input_ids=IDS)
        assert read == [False, True, False]
    model.generate(IDS, max_new_tokens=4)
    assert len(read) == 4


@pytest.mark.parametrize("sizes", [(1,), (7, 64, 65), (300_000, 3, 1 << 20)])
def test_the_checksum_sees_each_byte_and_counts_on_no_threads(sizes: tuple[int, ...]) -> None:
    library = build.library()
    tensors = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in sizes]
    first = changes.content(library, tensors, 1)
    assert first == changes.content(library, tensors, 3)
    for tensor in tensors:
        for place in {0, len(tensor) // 2, len(tensor) - 1}:
            tensor[place] ^= 1
            assert changes.content(library, tensors, 2) != first
            tensor[place] ^= 1
    sample = changes.content(library, tensors, 2, changes.PAGE)
    tensors[-1] += 1
    assert sizes == (1,) or changes.content(library, tensors, 2, changes.PAGE) != sample


def test_models_of_other_weights_have_other_identities() -> None:
    one, other = make_routed("llama"), make_routed("llama", seed=5)
    assert changes.identity(one) == changes.identity(one)
    assert changes.identity(one) != changes.identity(other)
    assert make_tiny("llama").config.to_dict() == one.config.to_dict()
