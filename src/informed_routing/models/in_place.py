"""FFNs that are routed where their layers call them: whatever else a layer computes around them is left alone.

Of a layer whose code is not understood (units side by side, streams that are mixed), one thing can be told from its
modules: which of them is made for one token at a time. What such a module reads is what forecaster and router read, and
what it gives back is what the forecaster predicts. That it is token by token, and called once for every token, is
measured when routing is attached (`execution/self_check.py`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .calls import Call
from .layer_code import Unread
from .source import Function, forward_of, tree_of
from .units import Unit, mixed

MATRICES = 2
"""An FFN has at least so many."""

_MIXES = re.compile("mask|cache|past|position|state|rope")
"""In the name of a parameter: what is told by it is not of one token alone."""


@dataclass(frozen=True)
class InPlaceUnit(Unit):
    """A unit whose input and output are its update's own. Of an attention all else that is in the layer is counted."""

    @property
    def has_input_norm(self) -> bool:
        """What comes in is what the unit reads."""
        return True

    def modules(self, layer: nn.Module) -> list[nn.Module]:
        """The FFN; or all of the layer that is not in it."""
        name = self.family.ffn
        if self.kind == "ffn":
            return [] if name is None else [layer.get_submodule(name)]
        return [child for own, child in layer.named_children() if own != name and own not in ROUTING]

    def neurons(self, layer: nn.Module) -> int | None:
        """As of any unit; none where the layer has no FFN."""
        return None if self.family.ffn is None else super().neurons(layer)

    def normed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The input as it is."""
        return hidden

    def run(self, layer: nn.Module, x: Tensor, call: Call) -> Tensor:
        """The unit's output [..., d] for its input and what else it was told, by the base model's own code."""
        module: Any = self.module(layer)
        output = base_of(type(module)).forward(module, x, **call.given)
        if isinstance(output, tuple):
            call.besides[:] = [output[1:]]
            output = output[0]
        return output.view(*x.shape[:-1], output.shape[-1])

    def update(self, layer: nn.Module, output: Tensor) -> Tensor:
        """The output as it is."""
        return output

    def added(self, hidden: Tensor, update: Tensor) -> Tensor:
        """The update: its layer adds it to what it will."""
        return update

    def mixed(self, hidden: Tensor, gate: Tensor, executed: Tensor, approximated: Tensor) -> Tensor:
        """Each token's one of two updates."""
        return mixed(gate, executed, approximated)


ROUTING = frozenset({"attention_routing", "ffn_routing"})
"""What routing adds to a layer."""


def base_of(kind: type) -> Any:
    """The base model's own class under one that was made here."""
    while "_made_by" in vars(kind):
        kind = vars(kind)["_made_by"][1]
    return kind


def find_ffn(layer: nn.Module) -> str | None:
    """The name of a layer's FFN: of its modules that are told nothing of other tokens, that with the most weights.

    None where a layer has no such module. Raises Unread where what it gives back cannot be read.
    """
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in layer.named_children()
        if name not in ROUTING and _may_be_ffn(module)
    }
    if not sizes:
        return None
    name = max(sizes, key=lambda one: sizes[one])
    outputs_of(forward_of_ffn(getattr(layer, name)))
    return name


def find_mixer(layer: nn.Module, ffn: str | None) -> str | None:
    """The name of what mixes tokens in a layer; None where nothing else has matrices.

    Of its other modules that with the most weights, among those that are told of other tokens if there are any.
    """
    sizes = {
        name: (_is_told_of_others(module), sum(parameter.numel() for parameter in module.parameters()))
        for name, module in layer.named_children()
        if name not in (ffn, *ROUTING) and any(parameter.dim() >= 2 for parameter in module.parameters())
    }
    return max(sizes, key=lambda name: sizes[name], default=None)


def _is_told_of_others(module: nn.Module) -> bool:
    """Whether a module is told a mask, a cache or places."""
    names = list(inspect.signature(base_of(type(module)).forward).parameters)[2:]
    return any(_MIXES.search(name) for name in names)


def forward_of_ffn(module: nn.Module) -> Function:
    """The `forward` of an FFN's class. Raises Unread where it is not that of a library's class."""
    kind = base_of(type(module))
    forward = nn.Sequential.forward if kind is nn.Sequential else forward_of(module)
    if forward is None:
        raise Unread(f"the code of {kind.__name__} is not that of transformers")
    return forward


def _may_be_ffn(module: nn.Module) -> bool:
    """Whether a module has several matrices and needs to be told one value alone."""
    kind = base_of(type(module))
    if kind.__name__.endswith("Norm") or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    if sum(parameter.dim() >= 2 for parameter in module.parameters()) < MATRICES:
        return False
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    if not parameters:
        return False
    first, *others = parameters
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    optional = all(other.kind is named and other.default is None for other in others)
    told = first.kind is named and optional and not any(_MIXES.search(other.name) for other in others)
    return told and not adds_input(forward_of(module))


@functools.cache
def adds_input(forward: Function | None) -> bool:
    """Whether a function's code adds its first parameter, as it came, to something: a residual stream of its own.

    What it gives back is then no update, and nothing in its place would be the end of the stream.
    """
    tree = tree_of(forward)
    if tree is None:
        return False
    as_it_came = {tree.args.args[1].arg}
    for node in _in_order(tree.body):
        value = getattr(node, "value", None) if isinstance(node, ast.Assign | ast.AugAssign | ast.Return) else None
        sums = [part for part in ast.walk(value) if isinstance(part, ast.BinOp)] if value is not None else []
        sides = [side for part in sums if isinstance(part.op, ast.Add) for side in (part.left, part.right)]
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            sides += [node.target, node.value]
        if any(isinstance(side, ast.Name) and side.id in as_it_came for side in sides):
            return True
        if isinstance(node, ast.Assign):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            same = isinstance(node.value, ast.Name) and node.value.id in as_it_came
            as_it_came = as_it_came | names if same else as_it_came - names
    return False


def _in_order(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements as they stand, those of blocks among them."""
    for node in body:
        yield node
        for block in ("body", "orelse", "finalbody"):
            yield from _in_order(getattr(node, block, []))


@functools.cache
def outputs_of(forward: Function) -> int:
    """How many values a function gives back in a tuple; 0 for one that is in none. Raises Unread where they differ."""
    if forward is nn.Sequential.forward:
        return 0
    tree = tree_of(forward)
    returns = [] if tree is None else [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    found = {len(value.elts) if isinstance(value, ast.Tuple) else 0 for value in returns}
    if len(found) != 1:
        raise Unread(f"what {getattr(forward, '__qualname__', forward)} gives back")
    return found.pop()
