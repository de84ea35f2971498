"""Depth pruning (ShortGPT, Shortened-LLaMA): layers are deleted, and what is left is an ordinary, smaller model.

`save_pretrained` and `AutoModelForCausalLM.from_pretrained` work on the result without this package.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..errors import InputError

PER_LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Config fields with one entry for each layer."""


def remove_layers(model: Any, removed: Collection[int]) -> None:
    """Delete decoder layers by index, in place. Raises InputError for an unknown index, or if none would be left."""
    decoder, count = model.model, len(model.model.layers)
    unknown = sorted(set(removed) - set(range(count)))
    if unknown:
        raise InputError(f"layer {unknown[0]} does not exist", f"The model has the layers 0 to {count - 1}")
    kept = [index for index in range(count) if index not in removed]
    if not kept:
        raise InputError(f"all {count} layers would be removed", "Keep at least one")
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in kept)
    for place, layer in enumerate(decoder.layers):
        # Attention finds its place in the KV cache by this number.
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    _keep_layers(model.config, kept)


def _keep_layers(config: Any, kept: list[int]) -> None:
    """Let a config speak of the kept layers only."""
    for name in PER_LAYER_LISTS:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[index] for index in kept])
    if getattr(config, "max_window_layers", None) is not None:
        # Qwen: how many layers at the front have full attention.
        config.max_window_layers = sum(index < config.max_window_layers for index in kept)
    config.num_hidden_layers = len(kept)
