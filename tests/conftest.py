"""What all tests share: two threads or fewer, the embedded default (fetched once into the user cache), tiny models."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is defined: CI checks kernels without a GPU

from tests.tiny import make_tiny

from informed_routing.assets import DEMO_MODEL, load_model, load_texts, load_tokenizer

torch.set_num_threads(min(2, int(os.environ.get("OMP_NUM_THREADS", "2"))))


@dataclass(frozen=True)
class Demo:
    """The embedded default, shared by all tests of a session: load a copy of your own to change it."""

    ref: str
    model: Any
    tokenizer: Any

    def texts(self, name: str = "wiki", split: str = "heldout") -> list[str]:
        return load_texts(f"demo:{name}", split)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def demo_model_ref() -> str:
    """`demo:smollm2-135m`, already fetched and converted."""
    load_tokenizer(DEMO_MODEL)
    return DEMO_MODEL


@pytest.fixture(scope="session")
def demo(demo_model_ref: str) -> Demo:
    """The embedded default loaded in float32 on the CPU."""
    model, tokenizer = load_model(demo_model_ref, dtype="float32")
    return Demo(demo_model_ref, model, tokenizer)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`make_tiny(family, **overrides)` of tests/tiny.py."""
    return make_tiny
