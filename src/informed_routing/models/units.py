"""Units of a decoder layer: find them, call them as they are, or compute attention for some queries only.

Nothing here knows about routing. A `Unit` holds no modules: it is a view given the layer on each call, so a
routed model never registers the base model's weights twice.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config.parts import UnitKind
from . import calls, slices
from .calls import Call
from .families import Family
from .layer_code import told
from .projections import projections


@dataclass(frozen=True)
class Unit:
    """One computational unit of a layer: `h + scale * out_norm(unit(in_norm(h)))` (paper Eq. 1 and 2)."""

    kind: UnitKind
    family: Family

    def _part(self, layer: nn.Module, name: str) -> Any:
        attribute = getattr(self.family, f"{self.kind}_{name}")
        return None if attribute is None else getattr(layer, attribute)

    @property
    def has_input_norm(self) -> bool:
        """Whether the family normalises what the unit reads."""
        return getattr(self.family, f"{self.kind}_in_norm") is not None

    def module(self, layer: nn.Module) -> nn.Module:
        """The unit itself: the attention or FFN module of the base model."""
        return getattr(layer, getattr(self.family, self.kind))

    def modules(self, layer: nn.Module) -> list[nn.Module]:
        """The unit's module, and the one beside it if there is one."""
        beside = self.family.ffn_beside if self.kind == "ffn" else None
        return [self.module(layer), *([] if beside is None else [getattr(layer, beside)])]

    def module_of(self, layer: nn.Module, kind: UnitKind) -> nn.Module | None:
        """A unit of the layer, this one or the other; None where it is gone."""
        name = getattr(self.family, kind)
        return None if name is None else getattr(layer, name, None)

    def input_norm(self, layer: nn.Module) -> Any:
        """The norm before the unit; None in post-norm families."""
        return self._part(layer, "in_norm")

    def normed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What the unit reads: [..., d] after the input norm, or `hidden` itself in post-norm families."""
        norm = self.input_norm(layer)
        return hidden if norm is None else norm(hidden)

    def stream(self, hidden: Tensor) -> Tensor:
        """The residual stream [..., d] in the form that the unit adds to."""
        return hidden

    def run(self, layer: nn.Module, x: Tensor, call: Call) -> Tensor:
        """The unit's raw output [..., d] for its normed input, by the base model's own module."""
        if self.kind == "ffn":
            output = self.module(layer)(x)
            if self.family.ffn_beside is not None:
                return output + getattr(layer, self.family.ffn_beside)(x)
        else:
            passed = self.family.passed
            output = self.module(layer)(x, **(call.given if passed is None else told(passed, layer, call.given)))
        output = output[0] if isinstance(output, tuple) else output
        return output.view(*x.shape[:-1], output.shape[-1])  # some give back a list of rows

    def neurons(self, layer: nn.Module) -> int | None:
        """How many neurons the unit has of which some can be computed alone; None where it is no known gated FFN."""
        return slices.neurons(self.family, self.module(layer)) if self.kind == "ffn" else None

    def activations(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What each neuron gives for the unit's normed input [..., d]: [..., neurons]."""
        return slices.activations(self.family, self.module(layer), x)

    def run_slice(self, layer: nn.Module, x: Tensor, index: Tensor) -> Tensor:
        """The unit's raw output [..., d] for its normed input, of its neurons `index` int64 [k] alone."""
        return slices.slice_output(self.family, self.module(layer), x, index)

    def update(self, layer: nn.Module, output: Tensor) -> Tensor:
        """What is added to the residual: output norm, dropout and residual scale applied."""
        norm = self._part(layer, "out_norm")
        if norm is not None:
            output = norm(output)
        dropout = self._part(layer, "dropout")
        if dropout is not None:
            output = dropout(output)
        if self.family.residual_scale is not None:
            output = output * getattr(layer, self.family.residual_scale)
        return output

    def added(self, hidden: Tensor, update: Tensor) -> Tensor:
        """The stream [..., d] with an update [..., d]."""
        return hidden + update

    def mixed(self, hidden: Tensor, gate: Tensor, executed: Tensor, approximated: Tensor) -> Tensor:
        """The stream [B, N, d] with each token's one of two updates [B, N, d], by a gate [B, N] (`mixed`)."""
        return self.added(hidden, mixed(gate, executed, approximated))


def mixed(gate: Tensor, executed: Tensor, approximated: Tensor) -> Tensor:
    """Row by row [B, N, d], by a gate [B, N] that is boolean or has a gradient."""
    if gate.dtype == torch.bool:
        return torch.where(gate.unsqueeze(-1), executed, approximated)
    weight = gate.unsqueeze(-1).to(executed.dtype)
    return weight * executed + (1 - weight) * approximated


# ---------------------------------------------------------------------------------------------------------
# Attention in parts: keys and values of all tokens, queries of some
# ---------------------------------------------------------------------------------------------------------


_READ_IMPLEMENTATIONS = ("eager", "sdpa")


def only_whole(family: Family, attention: Any, call: Call) -> str | None:
    """Why only the base model's own module can compute a call of an attention, all queries at once; None if we can.

    The parts below are the arithmetic of transformers' own classes with keys, mask and rotary tables of a plain call.
    """
    if not family.in_parts:
        return f"a {type(attention).__name__}, whose code is not known"
    if (implementation := attention.config._attn_implementation) not in _READ_IMPLEMENTATIONS:
        return f"attn_implementation {implementation!r}"
    if unknown := call.options.keys() - {"output_hidden_states"}:
        return f"the argument {min(unknown)!r}"
    if not calls.plain_mask(call.mask):
        return f"a mask of type {type(call.mask).__name__}"
    if not (getattr(attention, "is_causal", True) and getattr(attention.config, "is_causal", True) is not False):
        return "attention that is not causal"
    if calls.is_watched(attention) or not type(attention).__module__.startswith("transformers.models."):
        return f"a {type(attention).__name__} that was hooked or replaced"
    return None


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, N, heads * head_dim] -> [B, heads, N, head_dim]."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def _rotate(family: Family, attention: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Apply the family's own rotary embedding to [B, heads, N, head_dim]."""
    if rope is None or not family.has_rope(attention):
        return x
    apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    nothing = x[:, :0]  # the function rotates a pair; an empty partner costs nothing
    return apply(x, nothing, *rope)[0]


def keys_values(family: Family, attention: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values [B, kv_heads, N, head_dim] of the normed input [B, N, d], keys rotated."""
    keys, values = projections(family, attention).keys_values(x)
    if family.qk_norm == "whole":
        keys = attention.k_norm(keys)
    keys, values = _heads(keys, attention.head_dim), _heads(values, attention.head_dim)
    if family.qk_norm == "head":
        keys = attention.k_norm(keys)
    return _rotate(family, attention, keys, rope), values


def queries(family: Family, attention: Any, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotated queries [B, heads, Q, head_dim] of the selected normed rows [B, Q, d]."""
    q = projections(family, attention).q(x)
    if family.qk_norm == "whole":
        q = attention.q_norm(q)
    q = _heads(q, attention.head_dim)
    if family.qk_norm == "head":
        q = attention.q_norm(q)
    return _rotate(family, attention, q, rope)


def attend(family: Family, attention: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The family's attention function and output projection: [B, Q, d].

    `mask` [B or 1, 1, Q, K] is boolean (True = may attend) or additive; None lets every query see every key.
    """
    out = _attention_function(family, attention, q, keys, values, mask)
    return attention.o_proj(out.reshape(*out.shape[:2], -1))


def attend_causal(
    family: Family, attention: Any, q: Tensor, keys: Tensor, values: Tensor, last: Tensor, block: int
) -> Tensor:
    """As `attend`, for queries of which each sees the keys up to its `last` [B, Q]: [B, Q, d].

    Done in blocks of queries, each with no more keys than its queries see: one mask over all would compute every score
    and throw half of them away. Saves most where `last` ascends.
    """
    parts = []
    for start in range(0, last.shape[1], block):
        rows = slice(start, start + block)
        seen = int(last[:, rows].max()) + 1
        mask = torch.arange(seen, device=last.device) <= last[:, None, rows, None]
        seen_keys, seen_values = keys[:, :, :seen], values[:, :, :seen]
        parts.append(_attention_function(family, attention, q[:, :, rows], seen_keys, seen_values, mask))
    out = torch.cat(parts, dim=1)
    return attention.o_proj(out.reshape(*out.shape[:2], -1))


def _attention_function(
    family: Family, attention: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> Tensor:
    """[B, Q, heads, head_dim]."""
    implementation = attention.config._attn_implementation
    module = sys.modules[type(attention).__module__]
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, module.eager_attention_forward)
    softcap = family.softcap(attention)
    extra: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
    if mask is not None and mask.dtype == torch.bool and implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, torch.finfo(q.dtype).min)
    dropout = attention.attention_dropout if attention.training else 0.0
    scaling = family.scale(attention)
    out, _ = interface(attention, q, keys, values, mask, dropout=dropout, scaling=scaling, is_causal=False, **extra)
    return out
