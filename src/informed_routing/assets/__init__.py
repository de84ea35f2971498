"""The embedded default model and text, and references (`MODEL`, `DATA`) turned into objects.

Importing this package is cheap: torch and transformers are imported by the functions that need them.
"""

from __future__ import annotations

from informed_routing.assets.cache import cache_dir
from informed_routing.assets.models import (
    DEMO_MODEL,
    DEMO_ROUTED,
    ModelSource,
    load_model,
    load_tokenizer,
    resolve_model,
)
from informed_routing.assets.packing import pack
from informed_routing.assets.text import DEMO_TEXTS, Split, load_texts

__all__ = [
    "DEMO_MODEL",
    "DEMO_ROUTED",
    "DEMO_TEXTS",
    "ModelSource",
    "Split",
    "cache_dir",
    "load_model",
    "load_texts",
    "load_tokenizer",
    "pack",
    "resolve_model",
]
