"""A tiny model on disk with the demo tokenizer's vocabulary cut down, and a text file: what `fit` needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.threads import on_one_thread
from tests.tiny import make_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from informed_routing.config.recipe import Recipe

__all__ = ["on_one_thread"]

WORDS = 120


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w0"
    ).save_pretrained(folder)
    make_tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents of 60 words with some order in them."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    documents = []
    for _ in range(200):
        start = int(torch.randint(0, WORDS, (), generator=generator))
        steps = torch.randint(1, 4, (60,), generator=generator).cumsum(0)
        documents.append(" ".join(f"w{int(start + s) % WORDS}" for s in steps))
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture
def recipe(tiny_folder: Path, text_file: Path) -> Recipe:
    """All stages in a second or two."""
    return Recipe.from_mapping(
        {
            "model": str(tiny_folder),
            "data": [str(text_file)],
            "stages": ["forecast", "route", "lora"],
            "dtype": "float32",
            "forecaster": {"rank": 8, "tokens": 1024, "refit": True},
            "router": {
                "kind": "low-rank",
                "width": 8,
                "warm_start_tokens": 512,
                "sweeps": 2,
                "sweep_tokens": 256,
            },
            "forecast": {"sequence_length": 32, "steps": 4, "batch_size": 2},
            "route": {
                "steps": 8,
                "batch_size": 2,
                "sequence_length": 32,
                "checkpoint_every": 3,
                "train_forecasters": False,
            },
            "lora": {"steps": 5, "batch_size": 2, "sequence_length": 32, "checkpoint_every": 2, "rank": 4},
            "calibration": {"tokens": 512, "sequence_length": 32, "targets": [0.1, 0.25, 0.4]},
        }
    )
