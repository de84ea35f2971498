"""`python -m tests.fuzz.kill --moments 50 --json FILE`: kill -9 at random moments of every command that writes.

Half of the moments are points in time, half are the start of one of the changes of the file system that the command
makes. After each kill what is there has to be whole, old or new; the command continued ends as an uninterrupted one:
same weights bit for bit, same files, no litter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import process
from .commands import COMMANDS, COMMON, FLOAT, TEXT
from .oracle import Picture, Result, damage, difference
from .process import Outcome
from .suite import clean
from .world import World, copy

EMBEDDED = "demo:smollm2-135m"
_PRUNE = ("prune", "model", "--method", "shortgpt", "--out", "out", *TEXT, "--tokens", "256", "--sequence-length", "64")


@dataclass(frozen=True)
class Job:
    """A command to kill: how it goes on, and what stood in its outputs before (`old`: the arguments that made it)."""

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    more: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    probe: bool = False  # `evaluate` its output: refused, or that of a whole one


def _job(name: str, *, more: str = "", extra: str = "", probe: bool = False) -> Job:
    command = COMMANDS[name]
    arguments = (*command.arguments, *extra.split())
    return Job(name, arguments, command.inputs, (*command.outputs, "out.json"), tuple(more.split()), probe=probe)


def jobs() -> list[Job]:
    """Every command that writes."""
    fit = COMMANDS["fit"].arguments
    prune = (*_PRUNE, *FLOAT, *COMMON, "--recovery-steps", "2")
    inputs = COMMANDS["fit"].inputs
    stages = ("--stages", "forecast,route,lora")
    old_fit, old_prune = (*fit, "--seed", "3"), (*_PRUNE, *FLOAT, *COMMON, "-s", "0.67")
    measure = _job("measure", more="--resume")
    return [
        Job("fit", (*fit, *stages), inputs, ("out", "out.json"), ("--resume",), probe=True),
        Job("fit --overwrite", (*fit, "--overwrite"), inputs, ("out", "out.json"), old=old_fit, probe=True),
        Job("prune", (*prune, "-s", "0.34"), ("model", "text.jsonl"), ("out", "out.json"), ("--resume",), probe=True),
        Job(
            "prune --overwrite",
            (*prune, "-s", "0.34", "--overwrite"),
            ("model", "text.jsonl"),
            ("out", "out.json"),
            old=old_prune,
            probe=True,
        ),
        _job("fit-lora", more="--resume", probe=True),
        _job("study"),
        Job(
            "whatif measure",
            tuple("230" if part == "4" else part for part in measure.arguments),
            measure.inputs,
            measure.outputs,
            measure.more,
        ),
        _job("predict"),
        _job("check"),
        _job("evaluate-tasks"),
        _job("generate-routed"),
        _job("benchmark"),
    ]


@dataclass
class Killed:
    """What happened at one moment."""

    moment: str
    code: int
    faults: list[str] = field(default_factory=list)


class Killer:
    """Kills one job again and again."""

    def __init__(self, world: World, job: Job, seed: int) -> None:
        self.world, self.job, self.seed = world, job, seed
        self.before: Path | None = None
        if job.old:
            self._run(job.old, job.inputs)
            self.before = world.root / f"old-{len(job.name)}"
            shutil.rmtree(self.before, ignore_errors=True)
            (world.folder / "out").rename(self.before)
            self.old_score = self._score(self.before)
        counter = world.root / "streams" / "events"
        self._run(job.arguments, job.inputs, prepare=[process.count_file_events(counter)])
        self.events = int.from_bytes(counter.read_bytes(), "little")
        self.seconds = self._run(job.arguments, job.inputs).seconds  # all is imported now
        self.wanted = Result.read(world.folder, job.outputs[:-1])
        self.names = sorted(self._names())
        self.score = self._score(None)

    def _run(self, arguments: tuple[str, ...], inputs: tuple[str, ...], **options: Any) -> Outcome:
        self._stage(inputs)
        outcome = self.world.command(*arguments, learn=True, seconds=600, **options)
        if outcome.code:
            raise RuntimeError(f"{' '.join(arguments)} fails by itself: {outcome.err}")
        return outcome

    def _stage(self, inputs: tuple[str, ...]) -> None:
        self.world.stage(inputs)
        if self.before:
            copy(self.before, self.world.folder / "out")

    def _names(self) -> Iterator[str]:
        pictures = Picture.of(self.world.folder).files
        return (name for name in pictures if any(name == o or name.startswith(f"{o}/") for o in self.job.outputs))

    def _score(self, folder: Path | None) -> Any:
        """What `evaluate` says of the output; the error line where it refuses."""
        if not self.job.probe:
            return None
        target = str(folder or "out")
        text = ("--split", "all", "--sequence-length", "64", "--limit", "2", "-q", "--threads", "1", "--json", "-")
        found = self.world.command("evaluate", target, *TEXT, *FLOAT, *text)
        if found.code:
            return (
                found.err if found.code == 2 and found.err.startswith("error: ") else f"exit {found.code}: {found.err}"
            )
        runs = json.loads(found.out)["result"]["runs"]
        return [run["tasks"]["text.jsonl"]["loss"] for run in runs]

    def moment(self, number: int) -> Killed:
        """Kill at a moment that the seed and `number` choose, look, go on, look again."""
        rng = random.Random(f"{self.seed}:{self.job.name}:{number}")
        self._stage(self.job.inputs)
        options: dict[str, Any] = {"seconds": 600}
        if number % 2:
            after = rng.uniform(0, self.seconds)
            options["kill_after"], moment = after, f"after {after:.3f} s"
        else:
            event = rng.randrange(1, self.events + 1)
            options["prepare"] = [process.on_file_event(event, lambda: os.kill(os.getpid(), signal.SIGKILL))]
            moment = f"at change {event} of {self.events}"
        found = Killed(moment, self.world.command(*self.job.arguments, **options).code)
        self._a_while_later()
        found.faults += self._after_the_kill()
        found.faults += self._after_the_end()
        return found

    def _a_while_later(self) -> None:
        """Make hidden files look a minute old: what is very young may belong to a process that begins."""
        for output in (self.world.folder / name for name in self.job.outputs):
            for path in [*output.parent.glob(".*"), *output.rglob(".*")]:
                os.utime(path, (time.time() - 60,) * 2, follow_symlinks=False)

    def _after_the_kill(self) -> Iterator[str]:
        yield from damage(self.world.folder, self.job.outputs, finished=False)
        if self.job.probe:
            score = self._score(None)
            right = score in (self.score, getattr(self, "old_score", None))
            if isinstance(score, str) and not score.startswith("error: "):
                yield f"evaluate of what is left: {score}"
            elif not isinstance(score, str) and not right:
                yield f"evaluate of what is left: {score}, not {self.score}"

    def _after_the_end(self) -> Iterator[str]:
        outcome = self.world.command(*self.job.arguments, *self.job.more, seconds=600)
        finished = outcome.code == 2 and "finished" in outcome.err
        if outcome.code and not finished:
            yield f"cannot go on, exit {outcome.code}: {outcome.err.strip()[-300:]}"
            return
        yield from damage(self.world.folder, self.job.outputs, finished=True)
        found = Result.read(self.world.folder, self.job.outputs[:-1])
        if found.tensors != self.wanted.tensors:
            yield "other weights than an uninterrupted run's"
        timed = self.job.name in COMMANDS and COMMANDS[self.job.name].timed
        other = None if timed or finished else difference(self.wanted.content, found.content)
        other = other or difference(self.wanted.tables, found.tables, "table")
        if other:
            yield f"another result: {other}"
        names = [name for name in self._names() if not (finished and name == "out.json")]
        if strangers := [name for name in names if name not in self.names]:
            yield f"{strangers[0]} is left, which an uninterrupted run does not leave"
        if missing := [name for name in self.names if name not in names and not (finished and name == "out.json")]:
            yield f"{missing[0]} is missing"


def main() -> int:
    """Kill every job. Exit code 1 if any kill did harm."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kill", description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="for each command")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="NAME", help="commands whose name has this in it")
    parser.add_argument("--embedded", action="store_true", help=f"on {EMBEDDED} instead of a tiny model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and leave it")
    given = parser.parse_args()
    process.warm_up()
    root = (given.keep or Path(tempfile.mkdtemp(prefix="kill-"))).absolute()
    world = World(root, EMBEDDED if given.embedded else "model")
    begun, found = time.monotonic(), {}
    try:
        for job in jobs():
            if given.only in job.name:
                found[job.name] = kill(world, job, given.moments, given.seed)
    finally:
        result = {
            "seed": given.seed,
            "model": world.model,
            "seconds": round(time.monotonic() - begun, 1),
            "kills": sum(one["killed"] for one in found.values()),
            "faulty": sum(len(one["failures"]) for one in found.values()),
            "commands": found,
        }
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")
        if not given.keep:
            clean(root)
    print(f"{result['kills']} kills, {result['faulty']} with faults, {result['seconds']:.0f} s")
    return 1 if result["faulty"] else 0


def kill(world: World, job: Job, moments: int, seed: int) -> dict[str, Any]:
    """Figures of one job."""
    killer = Killer(world, job, seed)
    found = [killer.moment(number) for number in range(moments)]
    bad = [one for one in found if one.faults]
    for one in bad:
        print(f"{job.name} {one.moment}: {'; '.join(one.faults)}", flush=True)
    killed = sum(one.code == -signal.SIGKILL for one in found)
    same = sum(not any("other weights" in fault or "cannot go on" in fault for fault in one.faults) for one in found)
    line = (
        f"{job.name:18} {moments} moments, {killed} killed, {same} ended with identical weights, {len(bad)} with faults"
    )
    print(line, flush=True)
    return {
        "moments": moments,
        "killed": killed,
        "identical": same,
        "changes": killer.events,
        "seconds": round(killer.seconds, 2),
        "failures": [asdict(one) for one in bad],
    }


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # imported libraries have much to say at the end of an interpreter that forked
