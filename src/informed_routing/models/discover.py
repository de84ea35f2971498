"""The row of a decoder: from the table of families, or read from the code of its layers.

A family that is not in the table is understood as far as its code says how its layers are built (`layer_code.py`).
Where its attention is one that we know, too (`attention_code.py`), both units can be skipped; where it is another, the
attention runs as it is, for every token, and the FFN can be skipped. Whether all this holds is measured when routing is
attached (`execution/self_check.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import InputError
from .attention_code import gate_up_of, is_plain, row_of_attention
from .families import FAMILIES, Family
from .head_code import read_head
from .layer_code import UnitCode, Unread, read_layer


def family_of(model: Any, place: int = 0) -> Family:
    """The row of one layer of a causal LM, dense or routed. Raises InputError where its code is not understood."""
    if getattr(model.config, "is_heterogeneous", False):
        raise InputError(
            f"layers of this {model.config.model_type} have settings of their own", "Use a model whose layers are alike"
        )
    row = FAMILIES.get(model.config.model_type)
    return _discovered(model, place) if row is None else row


def listed_family_of(model: Any) -> Family:
    """The row of a family of the table, whose parts can be taken out and counted. Raises InputError for others."""
    try:
        return FAMILIES[model.config.model_type]
    except KeyError:
        raise InputError(
            f"model family {model.config.model_type!r} is not in the table", f"It has {', '.join(sorted(FAMILIES))}"
        ) from None


def _discovered(model: Any, place: int) -> Family:
    name = model.config.model_type
    layers = getattr(getattr(model, "model", None), "layers", None)
    try:
        if not isinstance(layers, nn.ModuleList):
            raise Unread(f"a {type(model).__name__} has no model.layers")
        if getattr(model.config, "num_hidden_layers", None) != len(layers):
            raise Unread("its configuration does not say how many layers there are")
        head = read_head(model)
        attention, ffn = _in_order(*read_layer(layers[place]))
    except Unread as reason:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"model family {name!r} is not in the table, and its code is not understood: {reason}",
            "Use a family of the table, or one whose layers add two units one after the other to the residual stream "
            f"(table: {known}). To add one, see FAMILIES in informed_routing/models/families.py",
        ) from None
    return replace(_row(model, place, attention, ffn), **head)  # type: ignore[arg-type]


def _in_order(first: UnitCode, second: UnitCode) -> tuple[UnitCode, UnitCode]:
    """Attention, then FFN: what is told more than the stream mixes tokens."""
    if first.passed is None or second.passed is not None:
        raise Unread(f"{first.unit} and {second.unit} are not a mixer of tokens and then an FFN")
    if first.beside is not None:
        raise Unread(f"{first.unit} and {first.beside} mix tokens side by side")
    if first.scale != second.scale:
        raise Unread(f"{first.unit} and {second.unit} are scaled by different attributes")
    return first, second


def _row(model: Any, place: int, attention: UnitCode, ffn: UnitCode) -> Family:
    layer = model.model.layers[place]
    mixer, mlp = getattr(layer, attention.unit), getattr(layer, ffn.unit)
    gate_up, activation = (None, Family.ffn_activation) if ffn.beside else gate_up_of(mlp)
    built = Family(
        attention_in_norm=attention.in_norm,
        attention_out_norm=attention.out_norm,
        ffn_in_norm=ffn.in_norm,
        ffn_out_norm=ffn.out_norm,
        attention=attention.unit,
        ffn=ffn.unit,
        ffn_beside=ffn.beside,
        attention_dropout=attention.dropout,
        ffn_dropout=ffn.dropout,
        residual_scale=attention.scale,
        gate_up=gate_up,
        ffn_activation=activation,
        passed=attention.passed,
        in_parts=False,
        lora_targets=_linears(mixer, gate_up),
    )
    row = row_of_attention(mixer)
    if row is None or not _windows_agree(row, model.config, place, mixer):
        return built
    built = replace(
        built,
        in_parts=True,
        qkv=row.qkv,
        qk_norm=row.qk_norm,
        rotates=row.rotates,
        attention_scale=row.attention_scale,
        attention_softcap=row.attention_softcap,
        sliding_window=row.sliding_window,
        lora_targets=row.lora_targets,
    )
    pre_norm = built.attention_out_norm is None and built.residual_scale is None and built.ffn_dropout is None
    if row.native and pre_norm and built.ffn_out_norm is None and is_plain(row, model, layer, mixer, mlp):
        return replace(built, native=row.native)
    return built


def _linears(mixer: nn.Module, gate_up: str | None) -> tuple[str, ...]:
    """The linear layers that make something of a mixer's input, and the gate of a gated FFN."""
    found = []
    for name, part in mixer.named_children():
        is_linear = isinstance(part, nn.Linear) or hasattr(part, "base_layer")  # or one with an adapter
        if is_linear and name not in ("o_proj", "out_proj"):
            found.append(name)
    gates = {"split": ("gate_proj",), "fused": ("gate_up_proj",)}
    return (*found, *gates.get(gate_up or "", ()))


def _windows_agree(row: Family, config: Any, place: int, attention: Any) -> bool:
    """Whether what the row says of an attention's window is what the attention has, if it has one of its own."""
    window = row.window(config, place)
    return bool(window == getattr(attention, "sliding_window", window))
