"""Tiny routed models on disk, and what the tests of saving and loading ask of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import save_tokenizer
from tests.routed import make_routed
from tests.tiny import make_tiny, random_ids

from informed_routing.routing.decision import Threshold

LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "init_lora_weights": False,
    "task_type": "CAUSAL_LM",
}


def logits(model: Any) -> torch.Tensor:
    """Logits of a fixed input; a routed model approximates about half of all (token, unit) pairs."""
    if hasattr(model, "set_decision"):
        model.set_decision(Threshold(0.0))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=random_ids(2, 12)).logits.float()
    return found


def make_adapter(folder: Path, **settings: Any) -> Path:
    """A PEFT adapter of the tiny Llama."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        adapted = get_peft_model(make_tiny("llama"), LoraConfig(**{**LORA, **settings}))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A routing folder on the tiny Llama, which is saved nowhere."""
    make_routed("llama").save_pretrained(tmp_path / "routing")
    return tmp_path / "routing"


@pytest.fixture
def tuned(folder: Path) -> Path:
    """The same with a `lora/`."""
    make_adapter(folder / "lora")
    return folder


@pytest.fixture
def on_disk(tmp_path: Path) -> Callable[..., Path]:
    """`on_disk(name)`: a routing folder whose base model is a folder beside it, with a tokenizer."""
    from informed_routing.config.parts import ForecasterConfig, RouterConfig
    from informed_routing.routed_model import RoutedModelForCausalLM

    def make(family: str = "llama", **overrides: Any) -> Path:
        base = tmp_path / "base"
        make_tiny(family, bos_token_id=None, **overrides).save_pretrained(base)
        save_tokenizer(base)
        dense = make_tiny(family, bos_token_id=None, **overrides)
        dense.config._name_or_path = str(base)
        routed = RoutedModelForCausalLM.attach(
            dense, ForecasterConfig(rank=8), RouterConfig(kind="low-rank", width=8), name=str(base)
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for unit in routed.units:
                for parameter in unit.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        routed.save_pretrained(tmp_path / "out")
        return tmp_path / "out"

    return make
