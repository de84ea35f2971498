"""Recovery: any model learns, keeps its shape, and continues after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.baselines.conftest import tiny_tokenizer
from tests.tiny import make_tiny, random_ids
from torch import Tensor

from informed_routing.baselines.recovery import recover
from informed_routing.baselines.static import load_static, prune, save_static
from informed_routing.config.recipe import LoraStage
from informed_routing.errors import InputError
from informed_routing.evaluation.perplexity import token_perplexity

ROWS = random_ids(6, 16, seed=3)
STAGE = LoraStage(steps=30, batch_size=3, sequence_length=16, rank=4, learning_rate=5e-3, warmup_steps=2)


def _pruned(method: str | None) -> Any:
    model = make_tiny("llama", num_hidden_layers=4)
    if method == "shortened-ppl":
        prune(model, method, 0.25, ROWS, keep_first=1, keep_last=1)
    elif method:
        prune(model, method, 0.25, ROWS)
    return model


@pytest.mark.parametrize("method", [None, "shortgpt", "shortened-ppl", "llm-drop", "slicegpt"])
def test_recovery_learns_and_merges(method: str | None, tmp_path: Path) -> None:
    model, untouched = _pruned(method), _pruned(method)
    before = token_perplexity(model, ROWS).token_perplexity
    report = recover(model, ROWS, STAGE)
    after = token_perplexity(model, ROWS).token_perplexity
    assert after < 0.7 * before
    assert report["tokens"] == 30 * 3 * 16
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in untouched.named_parameters()}
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    if method:
        save_static(model, tiny_tokenizer(), tmp_path)
        again, _ = load_static(tmp_path, dtype="float32")
        assert token_perplexity(again, ROWS).token_perplexity == pytest.approx(after, rel=1e-6)


def test_only_the_targets_change() -> None:
    model, before = _pruned("slicegpt"), _pruned("slicegpt").state_dict()
    recover(model, ROWS, STAGE.model_copy(update={"steps": 2, "targets": ("ffn_shortcut", "o_proj")}))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".", 3)[-1] for name in changed} == {"ffn_shortcut.weight", "self_attn.o_proj.weight"}


def test_same_seed_same_result_and_other_seed_not() -> None:
    def trained(seed: int) -> Tensor:
        model = _pruned("shortgpt")
        recover(model, ROWS, STAGE.model_copy(update={"steps": 3}), seed=seed)
        return model.model.layers[0].self_attn.q_proj.weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_a_finished_checkpoint_is_not_trained_again(tmp_path: Path) -> None:
    stage = STAGE.model_copy(update={"steps": 3})
    first, second = _pruned("shortgpt"), _pruned("shortgpt")
    recover(first, ROWS, stage, checkpoint=tmp_path / "recovery.safetensors")
    recover(second, ROWS[:1], stage, checkpoint=tmp_path / "recovery.safetensors")  # other text: would show
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"objective": {"kind": "distill"}}, "objective 'distill'"),
        ({"sequence_length": 32}, "rows have 16 tokens"),
        ({"targets": ("router",)}, "'router' is no layer"),
    ],
)
def test_bad_settings_are_refused(update: dict[str, Any], message: str) -> None:
    stage = LoraStage.model_validate({**STAGE.model_dump(), **update})
    with pytest.raises(InputError, match=message):
        recover(_pruned(None), ROWS, stage)
