"""Documented commands as they run here: on tiny models and texts, with amounts that take a second."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

_BOTH = {"--prompts": "30", "--limit": "2", "--recovery-steps": "2", "--repeats": "1", "--device": "cpu"}
_OF: dict[str, dict[str, str]] = {
    "benchmark": {"--prompt-tokens": "16", "--new-tokens": "2"},
    "fit": {"--steps": "2"},
    "demo": {"--steps": "2"},
}
"""Amounts that replace documented ones."""

_FURTHER: dict[str, list[str]] = {
    "benchmark": ["--prompt-tokens", "16", "--new-tokens", "2", "--repeats", "1"],
    "demo": ["--steps", "2", "--rows", "1", "--repeats", "1"],
    "evaluate": ["--limit", "2"],
    "fit": ["--steps", "2", "--sequence-length", "256", "--batch-size", "4"],
    "generate": ["--max-new-tokens", "4"],
    "prune": ["--tokens", "256", "--sequence-length", "64"],
    "whatif measure": ["--prompts", "30"],
    "whatif check": ["--prompts", "10"],
}
"""Amounts of commands that leave them to their defaults."""

_PLACEHOLDERS = {"MODEL": "demo:smollm2-135m", "DIR": "out", "DATA": "mine.jsonl", "TEXT": "mine.jsonl"}
_SLOW = ("importance-sampling",)


def is_slow(words: Sequence[str]) -> bool:
    """Whether a command has no small form."""
    return any(word in _SLOW for word in words)


def runs(words: Sequence[str], desk: Path) -> list[list[str]]:
    """The arguments of one or more runs of the command line for a documented command, the last one being its own.

    `desk` is the working directory, which is made ready: what the command writes is removed from it.
    """
    name, given = _name_of(words[1:])
    given = _filled(name, given)
    if name == "study":
        return [[name, *given] if is_slow(given) else [name, *_listed(given)]]
    given = _smaller(name, given)
    if name == "fit":
        return _fit(given, desk)
    if name == "prune":
        _remove(_value(given, "--out"), desk)
    if name == "whatif measure":
        _remove(_value(given, "--out"), desk)
    if name == "evaluate" and {"--preset", "--tasks"} & set(given) and "--data-dir" not in given:
        given += ["--data-dir", "data"]  # the Hub's documents
    return [[*name.split(), *given]]


def _listed(given: Sequence[str]) -> list[str]:
    """A study that only lists its cells: what it runs takes hours. Of how it runs them, the options are checked."""
    return [word for word in given if word not in ("--ray", "--speed", "--dry-run")] + ["--dry-run"]


def _fit(given: list[str], desk: Path) -> list[list[str]]:
    """A fit, into a folder that is not there; before one that goes on, one that was interrupted."""
    if "--out" not in given:
        given += ["--out", "fitted"]
    out = _value(given, "--out")
    _remove(out, desk)
    if "--start" not in given:
        given += ["--rank", "4"]
        if not given[0] or given[0].startswith("--"):
            given = ["demo:smollm2-135m", *given]
    if "--recipe" in given and "--data" not in given:
        given += ["--data", "mine.jsonl"]  # a recipe of the paper's reads from the Hub
    if "--resume" not in given:
        return [["fit", *given]]
    first = [word for word in given if word != "--resume"]
    return [["fit", *first, "--keep-checkpoints"], ["fit", *given]]


def interrupted(out: Path) -> None:
    """What a fit leaves that was killed at its very end."""
    for name in ("routing_config.json", "fit.json"):
        (out / name).unlink(missing_ok=True)


def _name_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """(`fit` or `whatif measure`, the arguments)."""
    count = 2 if words[0] == "whatif" else 1
    return " ".join(words[:count]), list(words[count:])


def _filled(name: str, given: Sequence[str]) -> list[str]:
    """Placeholders as things of the desk."""
    filled: list[str] = []
    for word in given:
        before = filled[-1] if filled else ""
        filled.append("data" if (before, word) == ("--data-dir", "DATA") else _PLACEHOLDERS.get(word, word))
    if name == "generate" and "--prompt" not in filled:
        filled += ["--prompt", "the river"]
    return filled


def _smaller(name: str, given: Sequence[str]) -> list[str]:
    amounts = _BOTH | _OF.get(name, {})
    found = [amounts.get(given[place - 1], word) if place else word for place, word in enumerate(given)]
    more = _FURTHER.get(name, [])
    for option, value in zip(more[::2], more[1::2], strict=True):
        if option not in found and {"--max-new-tokens": "-n"}.get(option) not in found:
            found += [option, value]
    return found


def _value(given: Sequence[str], option: str) -> str:
    return given[list(given).index(option) + 1]


def _remove(name: str, desk: Path) -> None:
    target = desk / name
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
