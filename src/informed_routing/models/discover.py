"""The row of a decoder: from the table of families, or read from the code of its layers.

A family that is not in the table is understood as far as its code says how its layers are built (`layer_code.py`).
Where its attention is one that we know, too (`attention_code.py`), both units can be skipped; where it is another, the
attention runs as it is, for every token, and the FFN can be skipped. Where the layer's code says something else, the
FFN is routed where it is called (`in_place.py`). Whether all this holds is measured when routing is attached
(`execution/self_check.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import InputError
from .attention_code import gate_up_of, is_plain, row_of_attention
from .decoder import layers_of, text_config
from .families import FAMILIES, Family
from .head_code import read_head
from .in_place import find_ffn, find_mixer
from .layer_code import UnitCode, Unread, read_layer


def family_of(model: Any, place: int = 0) -> Family:
    """The row of one layer of a causal LM, dense or routed. Raises InputError where its code is not understood."""
    row = FAMILIES.get(model.config.model_type)
    if row is not None and not getattr(model.config, "is_heterogeneous", False):
        return row
    return _discovered(model, place)


def listed_family_of(model: Any) -> Family:
    """The row of a family of the table, whose parts can be taken out and counted. Raises InputError for others."""
    try:
        return FAMILIES[model.config.model_type]
    except KeyError:
        raise InputError(
            f"model family {model.config.model_type!r} is not in the table", f"It has {', '.join(sorted(FAMILIES))}"
        ) from None


def _discovered(model: Any, place: int) -> Family:
    config = text_config(model)
    layers = layers_of(model)
    head = _head(model)
    try:
        if getattr(config, "is_heterogeneous", False):
            raise Unread("its layers have settings of their own")
        if getattr(config, "num_hidden_layers", None) != len(layers):
            raise Unread("its configuration does not say how many layers there are")
        attention, ffn = _in_order(*read_layer(layers[place]))
        return replace(_row(model, layers[place], place, attention, ffn), **head)
    except Unread as reason:
        return replace(_in_place(model, layers, place, reason), **head)


def _head(model: Any) -> dict[str, Any]:
    """What the row of a model says of its logits."""
    try:
        return read_head(model)
    except Unread:
        return {"own_head": True}


def _in_place(model: Any, layers: nn.ModuleList, place: int, reason: Unread) -> Family:
    """The row of a layer whose code is not understood, with an FFN that is told from its other modules."""
    layer = layers[place]
    try:
        ffn = find_ffn(layer)
        mixer = find_mixer(layer, ffn)
        if ffn is None and mixer is None and not any(find_ffn(one) or find_mixer(one, None) for one in layers):
            raise Unread(f"{reason}; and its layers have no modules to route")
    except Unread as other:
        raise InputError(
            f"model family {model.config.model_type!r} is not in the table, and its code is not understood: {other}",
            f"Use a family of the table ({', '.join(sorted(FAMILIES))}), or one whose layers have an FFN of their own. "
            "To add one, see FAMILIES in informed_routing/models/families.py",
        ) from None
    gate_up, activation = (None, Family.ffn_activation) if ffn is None else gate_up_of(getattr(layer, ffn))
    return Family(
        attention_in_norm=None,
        ffn_in_norm=None,
        attention=mixer,
        ffn=ffn,
        gate_up=gate_up,
        ffn_activation=activation,
        in_parts=False,
        in_place=True,
        lora_targets=() if mixer is None else _linears(getattr(layer, mixer), gate_up),
    )


def _in_order(first: UnitCode, second: UnitCode) -> tuple[UnitCode, UnitCode]:
    """Attention, then FFN: what is told more than the stream mixes tokens."""
    if first.passed is None or second.passed is not None:
        raise Unread(f"{first.unit} and {second.unit} are not a mixer of tokens and then an FFN")
    if first.beside is not None:
        raise Unread(f"{first.unit} and {first.beside} mix tokens side by side")
    if first.scale != second.scale:
        raise Unread(f"{first.unit} and {second.unit} are scaled by different attributes")
    return first, second


def _row(model: Any, layer: nn.Module, place: int, attention: UnitCode, ffn: UnitCode) -> Family:
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
    if row is None or not _windows_agree(row, text_config(model), place, mixer):
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
