"""YAML within bounds: of depth, size and kinds of value.

The events of a document are counted before anything is built of it, so that neither nesting nor aliases of aliases can
cost more than the bounds; then PyYAML's safe loader builds plain values, stricter than it is by itself.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import InputError
from .user_files import read_text, shown

LARGEST_FILE = 4 * 2**20  # bytes
DEEPEST = 32  # mappings and lists in one another; settings need about ten
MOST_VALUES = 200_000  # scalars, mappings and lists, aliases counted as what they stand for
LARGEST_INTEGER = 2**63 - 1

_PREFIX = "tag:yaml.org,2002:"
_MERGE = f"{_PREFIX}merge"
_KINDS = {f"{_PREFIX}{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}
_REMEDY = "Correct this line"
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same values, some ten times faster


def read_yaml(path: str | Path, what: str = "file") -> Any:
    """The content of a YAML file: `parse_yaml` of at most 4 MiB of UTF-8 text; `what` is the file's role in messages.

    Raises InputError when it is missing, no regular text, or not within the bounds.
    """
    return parse_yaml(read_text(path, what, LARGEST_FILE, "Give the path of a YAML file"), f"{what} {path}")


def parse_yaml(text: str, where: str) -> Any:
    """Plain values (mappings, lists, strings, finite numbers, booleans, null) of one YAML document.

    Raises InputError naming `where` and the line: for what is no YAML, a key given twice, a number that cannot be read
    or is not finite, tags of other types, and more depth or values (aliases count as what they stand for) than any
    settings need.
    """
    try:
        _check_size(text, where)
        return yaml.load(text, Loader=_Loader)
    except InputError:
        raise
    except yaml.YAMLError as error:
        raise InputError(f"{where}{_line(error)}: {_problem(error)}", _REMEDY) from None
    except (ValueError, RecursionError) as error:  # text that no parser takes, such as lone surrogates
        raise InputError(f"{where} cannot be read: {str(error).splitlines()[0]}", "Correct it") from None


def _check_size(text: str, where: str) -> None:
    """Count depth and values, without building any."""
    values, depth = 0, 0
    sizes: dict[str, int] = {}  # of what has been anchored and is complete
    open_anchors: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=_BASE):
        place = f"{where}, line {event.start_mark.line + 1 if event.start_mark else '?'}"
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _KINDS:
            raise InputError(f"{place}: the tag {shown(tag.replace(_PREFIX, '!!'))} is not taken", _REMEDY)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise InputError(f"{place}: the alias *{event.anchor} has nothing complete to stand for", _REMEDY)
            values += sizes[event.anchor]
        elif isinstance(event, yaml.NodeEvent):
            values += 1
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                open_anchors.append((event.anchor, values))
                sizes.pop(event.anchor, None)  # type: ignore[arg-type]  # a name that is used again
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, before = open_anchors.pop()
            if anchor is not None:
                sizes[anchor] = values - before + 1
        if depth > DEEPEST:
            raise InputError(f"{place}: it is nested more than {DEEPEST} deep", "Write it flatter")
        if values > MOST_VALUES:
            remedy = "Leave out what is not needed, and aliases of aliases"
            raise InputError(f"{place}: it stands for more than {MOST_VALUES:,} values", remedy)


class _Loader(_BASE):  # type: ignore[misc]
    """PyYAML's safe loader, which refuses what it would read as something else than is written."""

    # Dates are text here: no setting is one, and an impossible one is no reason to stop. So is a single `=`.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(("timestamp", "value"))]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> Any:
        """The document's root, after looking for keys that are given twice."""
        root = super().get_single_node()
        waiting, seen = [root], set()
        while waiting:
            node = waiting.pop()
            if id(node) in seen or not isinstance(node, yaml.CollectionNode):
                continue
            seen.add(id(node))
            if isinstance(node, yaml.MappingNode):
                self._check_keys(node)
                waiting += [part for pair in node.value for part in pair]
            else:
                waiting += node.value
        return root

    def _check_keys(self, node: Any) -> None:
        known: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error(key, "a key is a list or a mapping")
            name = "<<" if key.tag == _MERGE else self.construct_object(key)
            line = key.start_mark.line + 1
            if name in known:
                raise _error(key, f"the key {shown(key.value)} is given twice, first in line {known[name]}")
            known[name] = line


def _error(node: Any, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _read_integer(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node)
    if re.fullmatch(r"[-+]?0[0-9_]+", text) or ":" in text:
        raise _error(node, f"the number {shown(text)} has two readings (quote it if it is text)")
    value = _constructed(yaml.SafeLoader.construct_yaml_int, loader, node, "integer")
    if abs(value) > LARGEST_INTEGER:
        raise _error(node, f"the integer {shown(text)} is too large")
    return int(value)


def _read_number(loader: Any, node: Any) -> float:
    text = loader.construct_scalar(node)
    if ":" in text:
        raise _error(node, f"the number {shown(text)} has two readings (quote it if it is text)")
    value = _constructed(yaml.SafeLoader.construct_yaml_float, loader, node, "number")
    if not math.isfinite(value):
        raise _error(node, f"{shown(text)} is not a finite number")
    return float(value)


def _read_boolean(loader: Any, node: Any) -> bool:
    return bool(_constructed(yaml.SafeLoader.construct_yaml_bool, loader, node, "boolean"))


def _read_null(loader: Any, node: Any) -> None:
    text = loader.construct_scalar(node)
    if text.lower() not in ("", "~", "null"):
        raise _error(node, f"{shown(text)} is not null")


def _constructed(construct: Any, loader: Any, node: Any, kind: str) -> Any:
    try:
        return construct(loader, node)
    except (ValueError, KeyError, OverflowError, IndexError):  # also for more digits than Python reads
        raise _error(node, f"{shown(node.value)} is not {'an' if kind == 'integer' else 'a'} {kind}") from None


for _kind, _read in (("int", _read_integer), ("float", _read_number), ("bool", _read_boolean), ("null", _read_null)):
    _Loader.add_constructor(_PREFIX + _kind, _read)


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(problem).split()) or type(error).__name__
