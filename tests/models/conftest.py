"""Tiny models on one thread."""

from tests.threads import on_one_thread

__all__ = ["on_one_thread"]
