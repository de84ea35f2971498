"""What a causal LM does from hidden states to logits, read from the code of its `forward`."""

from __future__ import annotations

import ast
import re
from typing import Any

from .layer_code import Unread
from .source import forward_of, tree_of

_HEAD = r"self\.lm_head\(hidden_states(?:\[:, slice_indices, :\])?\)"
_FIELD = r"self\.config\.(\w+)"
_STATES = {"outputs.last_hidden_state", "outputs[0]", "slice_logits_to_keep(hidden_states, logits_to_keep)"}


def read_head(model: Any) -> dict[str, str]:
    """Fields of a family's row that say what is done to the product with `lm_head`. Raises Unread for anything else."""
    name, tree = type(model).__name__, tree_of(forward_of(model))
    if tree is None or not hasattr(model, "lm_head"):
        raise Unread(f"{name} has no lm_head, or no code that could be read")
    made: dict[str, list[str]] = {"logits": [], "hidden_states": []}
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign) and ast.unparse(node.target) in made:
            raise Unread(f"`{ast.unparse(node)}` in {name}")
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name) and target.id in made:
                made[target.id].append(ast.unparse(node.value))  # type: ignore[attr-defined]
            elif not isinstance(target, ast.Name) and any(name in ast.unparse(target) for name in made):
                raise Unread(f"`{ast.unparse(node)}` in {name}")
    if other := set(made["hidden_states"]) - _STATES:
        raise Unread(f"`hidden_states = {min(other)}` in {name}")
    return _fields(name, made["logits"])


def _fields(name: str, steps: list[str]) -> dict[str, str]:
    """Fields for the values that logits are given one after the other."""
    for fields, pattern in (
        ((), rf"{_HEAD}(?:\.float\(\))?"),
        (("logits_factor",), rf"{_HEAD} \* {_FIELD}"),
        (("logits_divisor",), rf"{_HEAD}\nlogits / {_FIELD}"),
        (("logits_softcap", ""), rf"{_HEAD}\nlogits / {_FIELD}\ntorch\.tanh\(logits\)\nlogits \* {_FIELD}"),
    ):
        if found := re.fullmatch(pattern, "\n".join(steps)):
            if len(set(found.groups())) > 1:
                break
            return {field: value for field, value in zip(fields, found.groups(), strict=True) if field}
    raise Unread(f"{name} does more to its logits than the product with lm_head: `{'; '.join(steps)}`")
