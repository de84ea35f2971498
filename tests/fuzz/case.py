"""A mutated run: the command line, its folder and environment, and what is right to happen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .commands import COMMANDS, Command, using
from .world import World


@dataclass(frozen=True)
class Right:
    """What is right: the exit codes, and what exit code 0 must give.

    `same`: exit code 0 gives the result of the unmutated command; False where the mutation makes another valid input,
    whose result nobody else knows. `named`: exit code 2 gives an error that contains one of these words.
    """

    codes: tuple[int, ...]
    same: bool = True
    named: tuple[str, ...] = ()


SAME = Right((0,))
SAME_OR_REFUSED = Right((0, 2))
SAME_OR_STOPPED = Right((0, 1, 2))
OTHER = Right((0,), False)
OTHER_OR_REFUSED = Right((0, 2), False)
FAILED = Right((1,))


def refused(*named: str) -> Right:
    """Exit code 2 and an error that names one of these."""
    return Right((2,), named=named)


@dataclass
class Case:
    """One run to be. Mutators change it and the staged copies of its inputs."""

    world: World
    command: Command
    rng: random.Random
    arguments: list[str]
    environment: dict[str, str]
    prepare: list[Callable[[], Any]] = field(default_factory=list)
    stdin: bytes | None = b""
    note: str = ""
    allowed: set[str] = field(default_factory=set)  # files outside the outputs that may appear or change
    silent: bool = False  # stderr is closed or full: nobody hears the error
    renamed: tuple[str, str] | None = None  # a name in the result, and what the reference has in its place
    outputs: tuple[str, ...] = ()
    checks: list[Callable[[], Iterator[str]]] = field(default_factory=list)  # further faults to look for
    restore: list[Callable[[], Any]] = field(default_factory=list)  # before the files are looked at
    finish: list[Callable[[], Any]] = field(default_factory=list)  # after that

    def __post_init__(self) -> None:
        self.outputs = (*self.command.outputs, "out.json")

    @property
    def folder(self) -> Path:
        return self.world.folder

    def option(self, name: str) -> int:
        """Where the value of an option stands."""
        return self.arguments.index(name) + 1

    def replace(self, name: str, value: str) -> None:
        """Give an option, which may be there already, this value."""
        if name in self.arguments:
            self.arguments[self.option(name)] = value
        else:
            self.arguments += [name, value]

    def rename(self, old: str, new: str) -> None:
        """Name another file on the command line."""
        words, rest = self.arguments[: self.command.words], self.arguments[self.command.words :]
        self.arguments = [*words, *(new if part == old else part.replace(f"={old}", f"={new}") for part in rest)]


Mutator = Callable[[Case], Right]


@dataclass(frozen=True)
class Entry:
    """A mutator of the table, with the commands that it can change."""

    kind: str
    mutate: Mutator
    commands: tuple[Command, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.mutate.__name__.strip('_')}"


TABLE: list[Entry] = []


def mutator(kind: str, *, uses: str | Iterable[str] = (), only: str = "") -> Callable[[Mutator], Mutator]:
    """Put a mutator into the table, for the commands that read one of the inputs `uses`, or those named in `only`."""
    inputs = (uses,) if isinstance(uses, str) else tuple(uses)
    chosen = [COMMANDS[name] for name in only.split()] or list(COMMANDS.values())
    if inputs:
        chosen = [command for command in chosen if any(command in using(name) for name in inputs)]

    def add(function: Mutator) -> Mutator:
        TABLE.append(Entry(kind, function, tuple(chosen)))
        return function

    return add
