"""Models whose residual stream has been sliced to a smaller width: their layers, norms and shapes.

A unit of a sliced layer computes `shortcut(h) + unit(norm(h))`: the shortcut turns the stream from the basis that the
unit reads to the one that it writes. Norm weights are folded into the matrices that follow. The last layer writes the
whole width again, in the original basis, for the final norm and the head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models import calls
from ..models.runtime_classes import made_by
from ..models.units import Unit
from .remaining import units_of
from .reshaped import mark_reshaped

SLICEABLE = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Families whose layer is two pre-norm units with split projections, and nothing else on the residual stream."""

READS = {"attention": ("q_proj", "k_proj", "v_proj"), "ffn": ("gate_proj", "up_proj")}
"""Linear layers of a unit that read the residual stream."""

WRITES = {"attention": "o_proj", "ffn": "down_proj"}
"""The linear layer of a unit that writes to it."""


class SlicedRMSNorm(nn.Module):
    """RMS norm without weights of a stream [..., D], by the mean square over the original width: D of it is left."""

    def __init__(self, full_width: int, eps: float) -> None:
        super().__init__()
        self.full_width, self.variance_epsilon = full_width, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        # In float32, as the norms of these families do.
        hidden = hidden_states.float()
        mean_square = hidden.square().sum(-1, keepdim=True) / self.full_width
        return (hidden * torch.rsqrt(mean_square + self.variance_epsilon)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"full_width={self.full_width}, eps={self.variance_epsilon}"


def _run_sliced_layer(self: Any, hidden_states: Tensor, call: calls.Call) -> Tensor:
    for unit in self.units:
        output = unit.run(self, unit.normed(self, hidden_states), call)
        hidden_states = getattr(self, shortcut_name(unit))(hidden_states) + output
    return hidden_states


@functools.cache
def sliced_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    """The sliced subclass of a family's decoder layer."""
    forward = calls.layer_forward(base, _run_sliced_layer)
    names = {"forward": forward, "__module__": __name__, **made_by(sliced_layer_class, base)}
    return type(f"Sliced{base.__name__}", (base,), names)


def shortcut_name(unit: Unit) -> str:
    """Where a sliced layer keeps a unit's shortcut."""
    return f"{unit.kind}_shortcut"


def check_sliceable(model: Any) -> None:
    """Raises InputError for a family that cannot be sliced."""
    if model.config.model_type not in SLICEABLE:
        raise InputError(
            f"SliceGPT cannot slice the family {model.config.model_type!r}", f"It knows {', '.join(SLICEABLE)}"
        )


def reshape_sliced(model: Any, width: int) -> None:
    """Give a dense model the modules and shapes of one sliced to `width`, in place, with weights still to be set.

    New matrices are uninitialised, of the dtype and on the device of those that they replace (so `meta` stays `meta`).
    The head is untied, and `config.hidden_size` is the sliced width. Raises InputError for a family that cannot be
    sliced, or a width that is not between 1 and the model's.
    """
    check_sliceable(model)
    config, decoder, units = model.config, model.model, units_of(model)
    full = config.hidden_size
    if not 1 <= width <= full:
        raise InputError(f"sliced width {width} is not between 1 and {full}", "Choose a width in this range")
    config.head_dim = decoder.layers[0].self_attn.head_dim  # no longer the quotient of two other fields
    config.hidden_size = width
    untie_head(model)
    _resize(decoder.embed_tokens, width)
    for layer in decoder.layers:
        for unit in units:
            module = unit.module(layer)
            written = full if layer is decoder.layers[-1] and unit.kind == "ffn" else width
            for name in READS[unit.kind]:
                linear = getattr(module, name)
                setattr(module, name, _linear_like(linear, width, linear.out_features, linear.bias is not None))
            linear = getattr(module, WRITES[unit.kind])
            bias = linear.bias is not None
            setattr(module, WRITES[unit.kind], _linear_like(linear, linear.in_features, written, bias))
            setattr(layer, shortcut_name(unit), _linear_like(linear, width, written, False))
            norm = getattr(layer, _norm_name(unit))
            setattr(layer, _norm_name(unit), SlicedRMSNorm(full, norm.variance_epsilon))
        layer.units, layer.hidden_size = units, width
        layer.__class__ = sliced_layer_class(type(layer))  # type: ignore[arg-type]
    decoder.norm = SlicedRMSNorm(full, decoder.norm.variance_epsilon)
    mark_reshaped(model)


def untie_head(model: Any) -> None:
    """Give the head a matrix of its own if it shares the embedding's."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    if model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _norm_name(unit: Unit) -> str:
    name = getattr(unit.family, f"{unit.kind}_in_norm")
    assert isinstance(name, str)
    return name


def _linear_like(linear: nn.Linear, inputs: int, outputs: int, bias: bool) -> nn.Linear:
    weight = linear.weight
    new = nn.utils.skip_init(nn.Linear, inputs, outputs, bias, device=weight.device, dtype=weight.dtype)
    return new.train(linear.training)


def _resize(embedding: nn.Embedding, width: int) -> None:
    weight = embedding.weight
    embedding.weight = nn.Parameter(weight.new_empty(weight.shape[0], width))
    embedding.embedding_dim = width
