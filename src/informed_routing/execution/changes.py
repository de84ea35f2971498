"""Whether a model is still what an engine was made of.

Engines keep copies of weights, so each way of changing a model must be noticed: replaced modules and parameters,
changes in place, adapters merged through `.data` (which no version counter sees), settings, hooks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..models.calls import is_watched

PAGE = 64
"""Lines of 64 bytes in 4 KiB: where only a sample of the weights is read, one line of each."""

_SETTINGS = (
    "num_hidden_layers",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "hidden_act",
    "is_causal",
    "num_attention_heads",
    "num_key_value_heads",
)
_ATTRIBUTES = ("variance_epsilon", "scaling", "is_causal", "head_dim", "use_rope")


def identity(model: Any) -> int:
    """A number that changes with all that can be seen of a model without reading its weights.

    Which modules there are, of which classes, with which hooks and settings; where parameters lie, and their versions.
    """
    decoder = model.decoder
    parts: list[Any] = [model.device, model.dtype]
    parts += [repr(getattr(model.config, name, None)) for name in _SETTINGS]
    for module in decoder.layers.modules():
        own = vars(module)
        parts += [type(module), is_watched(module)]
        values = [own.get(name) for name in _ATTRIBUTES]
        parts += [value if isinstance(value, (int, float)) else repr(value) for value in values]
    parts += [(p.data_ptr(), tuple(p.shape), 0 if p.is_inference() else p._version) for p in copied(model)]
    return hash(tuple(parts))


def unchanging(model: Any) -> AbstractContextManager[None]:
    """For loops of calls of any model, between which its weights do not change: an engine compares them once."""
    return model.weights_fixed() if hasattr(model, "weights_fixed") else nullcontext()


def copied(model: Any) -> Iterable[Tensor]:
    """The tensors that an engine may have copied: all but the embeddings, which are looked up where they are."""
    yield from model.decoder.layers.parameters()
    yield from model.decoder.layers.buffers()  # which neurons a slice has
    yield from model.decoder.norm.parameters()
    yield from model.get_output_embeddings().parameters()


def content(library: Any, tensors: Iterable[Tensor], threads: int, step: int = 1) -> int:
    """A checksum of the bytes of tensors on the CPU, by the native library; of every `step`-th line of 64 bytes.

    At the speed of memory: 0.3 GB take some 10 ms on two cores.
    """
    plain = [tensor.detach().contiguous() for tensor in tensors]
    at = (ctypes.c_void_p * len(plain))(*[tensor.data_ptr() for tensor in plain])
    sizes = (ctypes.c_int64 * len(plain))(*[tensor.numel() * tensor.element_size() for tensor in plain])
    return int(library.ir_checksum(at, sizes, len(plain), step, threads))


def norms(tensors: Iterable[Tensor]) -> tuple[float, ...]:
    """The sizes and sums of some small tensors on any device; waits for it."""
    found = [part for tensor in tensors for part in (tensor.detach().float().norm(), tensor.detach().float().sum())]
    return tuple(torch.stack(found).tolist()) if found else ()
