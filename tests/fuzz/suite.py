"""Mutation number N of a seed: made, run, judged."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import options, settings, surroundings, tensors, texts  # noqa: F401 (they fill the table)
from .case import TABLE, Case, Entry, Right
from .commands import Command
from .oracle import Picture, Result, check
from .process import Outcome
from .world import World, empty

LIMIT = 30.0  # seconds of processor time of a run


@dataclass(frozen=True)
class Run:
    """What is kept of a run."""

    number: int
    mutation: str
    command: str
    note: str
    arguments: list[str]
    code: int
    seconds: float
    faults: list[str]
    error: str


class Suite:
    """Runs of one world. `references` are the results of unmutated command lines."""

    def __init__(self, root: Path, seed: int = 1, limit: float = LIMIT) -> None:
        self.world, self.seed, self.limit = World(root), seed, limit
        self.references: dict[tuple[str, ...], Result] = {}

    def _draw(self, number: int) -> tuple[random.Random, Entry, Command]:
        rng = random.Random(f"{self.seed}:{number}")
        entry = TABLE[self._place(number)]
        return rng, entry, rng.choices(entry.commands, [command.weight for command in entry.commands])[0]

    def name(self, number: int) -> str:
        """What mutation `number` does, and to which command."""
        _, entry, command = self._draw(number)
        return f"{entry.name} {command.name}"

    def run(self, number: int) -> Run:
        """Do mutation `number`: a function of the seed and of this number, whatever ran before."""
        rng, entry, command = self._draw(number)
        self.reference(command, command.arguments)  # before anything is staged
        self.world.stage(command.inputs)
        case = Case(self.world, command, rng, list(command.arguments), self.world.environment)
        try:
            outcome, faults = self._try(case, entry)
        finally:
            for step in case.finish:
                step()
        error = next((line for line in reversed(outcome.err.splitlines()) if line.strip()), "")[:400]
        took = round(outcome.seconds, 2)
        return Run(number, entry.name, command.name, case.note, case.arguments, outcome.code, took, faults, error)

    def _try(self, case: Case, entry: Entry) -> tuple[Outcome, list[str]]:
        command = case.command
        try:
            right = entry.mutate(case)
        except Exception as error:  # a fault of the suite's own, which must not end it
            return Outcome(0, "", "", 0.0), [f"no mutation: {type(error).__name__}: {error}"]
        if command.name == "study" and right.codes == (2,) and entry.kind not in ("option", "target", "yaml"):
            right = Right((1, 2))  # what fails in one cell does not stop the others
        before = Picture.of(self.world.folder)
        outcome = self._command(case)
        wanted = self.references[command.arguments] if right.same else None
        for step in case.restore:
            step()
        faults = check(case, right, outcome, before, Picture.of(self.world.folder), wanted)
        return outcome, list(dict.fromkeys(faults))

    def _command(self, case: Case) -> Outcome:
        return self.world.command(
            *case.arguments,
            environment=case.environment,
            prepare=case.prepare,
            stdin=case.stdin,
            seconds=self.limit,
        )

    def _place(self, number: int) -> int:
        """Mutators in a shuffled order, again and again: few runs use many of them."""
        turn, place = divmod(number, len(TABLE))
        order = list(range(len(TABLE)))
        random.Random(f"{self.seed}:order:{turn}").shuffle(order)
        return order[place]

    def reference(self, command: Command, arguments: tuple[str, ...]) -> Result:
        """The result of a command line on unmutated inputs, computed once."""
        if arguments not in self.references:
            self.world.stage(command.inputs)
            outcome = self.world.command(*arguments, learn=True, seconds=120)
            if outcome.code:
                raise RuntimeError(f"{' '.join(arguments)} fails without any mutation: {outcome.err}")
            self.references[arguments] = Result.read(self.world.folder, command.outputs)
        return self.references[arguments]


def figures(runs: Iterable[Run], seconds: float, seed: int) -> dict[str, Any]:
    """What is reported of a suite."""
    runs = list(runs)
    kinds: dict[str, Counter[str]] = {}
    for run in runs:
        counter = kinds.setdefault(run.mutation.partition("/")[0], Counter())
        counter["runs"] += 1
        counter[f"exit {run.code}" if run.code in (0, 1, 2) else "other"] += 1
        counter["faulty"] += bool(run.faults)
    marks = {"tracebacks": "traceback", "hangs": "hang\0", "half files": "half-written", "killed": "killed by"}
    return {
        "seed": seed,
        "runs": len(runs),
        "seconds": round(seconds, 1),
        "exit codes": dict(sorted(Counter(str(run.code) for run in runs).items())),
        "kinds": {kind: dict(counter) for kind, counter in sorted(kinds.items())},
        **{
            name: sum(any(f"{f}\0".startswith(mark) for f in run.faults) for run in runs)
            for name, mark in marks.items()
        },
        "faulty": sum(bool(run.faults) for run in runs),
        "failures": [asdict(run) for run in runs if run.faults],
    }


def clean(root: Path) -> None:
    """Remove a harness's folder, whatever the permissions in it."""
    for name in ("run", "world", "cache"):
        if (root / name).is_dir():
            empty(root / name)
    shutil.rmtree(root, ignore_errors=True)
