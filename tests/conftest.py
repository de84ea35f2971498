"""What all tests share: two threads or fewer, the embedded default (fetched once into the user cache), tiny models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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


def _settings() -> dict[str, Any]:
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """What a test leaves changed in torch, it says itself: else tests far behind it fail, and only in one process."""
    before = _settings()
    yield
    after = _settings()
    torch.set_grad_enabled(before["gradients"])
    torch.set_default_dtype(before["default dtype"])
    torch.set_autocast_enabled("cpu", before["autocast"])
    assert after == before, "the test left torch's settings changed"


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
