"""What the documents promise: their commands, Python blocks and YAML files, found by themselves.

A command is a line of a shell block, an inline span that begins with one of the programs, or an example of `--help`.
Whoever writes a new one need not register it: it is found, and it has to run.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("informed-routing", "make", "python", "pip", "source")
LANGUAGES = ("bash", "python", "yaml", "cpp", "")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_NO_COMMANDS = ("CHANGELOG.md",)  # it tells of what was, too


@dataclass(frozen=True)
class Command:
    """A command with where it stands. `words` are without comments and assignments to the environment."""

    place: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.words)}"


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    place: str
    language: str
    text: str

    def __str__(self) -> str:
        return self.place


def documents() -> list[Path]:
    """README, the guides and the study's pages."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return sorted(path for path in found if path.name not in _NO_COMMANDS)


def blocks() -> list[Block]:
    """All fenced blocks."""
    found = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(f"{path.relative_to(ROOT)}:{line}", match[1], match[2]))
    return found


def commands() -> list[Command]:
    """All commands of documents and of help texts, each once."""
    found: list[Command] = []
    for block in blocks():
        if block.language == "bash" or (not block.language and _first_word(block.text) in PROGRAMS):
            for line in block.text.replace("\\\n", " ").splitlines():
                found += _command(block.place, line)
    for place, span in spans():
        if _first_word(span) in PROGRAMS and " " in span:
            found += _command(place, span)
    found += examples()
    return list({command.words: command for command in reversed(found)}.values())[::-1]


def fragments() -> list[Command]:
    """Inline spans such as `fit --resume`: a command without the program's name, of which the options are checked."""
    names = {command.words[1] for command in examples()}
    found = [
        Command(place, ("informed-routing", *shlex.split(span)))
        for place, span in spans()
        if _first_word(span) in names and "--" in span
    ]
    return list({command.words: command for command in found}.values())


def spans() -> list[tuple[str, str]]:
    """(place, text) of all inline code."""
    found = []
    for path in documents():
        text = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), path.read_text(encoding="utf-8"))
        for match in _SPAN.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append((f"{path.relative_to(ROOT)}:{line}", " ".join(match[1].split())))
    return found


def examples() -> list[Command]:
    """The examples of every command's help."""
    import typer

    from informed_routing.cli import app

    found: list[Command] = []

    def visit(command: Any, name: str) -> None:
        for match in re.finditer(r"Example: (informed-routing [^\n]*)", command.help or ""):
            found.extend(_command(f"{name} --help", match[1]))
        for part, inner in getattr(command, "commands", {}).items():
            visit(inner, f"{name} {part}")

    visit(typer.main.get_command(app), "informed-routing")
    return found


def make_targets() -> list[str]:
    """The targets of the Makefile that have a name of their own."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.findall(r"^([a-z][\w-]*):(?!=)", text, flags=re.MULTILINE)


def _first_word(text: str) -> str:
    words = text.split()
    return words[0] if words else ""


def _command(place: str, line: str) -> list[Command]:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return [Command(place, tuple(words))] if words else []
