"""The code of functions as syntax trees, so that what another module computes is read, not guessed from its name."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

_LIBRARY = "transformers."
"""Code from elsewhere may compute anything, whatever it resembles: it is not read."""


def forward_of(module: Any) -> Function | None:
    """The `forward` that a module's class has, below classes that were made here; None where no library wrote it."""
    for kind in type(module).__mro__:
        own = vars(kind).get("forward")
        if own is not None and "_made_by" not in vars(kind):
            return own if kind.__module__.startswith(_LIBRARY) else None
    return None


@functools.cache
def tree_of(function: Function | None) -> ast.FunctionDef | None:
    """The definition of a function without docstring, annotations and decorators; None where there is no source."""
    if function is None:
        return None
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
        found = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(found, ast.FunctionDef):
        return None
    plain: ast.FunctionDef = _Plain().visit(found)
    plain.decorator_list, plain.name = [], "function"
    return plain


@functools.cache
def _text(function: Function | None) -> str | None:
    tree = tree_of(function)
    return None if tree is None else ast.dump(tree)


def same_code(one: Function | None, other: Function | None) -> bool:
    """Whether two functions are word for word the same, but for names of types and what they say of themselves."""
    text = _text(one)
    return text is not None and text == _text(other)


class _Plain(ast.NodeTransformer):
    """Takes off what does not compute."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        if node.value is None:
            return None
        return ast.copy_location(ast.Assign([node.target], node.value), node)

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node
