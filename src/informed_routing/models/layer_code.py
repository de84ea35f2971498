"""What a decoder layer does with its units, read from the code of its `forward`.

A layer is understood when its code says: one unit's update is added to the residual stream, then another's, each of
the form `h + scale * dropout(out_norm(unit(in_norm(h))))`. Conditions on the layer's own attributes are decided for the
layer at hand. Whatever else stands there is a reason not to understand it.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from ..errors import InputError
from .source import Function, forward_of, tree_of


class Unread(Exception):
    """Why a layer's code is not understood."""


class Passed(NamedTuple):
    """What a layer passes to its attention besides the stream."""

    named: tuple[tuple[str, str], ...]
    """(name there, name of the layer's own parameter)."""
    rest: bool
    """Whether what the layer has no name for is passed on, too."""


@dataclass(frozen=True)
class UnitCode:
    """Names of the parts of one unit in its layer."""

    unit: str
    in_norm: str | None = None
    out_norm: str | None = None
    dropout: str | None = None
    scale: str | None = None
    passed: Passed | None = None
    """None: it is given the stream and nothing else."""
    beside: str | None = None
    """Another module that reads the same and whose output is added: a shared MLP beside experts."""


@dataclass(frozen=True)
class _Step:
    """A module that is called on a value, or an attribute that multiplies it."""

    name: str
    passed: Passed | None = None
    scale: bool = False
    beside: str | None = None


@dataclass(frozen=True)
class _Value:
    """What became of the residual stream's `version` by some steps; the stream itself with none."""

    version: int
    steps: tuple[_Step, ...] = ()


def read_layer(layer: nn.Module) -> tuple[UnitCode, UnitCode]:
    """The two units of a live decoder layer in the order in which they run. Raises Unread with the reason."""
    name, tree = type(layer).__name__, tree_of(forward_of(layer))
    if tree is None:
        raise Unread(f"the code of {name} is not that of transformers, or not there to be read")
    reader = _Reader(layer, tree)
    with suppress(_Returned):
        reader.run(tree.body)
    if len(reader.updates) != 2:
        raise Unread(f"{name} adds {len(reader.updates)} updates to its stream, not two")
    first, second = (_unit(layer, steps) for steps in reader.updates)
    return first, second


class _Returned(Exception):
    """The end of a forward."""


class _Reader:
    """Runs a layer's code on names in place of numbers."""

    def __init__(self, layer: nn.Module, tree: ast.FunctionDef) -> None:
        self.layer = layer
        arguments = [argument.arg for argument in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)]
        self.parameters = set(arguments[2:])
        self.rest = None if tree.args.kwarg is None else tree.args.kwarg.arg
        self.known: dict[str, _Value | None] = {arguments[1]: _Value(0)}
        """Names with values of the stream; None for what else a unit gives back."""
        self.updates: list[tuple[_Step, ...]] = []

    def run(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self._assign(node.targets[0], node.value)
        elif isinstance(node, ast.If):
            self._if(node)
        elif isinstance(node, ast.Return) and node.value is not None:
            value = node.value
            if isinstance(value, ast.Tuple) and len(value.elts) == 1:
                value = value.elts[0]
            if self._value(value) != _Value(len(self.updates)):
                raise Unread(f"`{ast.unparse(node)}` gives back something else than the stream")
            raise _Returned
        elif not isinstance(node, ast.Pass):
            raise Unread(f"`{_line(node)}`")

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and target.elts and isinstance(target.elts[0], ast.Name):
            if not isinstance(value, ast.Call | ast.Name):
                raise Unread(f"`{ast.unparse(target)} = {ast.unparse(value)}`")
            first, *others = target.elts
            self._assign(first, value)
            self.known.update({other.id: None for other in others if isinstance(other, ast.Name)})
        elif isinstance(target, ast.Name):
            self.known[target.id] = self._value(value)
            self.parameters.discard(target.id)
        else:
            raise Unread(f"`{ast.unparse(target)} = {ast.unparse(value)}`")

    def _if(self, node: ast.If) -> None:
        test = node.test
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance":
            # `if isinstance(x, tuple): x, _ = x`: the unit's first output, however it comes
            body = node.body[0]
            unpacks = isinstance(body, ast.Assign) and isinstance(body.value, ast.Name) and not node.orelse
            if not (unpacks and len(node.body) == 1 and ast.unparse(test).endswith(", tuple)")):
                raise Unread(f"`{_line(node)}`")
            self._statement(body)
            return
        self.run(node.body if self._holds(test) else node.orelse)

    def _holds(self, test: ast.expr) -> bool:
        """A condition on attributes of the layer that are fixed for its life."""
        attributes = {id(node.value) for node in ast.walk(test) if isinstance(node, ast.Attribute)}
        for node in ast.walk(test):
            plain = ast.BoolOp | ast.UnaryOp | ast.Compare | ast.Attribute | ast.Constant | ast.operator | ast.cmpop
            is_self = isinstance(node, ast.Name) and node.id == "self" and id(node) in attributes
            if not (isinstance(node, plain | ast.boolop | ast.unaryop | ast.expr_context) or is_self):
                raise Unread(f"the condition `{ast.unparse(test)}`")
            if isinstance(node, ast.Attribute) and node.attr == "training":
                raise Unread(f"the condition `{ast.unparse(test)}`")
        return bool(eval(compile(ast.Expression(test), "layer", "eval"), {"__builtins__": {}}, {"self": self.layer}))

    def _value(self, node: ast.expr) -> _Value:
        """What an expression is of the stream."""
        if isinstance(node, ast.Name):
            value = self.known.get(node.id)
            if value is None:
                raise Unread(f"`{node.id}` is nothing of the stream")
            return value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._sum(self._value(node.left), self._value(node.right))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for side, factor in ((node.left, node.right), (node.right, node.left)):
                if (name := self._own(factor)) is not None:
                    return self._after(self._value(side), _Step(name, scale=True))
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Call) and ast.unparse(node.slice) == "0":
            return self._value(node.value)
        if isinstance(node, ast.Call):
            return self._call(node)
        raise Unread(f"`{ast.unparse(node)}`")

    def _sum(self, one: _Value, other: _Value) -> _Value:
        if one.steps and other.steps:
            return self._both(one, other)
        stream, update = (one, other) if not one.steps else (other, one)
        version = len(self.updates)
        if stream != _Value(version) or not update.steps or update.version != version:
            raise Unread("an update is not of the stream that it is added to (units side by side, or more than one)")
        self.updates.append(update.steps)
        return _Value(version + 1)

    def _both(self, one: _Value, other: _Value) -> _Value:
        """Two modules that read the same, added."""
        first, second = one.steps[-1], other.steps[-1]
        alike = one.version == other.version and one.steps[:-1] == other.steps[:-1]
        if not alike or first != _Step(first.name) or second != _Step(second.name):
            raise Unread("an update is the sum of others (units side by side)")
        return replace(one, steps=(*one.steps[:-1], _Step(first.name, beside=second.name)))

    def _call(self, node: ast.Call) -> _Value:
        name = self._own(node.func)
        if name is None:
            function = node.func
            shapes = isinstance(function, ast.Attribute) and function.attr in ("view", "reshape")
            if shapes and len(node.args) == 1 and ast.unparse(node.args[0]).endswith(".shape"):
                return self._value(function.value)  # type: ignore[attr-defined]
            raise Unread(f"`{ast.unparse(node)}`")
        if not isinstance(getattr(self.layer, name, None), nn.Module):
            raise Unread(f"self.{name} is no module")
        given = {str(keyword.arg): keyword.value for keyword in node.keywords if keyword.arg is not None}
        names = [name for name in ("hidden_states", "x") if name in given]
        stream = node.args[0] if node.args else given.pop(names[0]) if len(names) == 1 else None
        if stream is None or len(node.args) > 1:
            raise Unread(f"`{ast.unparse(node)}`: what it reads")
        value = self._value(stream)
        rest = any(keyword.arg is None for keyword in node.keywords)
        if rest and not all(ast.unparse(k.value) == self.rest for k in node.keywords if k.arg is None):
            raise Unread(f"`{ast.unparse(node)}`")
        for passed in given.values():
            if not (isinstance(passed, ast.Name) and passed.id in self.parameters):
                raise Unread(f"`{ast.unparse(passed)}` is passed on, which is no parameter of the layer")
        named = tuple((key, ast.unparse(passed)) for key, passed in given.items())
        return self._after(value, _Step(name, Passed(named, rest) if named or rest else None))

    def _own(self, node: ast.expr) -> str | None:
        """The name of an attribute of the layer."""
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        return node.attr if own else None  # type: ignore[attr-defined]

    def _after(self, value: _Value, step: _Step) -> _Value:
        return replace(value, steps=(*value.steps, step))


def _line(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0]


def _unit(layer: nn.Module, steps: tuple[_Step, ...]) -> UnitCode:
    """The parts of a unit from the steps between a stream and its sum with them."""
    places = [place for place, step in enumerate(steps) if not step.scale and _has_matrices(getattr(layer, step.name))]
    if len(places) != 1:
        raise Unread(f"{len(places)} modules with matrices in one update ({', '.join(step.name for step in steps)})")
    before, after = steps[: places[0]], list(steps[places[0] + 1 :])
    if len(before) > 1 or any(step.scale or step.passed for step in before):
        raise Unread(f"more than a norm before {steps[places[0]].name}")
    parts: dict[str, str] = {}
    for name, fits in (("out_norm", _is_norm), ("dropout", _is_dropout), ("scale", lambda _, step: step.scale)):
        if after and fits(layer, after[0]) and after[0].passed is None:
            parts[name] = after.pop(0).name
    if after:
        raise Unread(f"{after[0].name} after {steps[places[0]].name}")
    in_norm = before[0].name if before else None
    unit = steps[places[0]]
    return UnitCode(unit.name, in_norm, passed=unit.passed, beside=unit.beside, **parts)


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _is_dropout(layer: nn.Module, step: _Step) -> bool:
    return not step.scale and isinstance(getattr(layer, step.name), nn.Dropout)


def _is_norm(layer: nn.Module, step: _Step) -> bool:
    return not step.scale and not isinstance(getattr(layer, step.name), nn.Dropout)


@functools.cache
def parameters_of(forward: Function | None) -> dict[str, Any]:
    """The parameters of a layer's forward that have names, besides self and the stream, with their defaults."""
    if forward is None:
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [p for p in inspect.signature(forward).parameters.values() if p.kind in named]
    return {p.name: p.default for p in found[2:]}


def told(passed: Passed, layer: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a unit whose layer was called with the keyword arguments `given`.

    Raises InputError for one that the layer needs and was not given.
    """
    own = parameters_of(forward_of(layer))
    arguments = {theirs: given.get(ours, own[ours]) for theirs, ours in passed.named}
    if missing := [name for name, value in arguments.items() if value is inspect.Parameter.empty]:
        raise InputError(f"a layer was called without {missing[0]}", "Call the whole model, not a layer of it")
    if passed.rest:
        arguments |= {name: value for name, value in given.items() if name not in own}
    return arguments
