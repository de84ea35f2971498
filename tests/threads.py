"""One thread for tiny models: they gain nothing from a second, and lose a hundredfold when the cores are busy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch works with one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    """For all tests of a folder whose conftest.py imports it."""
    with one_thread():
        yield
