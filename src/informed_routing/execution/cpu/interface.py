"""What passes between Python and the compiled engine: the same fields in the same order are in source/interface.h."""

from __future__ import annotations

import ctypes
from typing import Any

from ...errors import InputError
from ...routing.stats import OUTCOMES
from ..formats import FORMATS, GROUP, PACKED

PHASES = ("route", "project", "cache", "attend", "out", "gate_up", "down", "head")
KEY_BLOCK = 64
"""Keys are read in blocks of this many."""

_int, _float, _pointer = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Linear(ctypes.Structure):
    """A linear layer of packed weights."""

    _fields_ = (*((name, _int) for name in ("type", "n", "k", "packed")), ("data", _pointer), ("bias", _pointer))


class Routing(ctypes.Structure):
    """Router and forecaster of a unit."""

    _fields_ = (
        ("router_in", Linear),
        ("router_out", _pointer),
        ("router_bias", _float),
        ("router_relu", _int),
        ("router_residual", _int),
        ("forecast_in", Linear),
        ("forecast_out", Linear),
        ("forecast_silu", _int),
        ("pad", _int),
    )


class Layer(ctypes.Structure):
    """A decoder layer."""

    _fields_ = (
        *((name, _pointer) for name in ("attention_norm", "ffn_norm", "q_norm", "k_norm")),
        *((name, Linear) for name in ("q", "kv", "o", "gate_up", "down", "gate_up_slice", "down_slice")),
        ("attention", Routing),
        ("ffn", Routing),
        ("residual", _float),
        ("window", _int),
        ("rope", _int),
        ("gelu", _int),
        ("is_static", _int),
        ("pad", _int),
    )


class Model(ctypes.Structure):
    """The decoder, final norm and head."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", _pointer),
        ("head", Linear),
        *((name, _int) for name in ("n_layers", "d", "heads", "kv_heads", "head_dim", "ff", "threads", "kv_type")),
        ("eps", _float),
        ("scale", _float),
        ("qk_eps", _float),
    )


class Prices(ctypes.Structure):
    """Seconds by number of rows, for the profitability switch."""

    _fields_ = (("execute", _pointer * 2), ("approximate", _pointer * 2), ("limit", _int))


class Call(ctypes.Structure):
    """One forward: what it reads, where it writes, what it counts."""

    _fields_ = (
        *((name, _pointer) for name in ("hidden", "cos", "sin", "valid", "start", "keys", "values", "forced")),
        *((name, _pointer) for name in ("limits", "shares", "approximated")),
        *((name, _pointer) for name in ("gates", "margins", "executed", "executed_keys", "calls")),
        *((name, _pointer) for name in ("normed", "logits", "seconds")),
        ("prices", Prices),
        *((name, _int) for name in ("batch", "length", "past", "capacity", "keep", "dense")),
        *((name, ctypes.c_float) for name in ("gain", "soft")),
    )


ABI: dict[str, int | None] = {
    "ABI": 4,
    **{part.__name__: ctypes.sizeof(part) for part in (Linear, Routing, Layer, Model, Prices, Call)},
    "OUTCOMES": len(OUTCOMES),
    "PHASES": len(PHASES),
    "KEY_BLOCK": KEY_BLOCK,
    "GROUP": GROUP,
    **{name: FORMATS[name].id for name in PACKED},
}
"""What `ir_abi` says of the compiled engine: the version of the interface, sizes of structures, constants, formats."""


def check_abi(library: Any, where: str) -> None:
    """Raise InputError, naming what differs, for a compiled engine that is not made for this interface."""
    try:
        library.ir_abi.restype = ctypes.c_char_p
        lines = library.ir_abi().decode().splitlines()
    except AttributeError:
        lines = []
    found = {name: int(value) for name, value in map(str.split, lines)}
    for name in [*ABI, *found]:
        there, here = found.get(name), ABI.get(name)
        if there != here:
            raise InputError(
                f"the compiled engine does not fit this version: {name} is {there} in it and {here} in Python",
                f"Delete {where}, so that it is compiled again, or install informed-routing anew",
            )
