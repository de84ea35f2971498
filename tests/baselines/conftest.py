"""What tests of the baselines share: text to fit on, calibration rows, models with a known order of importance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.threads import on_one_thread
from tests.tiny import make_tiny, random_ids
from tests.training.conftest import text_file, tiny_folder
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

__all__ = ["on_one_thread", "text_file", "tiny_folder"]


@pytest.fixture
def rows() -> torch.Tensor:
    """Calibration text: int64 [6, 16]."""
    return random_ids(6, 16, seed=3)


def tiny_tokenizer() -> Any:
    """A tokenizer with the vocabulary of the tiny models."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(125)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), eos_token="</s>", pad_token="<pad>"
    )


def with_idle(layers: tuple[int, ...], *, count: int = 8, family: str = "llama", **overrides: Any) -> Any:
    """A tiny model in which some layers write nothing to the residual stream."""
    model = make_tiny(family, num_hidden_layers=count, **overrides)
    with torch.no_grad():
        for index in layers:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    return model
